"""The Llama-family decoder as a Flax NNX module, over packed rows.

Layers are one block with a leading layer dimension, run by `jax.lax.scan`; an
embedding multiplier (MiniCPM, Granite) is a setting of `ModelConfig`. Only
`skeleton.py` builds this class. What runs it over caches is in `cached.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from oreo_jax import memory
from oreo_jax.config import INT8, ModelConfig
from oreo_jax.models import attention
from oreo_jax.models.block import PROJECTED, Block, Norm, Rotary
from oreo_jax.models.cache import layer_of
from oreo_jax.models.embedding import embed
from oreo_jax.models.packed_attention import attend_packed
from oreo_jax.sharding import constrain_batch


def _vocab_scale(config: ModelConfig) -> nnx.Param:
  ones = jnp.ones(config.vocab_size, jnp.float32)
  return nnx.Param(ones, out_sharding=("vocab",))


_REMAT_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(attention.MIXED),
  ),
  "attention": jax.checkpoint_policies.save_only_these_names(
    PROJECTED, attention.MIXED
  ),
}


class Decoder(nnx.Module):
  """Embedding, layers, final norm, and a vocabulary or a value head."""

  def __init__(self, config: ModelConfig, head: str, rngs: nnx.Rngs):
    c = config
    self.config = c
    param_dtype = jnp.dtype(c.param_dtype)
    int8 = c.weight_dtype == INT8
    table_dtype = jnp.dtype(INT8) if int8 else param_dtype
    # Tied embeddings are the output head too: the scale of a head keeps the
    # first logits near unit size, and the first norm undoes it on the way in.
    std = c.init_std or (c.embed_dim**-0.5 if c.tie_embeddings else 1.0)
    table = jax.random.normal(rngs.params(), (c.vocab_size, c.embed_dim))
    self.embedding = nnx.Param(
      (table * std).astype(table_dtype), out_sharding=("vocab", "embed")
    )
    # See `models.quantize`.
    self.embedding_scale = _vocab_scale(c) if int8 else None
    self.layers = nnx.vmap(
      nnx.transform_metadata(
        lambda rngs: Block(c, rngs), in_axes=0, out_axes=0, partition="layers"
      )
    )(rngs.split(c.num_layers))
    self.final_norm = Norm(c.embed_dim, eps=c.norm_eps, param_dtype=param_dtype)
    if head == "value":
      # Zero, as the paper's critic: training starts from V = 0.
      self.value_head = nnx.Param(
        jnp.zeros((c.embed_dim, 1), jnp.float32),
        out_sharding=("embed", "value"),
      )
    elif not c.tie_embeddings:
      std = c.init_std or c.embed_dim**-0.5
      table = jax.random.normal(rngs.params(), (c.embed_dim, c.vocab_size))
      self.head = nnx.Param(
        (table * std).astype(table_dtype), out_sharding=("embed", "vocab")
      )
      self.head_scale = _vocab_scale(c) if int8 else None

  def __call__(
    self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array
  ) -> jax.Array:
    """Runs packed rows; returns the hidden states [B, T, D]."""
    c = self.config
    x = self.embed(tokens)
    frozen = c.num_layers - c.lora_layers if c.lora_layers else 0
    if frozen:
      # Nothing is trained below the adapted layers.
      x = self.layer_range(x, positions, segment_ids, 0, frozen, trained=False)
    x = self.layer_range(x, positions, segment_ids, frozen, c.num_layers)
    return self.final_norm(x)

  def trunk(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    depth: int,
  ) -> jax.Array:
    """Runs the first `depth` layers, frozen; returns the stream [B, T, D]."""
    x = self.embed(tokens)
    return self.layer_range(x, positions, segment_ids, 0, depth, trained=False)

  def above(
    self,
    x: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    depth: int,
  ) -> jax.Array:
    """Goes on from what `trunk` returned; returns what `__call__` does."""
    x = constrain_batch(x.astype(self.config.dtype))
    last = self.config.num_layers
    return self.final_norm(
      self.layer_range(x, positions, segment_ids, depth, last)
    )

  def layer_range(
    self,
    x: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    first: int,
    last: int,
    *,
    trained: bool = True,
  ) -> jax.Array:
    """Runs the layers first, ..., last - 1 over packed rows.

    Args:
      x: [B, T, D], what enters them.
      positions: i32[B, T].
      segment_ids: i32[B, T].
      first: index of the first layer to run.
      last: index after that of the last one.
      trained: whether gradients flow through them.

    Returns:
      [B, T, D].
    """
    c = self.config
    attend = attend_packed(c, segment_ids)
    graph, stacked = nnx.split(self.layers)
    rotary = self.rotary(positions)

    def layer(x: jax.Array, params: nnx.State) -> tuple[jax.Array, None]:
      params = memory.fetch(params)
      return nnx.merge(graph, params)(x, rotary, attend), None

    if c.remat != "none":
      layer = jax.checkpoint(layer, policy=_REMAT_POLICIES[c.remat])
    if not trained:
      # The gradient is stopped where activations and where weights enter the
      # layers, so that JAX makes no tangent, no residual and no backward pass.
      x, stacked = jax.lax.stop_gradient((x, stacked))
      x, _ = jax.lax.scan(
        lambda x, index: layer(x, layer_of(stacked, index)),
        x,
        jnp.arange(first, last, dtype=jnp.int32),
        unroll=c.unroll,
      )
      return x
    if (first, last) != (0, c.num_layers):
      stacked = jax.tree.map(lambda p: p[first:last], stacked)
    x, _ = jax.lax.scan(layer, x, stacked, unroll=c.unroll)
    return x

  def embed(self, tokens: jax.Array) -> jax.Array:
    """Returns what enters the first layer: [B, T, D]."""
    c = self.config
    dtype = jnp.dtype(c.dtype)
    x = embed(self.embedding[...], tokens, dtype)
    if self.embedding_scale is not None:
      x = x * embed(self.embedding_scale[...][:, None], tokens, dtype)
    return constrain_batch(x * c.embed_scale)

  def rotary(self, positions: jax.Array) -> Rotary:
    """Returns cos and sin of the angles at positions i32[B, T]."""
    c = self.config
    return attention.rotary_angles(
      positions,
      head_dim=c.head_dim,
      theta=c.rope_theta,
      scaling=c.rope_scaling,
    )
