"""The Llama-family decoder as Flax NNX modules.

One block serves every family: bias on q/k/v (Qwen2), RMSNorm on q and k
(Qwen3), residual and embedding multipliers (MiniCPM, Granite) are settings of
`ModelConfig`. Layers are one block with a leading layer dimension, run by
`jax.lax.scan`. Only `functional.py` builds and calls these classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from oreo_jax import memory
from oreo_jax.config import INT8, ModelConfig
from oreo_jax.models import attention, cache
from oreo_jax.models.attention import Attend
from oreo_jax.models.cache import Cache, Shared
from oreo_jax.models.embedding import embed
from oreo_jax.models.lora import Axes, Linear, with_leading
from oreo_jax.models.packed_attention import attend_packed
from oreo_jax.sharding import constrain_batch

# cos and sin of `attention.rotary_angles`.
Rotary = tuple[jax.Array, jax.Array]


# Names the queries, keys and values for `_REMAT_POLICIES`.
_PROJECTED = "projected"


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
      checkpoint_name(z, _PROJECTED) for z in (self.q(y), self.k(y), self.v(y))
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
    _PROJECTED, attention.MIXED
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
    x = self._embed(tokens)
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
    x = self._embed(tokens)
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
    rotary = self._rotary(positions)

    def layer(x: jax.Array, params: nnx.State) -> tuple[jax.Array, None]:
      params = memory.fetch(params)
      return nnx.merge(graph, params)(x, rotary, attend), None

    if c.remat != "none":
      layer = jax.checkpoint(layer, policy=_REMAT_POLICIES[c.remat])
    if (first, last) != (0, c.num_layers):
      stacked = jax.tree.map(lambda p: p[first:last], stacked)
    if not trained:
      # The gradient is stopped where activations and where weights enter the
      # layers, so that JAX makes no tangent, no residual and no backward pass.
      x, stacked = jax.lax.stop_gradient((x, stacked))
    x, _ = jax.lax.scan(layer, x, stacked, unroll=c.unroll)
    return x

  def prefill(
    self,
    tokens: jax.Array,
    lengths: jax.Array,
    layers: Sequence[dict[str, Any]] | None,
  ) -> tuple[jax.Array, Cache]:
    """Reads rows from their start; see `functional.prefill`.

    Returns the hidden states and a cache of as many slots as there are tokens.
    """
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    inside = (index < lengths[:, None]).astype(jnp.int32)
    packed = attend_packed(self.config, inside)

    def attend(
      unused_carry: None,
      unused_layer: jax.Array,
      unused_shared: None,
      query: jax.Array,
      key: jax.Array,
      value: jax.Array,
      scale: float,
    ) -> tuple[jax.Array, None, Cache]:
      mixed = packed(query, key, value, scale)
      return mixed, None, cache.entries(key, value, self.config)

    positions = jnp.broadcast_to(index, tokens.shape)
    hidden, _, made = self._run_cached(
      tokens, positions, attend, None, layers=layers
    )
    return hidden, made

  def branch(
    self,
    tokens: jax.Array,
    shared: tuple[Shared, ...],
    local: Cache,
    slot: jax.Array,
    counts: jax.Array,
    layers: Sequence[dict[str, Any]] | None,
  ) -> tuple[jax.Array, Cache]:
    """Continues branches of shared texts; see `functional.apply_branches`.

    Returns the hidden states and the new local cache; the rest is only read.
    """
    positions, masks = cache.branch_layout(
      shared,
      local.keys.shape[3],
      slot=slot,
      counts=counts,
      length=tokens.shape[1],
      sliding_window=self.config.sliding_window,
    )

    def attend(
      local: Cache,
      layer: jax.Array,
      levels: tuple[Cache, ...],
      query: jax.Array,
      key: jax.Array,
      value: jax.Array,
      scale: float,
    ) -> tuple[jax.Array, Cache, None]:
      new = cache.entries(key, value, self.config)
      local = cache.put(local, new, layer, slot)
      mixed = attention.attend_levels(
        query, [*levels, cache.layer_of(local, layer)], masks, scale=scale
      )
      return mixed, local, None

    levels = tuple(level.cache for level in shared)
    hidden, local, _ = self._run_cached(
      tokens, positions, attend, local, levels, layers=layers
    )
    return hidden, local

  def _run_cached(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Callable[..., tuple[jax.Array, Any, Any]],
    carry: Any,
    shared: Any = None,
    *,
    layers: Sequence[dict[str, Any]] | None = None,
  ) -> tuple[jax.Array, Any, Any]:
    """Runs the layers over caches, in a scan or one after the other.

    A cache that is written is carried, not scanned over: the loop then updates
    it in place instead of stacking a new one. What is only read (`shared`) is
    scanned, and so is what each layer makes anew.

    Args:
      tokens: i32[B, T].
      positions: i32[B, T].
      attend: (carry, layer's index, layer's slice of `shared`, and what an
        `Attend` takes) -> (mixed values, the carry, what the layer made).
      carry: a tree of arrays that every layer may write.
      shared: a tree of arrays with a leading layer dimension.
      layers: weights of `unstack_layers`; None: the stacked ones.

    Returns:
      The hidden states [B, T, D], the carry, and what the layers made, stacked.
    """
    graph, stacked = nnx.split(self.layers)
    rotary = self._rotary(positions)

    def layer(
      carry: tuple[jax.Array, Any],
      inputs: tuple[nnx.State, jax.Array, Any],
    ) -> tuple[tuple[jax.Array, Any], Any]:
      x, written = carry
      params, index, layer_shared = inputs
      made = None

      # A block hands on the mixed values alone, so what else there is leaves it
      # by this side door; the block calls it once.
      def attend_and_write(
        query: jax.Array, key: jax.Array, value: jax.Array, scale: float
      ) -> jax.Array:
        nonlocal written, made
        mixed, written, made = attend(
          written, index, layer_shared, query, key, value, scale
        )
        return mixed

      x = nnx.merge(graph, params)(x, rotary, attend_and_write)
      return (x, written), made

    start = (self._embed(tokens), carry)
    if layers is None:
      index = jnp.arange(self.config.num_layers, dtype=jnp.int32)
      (x, carry), made = jax.lax.scan(
        layer, start, (stacked, index, shared), unroll=self.config.unroll
      )
      return self.final_norm(x), carry, made
    each_made = []
    for number, params in enumerate(layers):
      state = jax.tree.map(lambda leaf: leaf, stacked)
      nnx.replace_by_pure_dict(state, params)
      layer_shared = jax.tree.map(lambda x, at=number: x[at], shared)
      start, made = layer(start, (state, jnp.int32(number), layer_shared))
      each_made.append(made)
    x, carry = start
    made = jax.tree.map(lambda *xs: jnp.stack(xs), *each_made)
    return self.final_norm(x), carry, made

  def _embed(self, tokens: jax.Array) -> jax.Array:
    c = self.config
    dtype = jnp.dtype(c.dtype)
    x = embed(self.embedding[...], tokens, dtype)
    if self.embedding_scale is not None:
      x = x * embed(self.embedding_scale[...][:, None], tokens, dtype)
    return constrain_batch(x * c.embed_scale)

  def _rotary(self, positions: jax.Array) -> Rotary:
    c = self.config
    return attention.rotary_angles(
      positions,
      head_dim=c.head_dim,
      theta=c.rope_theta,
      scaling=c.rope_scaling,
    )
