"""What both sides of `train_step.py` start from: sizes, weights, a batch.

NumPy alone, and a function of names and seeds, so that two processes that
share no library and no file have the same weights. They draw one tensor after
another: a copy of the whole model would count in their peak memory.
"""

import dataclasses
import zlib

import numpy as np

BETA, ALPHA = 0.03, 0.01
LR, BETAS, EPS, CLIP = 5e-6, (0.9, 0.95), 1e-8, 1.0


@dataclasses.dataclass(frozen=True)
class Case:
  """A decoder of the Llama family with a tied head, and a batch."""

  vocab: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp: int
  rows: int
  slots: int
  theta: float = 10_000.0
  eps: float = 1e-5

  @property
  def tokens(self) -> int:
    """Tokens of a batch; no slot is padding."""
    return self.rows * self.slots

  def kernels(self) -> dict[str, tuple[int, int]]:
    """Returns inputs and outputs of the projections of a layer."""
    heads, kv_heads = (n * self.head_dim for n in (self.heads, self.kv_heads))
    return {
      "q": (self.width, heads),
      "k": (self.width, kv_heads),
      "v": (self.width, kv_heads),
      "o": (heads, self.width),
      "gate": (self.width, self.mlp),
      "up": (self.width, self.mlp),
      "down": (self.mlp, self.width),
    }


CASES = {
  # For the tests: it says nothing about speed.
  "tiny": Case(64, 32, 2, 4, 2, 8, 64, rows=2, slots=16),
  # 5.4 million weights.
  "small": Case(4608, 256, 4, 4, 4, 64, 1024, rows=8, slots=256),
  # The shape of HuggingFaceTB/SmolLM2-135M.
  "large": Case(
    49_152, 576, 30, 9, 3, 64, 1536, rows=4, slots=128, theta=100_000.0
  ),
}


def draw(
  role: str, name: str, shape: tuple[int, ...], std: float
) -> np.ndarray:
  """Returns the first weights of one tensor of a network.

  The policy starts a little away from the reference: at the reference itself
  every log-ratio is 0, and a wrong loss could go unseen.

  Args:
    role: "policy", "reference" or "critic".
    name: of the tensor.
    shape: of the tensor.
    std: of its entries.
  """

  def noise(*key: str) -> np.ndarray:
    seed = zlib.crc32("/".join(key).encode())
    return np.random.default_rng(seed).standard_normal(shape, np.float32)

  weights = noise(name)
  if role != "reference":
    weights += np.float32(0.05) * noise(role, name)
  return weights * np.float32(std)


def make_batch(case: Case) -> dict[str, np.ndarray]:
  """Returns a batch: a sequence a row, a quarter of it the prompt."""
  rng = np.random.default_rng(0)
  shape = case.rows, case.slots
  tokens = rng.integers(0, case.vocab, (case.rows, case.slots + 1))
  rewards = np.zeros(shape, np.float32)
  rewards[:, -1] = np.arange(case.rows) % 2
  positions = np.broadcast_to(np.arange(case.slots), shape)
  return {
    "tokens": tokens[:, :-1].astype(np.int32),
    "targets": tokens[:, 1:].astype(np.int32),
    "positions": positions.astype(np.int32),
    "action_mask": positions >= case.slots // 4,
    "rewards": rewards,
  }
