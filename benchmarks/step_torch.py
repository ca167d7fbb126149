"""One side of `train_step.py`: the authors' way, in plain PyTorch.

As the OREO authors' code does it: the policy runs once without gradient, for
the log-ratios that the value loss needs, and once more with it; the logits of
the whole batch exist at once; policy and critic have an AdamW each. All in
float32. Attention is PyTorch's own fused kernel.
"""

import torch
import torch.nn.functional as F
from step_case import ALPHA, BETA, BETAS, CLIP, EPS, LR, Case, draw, make_batch
from torch import nn


class Norm(nn.Module):
  """RMSNorm."""

  def __init__(self, size: int, eps: float):
    super().__init__()
    self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

  def forward(self, x):
    """Scales the last dimension to unit mean square."""
    return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Block(nn.Module):
  """Attention and gated MLP, each behind a norm and a residual."""

  def __init__(self, case: Case):
    super().__init__()
    self.case = case
    self.attention_norm = Norm(case.width, case.eps)
    self.mlp_norm = Norm(case.width, case.eps)
    for name, (inputs, outputs) in case.kernels().items():
      setattr(self, name, nn.Linear(inputs, outputs, bias=False))

  def forward(self, x, cos, sin):
    """Runs the block on [B, T, D]."""
    case, (rows, slots, _) = self.case, x.shape

    def heads(y):
      return y.view(rows, slots, -1, case.head_dim).transpose(1, 2)

    def rotate(y):
      first, second = y.chunk(2, dim=-1)
      return y * cos + torch.cat((-second, first), dim=-1) * sin

    y = self.attention_norm(x)
    query, key, value = heads(self.q(y)), heads(self.k(y)), heads(self.v(y))
    mixed = F.scaled_dot_product_attention(
      rotate(query), rotate(key), value, is_causal=True, enable_gqa=True
    )
    x = x + self.o(mixed.transpose(1, 2).reshape(rows, slots, -1))
    y = self.mlp_norm(x)
    return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
  """A policy with a tied head, or a critic with a value head."""

  def __init__(self, case: Case, role: str):
    super().__init__()
    self.case = case
    self.embedding = nn.Embedding(case.vocab, case.width)
    self.layers = nn.ModuleList(Block(case) for _ in range(case.layers))
    self.final_norm = Norm(case.width, case.eps)
    self.value_head = (
      nn.Linear(case.width, 1, bias=False) if role == "critic" else None
    )
    self._draw(role)

  def _draw(self, role: str) -> None:
    case = self.case

    def copy(parameter, weights):
      parameter.data.copy_(torch.from_numpy(weights))

    shape = (case.vocab, case.width)
    copy(
      self.embedding.weight, draw(role, "embedding", shape, case.width**-0.5)
    )
    for name, size in case.kernels().items():
      weights = draw(role, name, (case.layers, *size), size[0] ** -0.5)
      for layer, kernel in zip(self.layers, weights, strict=True):
        copy(getattr(layer, name).weight, kernel.T)
    if self.value_head is not None:
      weights = draw(role, "value_head", (case.width, 1), case.width**-0.5)
      copy(self.value_head.weight, weights.T)

  def forward(self, tokens):
    """Returns log-probabilities [B, T, V], or values [B, T]."""
    case = self.case
    exponent = torch.arange(0, case.head_dim, 2) / case.head_dim
    angles = torch.arange(case.slots)[:, None] / case.theta**exponent
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = angles.cos(), angles.sin()
    x = self.embedding(tokens)
    for layer in self.layers:
      x = layer(x, cos, sin)
    x = self.final_norm(x)
    if self.value_head is not None:
      return self.value_head(x)[..., 0]
    return F.log_softmax(x @ self.embedding.weight.T, dim=-1)


def make(case: Case):
  """Returns (facts of this side, a function that does a step).

  The function returns the loss before the update.
  """
  networks = {
    role: Decoder(case, role) for role in ("policy", "reference", "critic")
  }
  policy, reference, critic = networks.values()
  optimizers = {
    role: torch.optim.AdamW(
      networks[role].parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0
    )
    for role in ("policy", "critic")
  }
  arrays = {k: torch.from_numpy(v.copy()) for k, v in make_batch(case).items()}
  tokens, targets = arrays["tokens"].long(), arrays["targets"].long()
  mask, rewards = arrays["action_mask"], arrays["rewards"]

  def pick(log_probs):
    return log_probs.gather(-1, targets[..., None])[..., 0]

  def mean(per_token):
    # Over the tokens of a sequence, then over sequences.
    return ((per_token * mask).sum(1) / mask.sum(1)).mean()

  def rest(per_token):
    # The sum from each token to the end of its sequence.
    return (per_token * mask).flip(1).cumsum(1).flip(1)

  def update(role, loss):
    optimizers[role].zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(networks[role].parameters(), CLIP)
    optimizers[role].step()

  returns = rest(rewards)

  def take_step() -> float:
    with torch.no_grad():
      ref_log_probs = reference(tokens)
      ref_logps = pick(ref_log_probs)
      log_ratios = rest(pick(policy(tokens)) - ref_logps)
    values = critic(tokens)
    value_loss = mean((values - returns + BETA * log_ratios) ** 2)
    update("critic", value_loss)
    log_probs = policy(tokens)
    steps = pick(log_probs) - ref_logps
    future = rest(steps.detach()) - steps.detach() * mask
    residual = values.detach() - returns + BETA * (steps + future)
    kl = (log_probs.exp() * (log_probs - ref_log_probs)).sum(-1)
    policy_loss = mean(residual**2) + ALPHA * mean(kl)
    update("policy", policy_loss)
    return float(value_loss.detach() + policy_loss.detach())

  facts = {
    "parameters": sum(p.numel() for p in policy.parameters()),
    "library": f"torch {torch.__version__}",
  }
  return facts, take_step
