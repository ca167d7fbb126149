"""Settings of networks: architecture, critic, adapters, and their mesh."""

import dataclasses
from collections.abc import Iterator

from oreo_jax.settings import (
  Rule,
  Section,
  choice,
  positive,
  setting,
)

DTYPES = ("float32", "bfloat16")
INT8 = "int8"
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")  # may carry adapters
# What a backward pass computes again: nothing, a whole layer, all but its
# products with weights, or all but those of attention, which are small.
REMAT = ("dots", "none", "full", "attention")
ATTENTIONS = ("reference", "blockwise", "cudnn", "splash")
# How a model is computed: it changes what the model says by rounding alone.
HOW_IT_RUNS = ("remat", "attention", "attention_block", "unroll")


@dataclasses.dataclass(unsafe_hash=True)
class ModelConfig(Section):
  """A Llama-family decoder; `presets.py` holds published ones."""

  vocab_size: int = 0  # 0: taken from the tokenizer
  embed_dim: int = positive(64)  # D, width of the residual stream
  num_layers: int = positive(4)  # L
  num_heads: int = positive(4)  # N, query heads
  num_kv_heads: int = positive(4)  # K, key/value heads (K < N: grouped)
  head_dim: int = positive(16)  # H
  mlp_dim: int = positive(256)  # F, width of the gated MLP
  rope_theta: float = positive(10_000.0)  # base of the rotary frequencies
  # Llama 3: (factor, low, high, original length).
  rope_scaling: tuple = setting((), entry=float, above=0)
  norm_eps: float = positive(1e-6)  # epsilon inside every RMSNorm
  qkv_bias: bool = False  # bias on q, k, v (Qwen2)
  qk_norm: bool = False  # RMSNorm on each q and k head (Qwen3)
  tie_embeddings: bool = True  # output head = transposed embedding
  embed_scale: float = positive(1.0)  # MiniCPM scale_emb, Granite likewise
  residual_scale: float = positive(1.0)  # MiniCPM scale_depth/sqrt(L), Granite
  attention_scale: float = 0.0  # 0: 1/sqrt(H); Granite attention_multiplier
  logit_scale: float = positive(1.0)  # MiniCPM dim_model_base/D, Granite
  sliding_window: int = 0  # 0: full causal attention (Mistral v0.1: 4096)
  init_std: float = 0.0  # 0: 1/sqrt(fan_in)
  dtype: str = choice(*DTYPES)  # compute dtype of activations
  # Of weights that are loaded, frozen or saved; what is trained is float32.
  param_dtype: str = choice(*DTYPES)
  remat: str = choice(*REMAT)  # what the backward recomputes
  # How packed rows attend; auto: what suits the backend.
  attention: str = choice("auto", *ATTENTIONS)
  attention_block: int = 0  # tokens a block of it; 0: what suits the backend
  unroll: int = positive(1)  # layers a scan step; num_layers: all (CPU: fast)
  lora_rank: int = 0  # set by critic.kind and lora.policy; 0: no adapters
  lora_alpha: float = 0.0  # updates are scaled by lora_alpha / lora_rank
  # Projections that carry adapters.
  lora_targets: tuple = setting((), entry=str, choices=PROJECTIONS)
  lora_layers: int = 0  # adapters are trained in the last n layers; 0: in all
  # Of keys and values that are kept; set by sampling.cache.
  cache_dtype: str = choice("dtype", INT8)
  # Of projections, embedding and head; set by sampling.weights.
  weight_dtype: str = choice("param_dtype", INT8)
  # Each layer has arrays of its own; set where a lone CPU samples.
  layers_apart: bool = False
  family: str = ""  # Hugging Face model_type of exports; empty: one that fits
  max_positions: int = 0  # longest sequence it was trained for; 0: not stated

  def rules(self) -> Iterator[Rule]:
    """Yields what the shapes must be because of each other."""
    yield Rule(
      self.num_heads % self.num_kv_heads == 0,
      "num_kv_heads",
      f"a divisor of num_heads={self.num_heads}",
    )
    yield Rule(self.head_dim % 2 == 0, "head_dim", "an even number, for RoPE")
    for name, instead in (
      ("cache_dtype", "cache"),
      ("weight_dtype", "weights"),
    ):
      yield Rule(
        getattr(self, name) != INT8,
        name,
        f"left as it is: training knows no int8, set sampling.{instead}",
      )
    yield Rule(
      not self.layers_apart,
      "layers_apart",
      "left as it is: training takes layers in one stack",
    )
    yield Rule(
      len(self.rope_scaling) in (0, 4),
      "rope_scaling",
      "() or (factor, low_freq, high_freq, original_length)",
    )


@dataclasses.dataclass(unsafe_hash=True)
class CriticConfig(Section):
  """The value network."""

  # The trunk: its own, the policy's start under adapters, or the policy's.
  kind: str = choice("separate", "lora", "shared")


@dataclasses.dataclass(unsafe_hash=True)
class LoraConfig(Section):
  """Low-rank adapters (critic.kind=lora, or the policy with `policy`)."""

  policy: bool = False  # train adapters of the policy, not its weights
  rank: int = positive(64)  # r
  alpha: float = positive(64.0)  # updates are scaled by alpha / rank
  targets: tuple = setting(
    PROJECTIONS, entry=str, choices=PROJECTIONS, nonempty=True
  )
  # Adapt the last n layers; 0: all. Those below run once a batch for all the
  # networks, need no backward pass and keep no activations for one.
  last_layers: int = 0


@dataclasses.dataclass(unsafe_hash=True)
class MeshConfig(Section):
  """Sizes of the device mesh axes; one of them may be -1 (the rest)."""

  data: int = setting(-1, low=-1)  # rows of the batch
  fsdp: int = setting(1, low=-1)  # rows of the batch and shards of every weight
  tensor: int = setting(1, low=-1)  # heads, MLP columns, vocabulary
  dcn_data: int = setting(1, low=-1)  # slices joined by the data-centre network

  def rules(self) -> Iterator[Rule]:
    """Yields that sizes are positive, and which may be left open."""
    sizes = dataclasses.asdict(self)
    for axis, size in sizes.items():
      yield Rule(size != 0, axis, "a positive size, or -1 for the rest")
      others = [s for other, s in sizes.items() if other != axis]
      yield Rule(
        size != -1 or -1 not in others,
        axis,
        "a positive size, since another axis is -1 already",
      )


@dataclasses.dataclass(unsafe_hash=True)
class SamplingConfig(Section):
  """How weights lie while they sample and search, whatever the training mesh.

  They are laid out once, before the first token: see `decode.layout`.
  """

  # Devices that share a copy of the weights; 0: as few as have room for it.
  tensor: int = 0
  # Fraction of a device's memory that weights may take. The rest is for caches.
  weights_share: float = setting(0.5, above=0, high=1)
  # What is computed in, and held: weights and caches; auto: model.dtype.
  dtype: str = choice("auto", *DTYPES)
  # Weights, and keys and values in caches, as they are or rounded to int8: see
  # docs/scaling.md for what that costs and saves.
  weights: str = choice("dtype", INT8)
  cache: str = choice("dtype", INT8)


def computed_like(ours: ModelConfig, architecture: ModelConfig) -> ModelConfig:
  """Returns an architecture, computed in the way that `ours` is.

  Args:
    ours: says how: dtypes, attention, what is computed again.
    architecture: says what.
  """
  how = ("dtype", "param_dtype", *HOW_IT_RUNS)
  settings = {name: getattr(ours, name) for name in how}
  return dataclasses.replace(architecture, **settings)
