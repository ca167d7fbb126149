"""The functional boundary: models as nested dicts of arrays.

Everything outside `models/` sees a parameter as a leaf of a nested dict and a
model as the functions below. A module is built once a (config, head) under
`eval_shape`, split into its static graph and its abstract state, and merged
with the caller's arrays at trace time.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from oreo_jax.config import ModelConfig
from oreo_jax.models.cache import Cache, Shared
from oreo_jax.models.decoder import Decoder
from oreo_jax.models.lora import with_leading

Params = dict[str, Any]

HEADS = ("lm", "value")


class Output(NamedTuple):
  """What `apply` returns."""

  hidden: jax.Array  # [B, T, D] after the final norm
  cache: Cache | None  # of `prefill` and `apply_branches`


def init(key: jax.Array, config: ModelConfig, *, head: str = "lm") -> Params:
  """Draws the parameters of a model.

  Args:
    key: a `jax.random.key`.
    config: the architecture; `vocab_size` must be set.
    head: "lm" for a policy, "value" for a value network (its head is zero).

  Returns:
    A nested dict of arrays; layers are stacked on a leading dimension.
  """
  return nnx.to_pure_dict(nnx.state(_build(config, head, key)))


def apply(
  params: Params,
  tokens: jax.Array,
  config: ModelConfig,
  *,
  positions: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  start: jax.Array | None = None,
  start_layer: int = 0,
) -> Output:
  """Runs the layers over packed rows and returns hidden states.

  Attention is causal within a segment.

  Args:
    params: as `init` or `unstack_layers` returns them. The layers of the latter
      are copied to one stack again, which only many tokens are worth.
    tokens: i32[B, T].
    config: the architecture.
    positions: i32[B, T], position in the sequence; 0..T-1 by default, or the
      count within the segment when `segment_ids` is given.
    segment_ids: i32[B, T], 0 = padding, k > 0 = k-th sequence of the row; one
      sequence a row by default.
    start: [B, T, D], what `trunk` said of the same rows; only the layers above
      it are run.
    start_layer: how many layers that trunk has.

  Returns:
    Output(hidden [B, T, D], None).

  Raises:
    ValueError: when shapes do not agree.
  """
  positions, segment_ids = _layout(tokens, positions, segment_ids)
  layers = _unstacked(params)
  if layers is not None:
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *layers)
    params = {**params, "layers": stacked}
  module = _module(params, config)
  if start is None:
    return Output(module(tokens, positions, segment_ids), None)
  if start.shape != (*tokens.shape, config.embed_dim):
    raise ValueError(
      f"start: expected {(*tokens.shape, config.embed_dim)}, what `trunk` "
      f"says of these tokens, got {start.shape}"
    )
  _check_depth("start_layer", start_layer, config)
  return Output(module.above(start, positions, segment_ids, start_layer), None)


def trunk(
  params: Params,
  tokens: jax.Array,
  config: ModelConfig,
  *,
  depth: int,
  positions: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
) -> jax.Array:
  """Runs the first layers of a model over packed rows, frozen.

  Networks that have these layers in common go on from here, each with
  `apply(..., start=states, start_layer=depth)`. No gradient reaches the layers,
  so that they keep nothing for a backward pass.

  Args:
    params: as `init` returns them.
    tokens: i32[B, T].
    config: the architecture.
    depth: how many layers are run, in [1, L].
    positions: i32[B, T], as in `apply`.
    segment_ids: i32[B, T], as in `apply`.

  Returns:
    [B, T, D] in the dtype of the config: what enters layer `depth`. What it
    says of a sequence does not depend on the others in its row.
  """
  positions, segment_ids = _layout(tokens, positions, segment_ids)
  _check_depth("depth", depth, config)
  return _module(params, config).trunk(tokens, positions, segment_ids, depth)


def _layout(
  tokens: jax.Array,
  positions: jax.Array | None,
  segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Returns positions and segment ids, the defaults where there are none."""
  if tokens.ndim != 2:
    raise ValueError(f"tokens: expected [B, T], got {tokens.shape}")
  for name, array in (("positions", positions), ("segment_ids", segment_ids)):
    if array is not None and array.shape != tokens.shape:
      raise ValueError(
        f"{name}: expected the shape of tokens {tokens.shape}, "
        f"got {array.shape}"
      )
  if segment_ids is None:
    segment_ids = jnp.ones_like(tokens)
  if positions is None:
    positions = segment_positions(segment_ids)
  return positions, segment_ids


def _check_depth(name: str, depth: int, config: ModelConfig) -> None:
  if not 1 <= depth <= config.num_layers:
    raise ValueError(
      f"{name} is {depth}, expected 1..{config.num_layers}, layers of the model"
    )


def prefill(
  params: Params, tokens: jax.Array, config: ModelConfig, *, lengths: jax.Array
) -> Output:
  """Reads texts from their start, and keeps their keys and values.

  Args:
    params: as `init` or `unstack_layers` returns them.
    tokens: i32[B, T], left-aligned.
    config: the architecture.
    lengths: i32[B], tokens of each row; what is behind them is padding, and
      what the cache holds of it is rubbish.

  Returns:
    Output(hidden [B, T, D], a cache [L, B, K, T, H]).
  """
  module = _module(params, config)
  return Output(*module.prefill(tokens, lengths, _unstacked(params)))


def apply_branches(
  params: Params,
  tokens: jax.Array,
  config: ModelConfig,
  *,
  shared: tuple[Shared, ...],
  local: Cache,
  slot: jax.Array | int,
  counts: jax.Array | None = None,
) -> Output:
  """Continues R rows of which several share their older text.

  Shared text is read where it lies, once for all its rows, and never copied; a
  row keeps its own tokens in a small cache. See `models.cache` for the levels
  and for the ring.

  Args:
    params: as `init` or `unstack_layers` returns them.
    tokens: i32[R, T], rows that share a text side by side.
    config: the architecture.
    shared: levels of the older text, the oldest first; the number of texts of
      each divides R.
    local: of `init_cache(config, R, M)`, where T is at most M.
    slot: i32[], where `tokens` go in `local`, the same for all rows; T slots
      from there on must be inside it.
    counts: i32[R], how many tokens each row has in `local`, in the slots before
      `slot` and, behind slot 0, at its end; at most M - T. By default `slot`
      for all: rows that started together at slot 0.

  Returns:
    Output(hidden [R, T, D], the updated local cache).
  """
  slot = jnp.asarray(slot, jnp.int32)
  if counts is None:
    counts = jnp.broadcast_to(slot, tokens.shape[:1])
  module = _module(params, config)
  return Output(
    *module.branch(tokens, shared, local, slot, counts, _unstacked(params))
  )


def unstack_layers(params: Params) -> Params:
  """Returns weights for decoding on a CPU: `layers` is a tuple, a tree a layer.

  A loop over stacked layers takes a slice of every weight before it multiplies.
  On a CPU that slice is a copy, which a step of decoding pays for each token:
  for 135 million weights a step of one row takes 37 ms with it and 29 ms
  without, one of 32 rows 172 and 159 (one core, float32). The layers run one
  after the other, so that there is more to compile.

  `prefill`, `apply_branches` and `apply` take such weights, training does not.
  The arrays are copies.
  """
  return {**params, "layers": _each_layer(params["layers"])}


@jax.jit
def _each_layer(layers: Params) -> tuple[Params, ...]:
  count = jax.tree.leaves(layers)[0].shape[0]
  return tuple(
    jax.tree.map(lambda x, at=i: x[at], layers) for i in range(count)
  )


def _unstacked(params: Params) -> tuple[Params, ...] | None:
  """Returns the layers if they are those of `unstack_layers`."""
  layers = params["layers"]
  return layers if isinstance(layers, tuple) else None


def _module(params: Params, config: ModelConfig) -> Decoder:
  head = "value" if "value_head" in params else "lm"
  graph, state = _skeleton(config, head)
  state = jax.tree.map(lambda leaf: leaf, state)
  layers = _unstacked(params)
  if layers is not None:
    # The first stands for all: what runs them gets the others beside.
    params = {**params, "layers": layers[0]}
  nnx.replace_by_pure_dict(state, params)
  return nnx.merge(graph, state)


def segment_positions(segment_ids: jax.Array) -> jax.Array:
  """Returns i32[B, T]: the index of each token within its segment."""
  index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
  previous = jnp.pad(segment_ids, ((0, 0), (1, 0)), constant_values=-1)
  starts = jnp.where(segment_ids != previous[:, :-1], index, 0)
  return index - jax.lax.cummax(starts, axis=1)


def head_matrix(params: Params, config: ModelConfig) -> jax.Array:
  """Returns the output head [D, V] (the transposed embedding when tied)."""
  if config.tie_embeddings:
    return params["embedding"].T
  return params["head"]


def logits(params: Params, hidden: jax.Array, config: ModelConfig) -> jax.Array:
  """Returns float32 logits [..., V] of hidden states [..., D]."""
  scores = jnp.matmul(
    hidden,
    head_matrix(params, config).astype(hidden.dtype),
    preferred_element_type=jnp.float32,
  )
  scale = params.get(
    "embedding_scale" if config.tie_embeddings else "head_scale"
  )
  if scale is not None:
    scores = scores * with_leading(scale, scores.ndim)
  return scores * config.logit_scale


def values(params: Params, hidden: jax.Array) -> jax.Array:
  """Returns float32 values [...] of hidden states [..., D].

  The head is applied in float32: differences between the values of
  neighbouring states are smaller than bfloat16 resolves.
  """
  head = params["value_head"].astype(jnp.float32)
  return jnp.matmul(hidden.astype(jnp.float32), head)[..., 0]


def value_params(params: Params, config: ModelConfig) -> Params:
  """Returns a value network that starts as a copy of a policy's trunk.

  The head is zero (paper A.3). The arrays are copies: policy and value
  network are donated to the same training step.
  """
  trunk = {k: v for k, v in params.items() if k not in ("head", "value_head")}
  copied = jax.tree.map(jnp.copy, trunk)
  head = jnp.zeros((config.embed_dim, 1), jnp.float32)
  return {**copied, "value_head": head}


def abstract_params(config: ModelConfig, *, head: str = "lm") -> Params:
  """Returns the parameters' shapes and dtypes, without making one."""
  return nnx.to_pure_dict(_skeleton(config, head)[1])


def logical_axes(config: ModelConfig, *, head: str = "lm") -> Params:
  """Returns the meaning of every dimension: a tuple of names a leaf."""
  state = jax.tree.map(
    lambda leaf: leaf.replace(leaf.out_sharding),
    _skeleton(config, head)[1],
    is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
  )
  return nnx.to_pure_dict(state)


def count_params(params: Params) -> int:
  """Returns the number of weights in a tree of arrays or shapes."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def _build(config: ModelConfig, head: str, key: jax.Array) -> Decoder:
  if head not in HEADS:
    raise ValueError(f"head: expected one of {HEADS}, got {head!r}")
  if config.vocab_size < 1:
    raise ValueError(
      "config.vocab_size is not set: it comes from the tokenizer, or from "
      "--config.model.vocab_size"
    )
  # Variables carry names of meanings, not of mesh axes: sharding is decided
  # outside, by jit's out_shardings.
  with nnx.use_eager_sharding(False):
    return Decoder(config, head, nnx.Rngs(params=key))


@functools.lru_cache(maxsize=64)
def _skeleton_of(
  settings: tuple[tuple[str, Any], ...], head: str
) -> tuple[nnx.GraphDef, nnx.State]:
  config = ModelConfig(**dict(settings))
  graphs: list[nnx.GraphDef] = []

  def build() -> nnx.State:
    graph, state = nnx.split(_build(config, head, jax.random.key(0)))
    graphs.append(graph)
    return state

  # Not nnx.eval_shape: under a mesh it takes the logical names for mesh axes.
  state = jax.eval_shape(build)
  return graphs[0], state


def _skeleton(config: ModelConfig, head: str) -> tuple[nnx.GraphDef, nnx.State]:
  """Returns the static graph and the abstract state of a model, cached."""
  # A config can be changed in place: the cache is keyed by its values.
  return _skeleton_of(tuple(sorted(dataclasses.asdict(config).items())), head)
