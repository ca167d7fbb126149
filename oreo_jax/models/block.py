"""One layer of the decoder, the same for every family.

Bias on q/k/v (Qwen2), RMSNorm on q and k (Qwen3) and residual multipliers
(MiniCPM, Granite) are settings of `ModelConfig`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from oreo_jax.config import INT8, ModelConfig
from oreo_jax.models import attention
from oreo_jax.models.attention import Attend
from oreo_jax.models.lora import Axes, Linear, with_leading
from oreo_jax.sharding import constrain_batch

# cos and sin of `attention.rotary_angles`.
Rotary = tuple[jax.Array, jax.Array]

# Names the queries, keys and values for the policies of `remat`.
PROJECTED = "projected"


class Norm(nnx.Module):
  """RMSNorm, computed in float32."""

  def __init__(self, size: int, *, eps: float, param_dtype: jnp.dtype):
    self.scale = nnx.Param(jnp.ones(size, param_dtype), out_sharding=("norm",))
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    """Scales the last dimension of `x` to unit mean square."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(mean_square + self.eps)
    scale = with_leading(self.scale[...].astype(jnp.float32), x.ndim)
    return (wide * scale).astype(x.dtype)


class Block(nnx.Module):
  """Attention and gated MLP, each behind a norm and a residual."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    c = config
    self.config = c
    dtype, param_dtype = jnp.dtype(c.dtype), jnp.dtype(c.param_dtype)

    def linear(
      name: str,
      inputs: Axes,
      outputs: Axes,
      bias: bool = False,
      shrink: float = 1.0,
    ) -> Linear:
      adapted = name in c.lora_targets
      return Linear(
        inputs,
        outputs,
        rngs=rngs,
        dtype=dtype,
        param_dtype=param_dtype,
        init_std=c.init_std,
        init_scale=shrink,
        bias=bias,
        int8=c.weight_dtype == INT8,
        outputs_first=c.layers_apart,
        lora_rank=c.lora_rank if adapted else 0,
        lora_alpha=c.lora_alpha,
      )

    def norm(size: int) -> Norm:
      return Norm(size, eps=c.norm_eps, param_dtype=param_dtype)

    embed = (("embed", c.embed_dim),)
    heads = (("heads", c.num_heads), ("head_dim", c.head_dim))
    kv_heads = (("kv_heads", c.num_kv_heads), ("head_dim", c.head_dim))
    mlp = (("mlp", c.mlp_dim),)
    self.attention_norm = norm(c.embed_dim)
    self.q = linear("q", embed, heads, c.qkv_bias)
    self.k = linear("k", embed, kv_heads, c.qkv_bias)
    self.v = linear("v", embed, kv_heads, c.qkv_bias)
    # The 2 L additions to the residual stream together start out as large as
    # one would alone, so that they do not drown the embedding of the token.
    shrink = (2 * c.num_layers) ** -0.5
    self.o = linear("o", heads, embed, shrink=shrink)
    self.q_norm = norm(c.head_dim) if c.qk_norm else None
    self.k_norm = norm(c.head_dim) if c.qk_norm else None
    self.mlp_norm = norm(c.embed_dim)
    self.gate = linear("gate", embed, mlp)
    self.up = linear("up", embed, mlp)
    self.down = linear("down", mlp, embed, shrink=shrink)

  def __call__(self, x: jax.Array, rotary: Rotary, attend: Attend) -> jax.Array:
    """Runs the block.

    Args:
      x: [B, T, D].
      rotary: cos and sin of `attention.rotary_angles`.
      attend: mixes the values for the queries; it knows masks and caches.

    Returns:
      [B, T, D].
    """
    c = self.config
    y = self.attention_norm(x)
    query, key, value = (
      checkpoint_name(z, PROJECTED) for z in (self.q(y), self.k(y), self.v(y))
    )
    if self.q_norm is not None:
      query, key = self.q_norm(query), self.k_norm(key)
    query, key = (attention.rotate(z, *rotary) for z in (query, key))
    scale = c.attention_scale or c.head_dim**-0.5
    mixed = attend(query, key, value, scale)
    x = x + self.o(mixed) * c.residual_scale
    y = self.mlp_norm(x)
    y = self.down(jax.nn.silu(self.gate(y)) * self.up(y))
    return constrain_batch(x + y * c.residual_scale)
