"""The functional boundary: models as nested dicts of arrays.

Everything outside `models/` sees a parameter as a leaf of a nested dict and a
model as the functions here, over packed rows, and in `cached.py`, over caches.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from oreo_jax.config import ModelConfig
from oreo_jax.models.apart import stack_layers
from oreo_jax.models.cache import Cache
from oreo_jax.models.lora import few_rows_product, with_leading
from oreo_jax.models.shared_layers import TRUNK, has_trunk, layers_above
from oreo_jax.models.skeleton import Params, module


class Output(NamedTuple):
  """What running a model returns; under `jit` only what is read is computed."""

  hidden: jax.Array  # [B, T, D] after the final norm
  cache: Cache | None = None  # of `prefill` and `apply_branches`
  # [B, T, D], what enters the layer that `prefill` and `apply_branches` were
  # asked for.
  stream: jax.Array | None = None


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
    params: as `init`, `unstack_layers` or `share_trunk` returns them. The
      layers of the second are copied to one stack again, which only many tokens
      are worth.
    tokens: i32[B, T].
    config: the architecture.
    positions: i32[B, T], position in the sequence; 0..T-1 by default, or the
      count within the segment when `segment_ids` is given.
    segment_ids: i32[B, T], 0 = padding, k > 0 = k-th sequence of the row; one
      sequence a row by default.
    start: [B, T, D], what `trunk` said of the same rows; only the layers above
      it are run.
    start_layer: how many layers of `params` that trunk has; 0 for those of
      `layers_above`, which have none of it.

  Returns:
    Output(hidden [B, T, D]).

  Raises:
    ValueError: when shapes do not agree.
  """
  positions, segment_ids = _layout(tokens, positions, segment_ids)
  if has_trunk(params):
    own, own_config = layers_above(params, config)
    depth = config.num_layers - own_config.num_layers
    start = trunk(
      params[TRUNK],
      tokens,
      config,
      depth=depth,
      positions=positions,
      segment_ids=segment_ids,
    )
    params, config, start_layer = own, own_config, 0
  params, config = stack_layers(params, config)
  model = module(params, config)
  if start is None:
    return Output(model(tokens, positions, segment_ids))
  if start.shape != (*tokens.shape, config.embed_dim):
    raise ValueError(
      f"start: expected {(*tokens.shape, config.embed_dim)}, what `trunk` "
      f"says of these tokens, got {start.shape}"
    )
  check_depth("start_layer", start_layer, config, least=0)
  return Output(model.above(start, positions, segment_ids, start_layer))


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
    params: as `init` or `unstack_layers` returns them.
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
  check_depth("depth", depth, config)
  params, config = stack_layers(params, config, depth)
  model = module(params, config)
  return model.trunk(tokens, positions, segment_ids, depth)


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


def check_depth(
  name: str, depth: int, config: ModelConfig, *, least: int = 1
) -> None:
  """Raises a ValueError unless the model has so many layers."""
  if not least <= depth <= config.num_layers:
    raise ValueError(
      f"{name} is {depth}, expected {least}..{config.num_layers}, layers of "
      "the model"
    )


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
  if config.tie_embeddings:
    table = params["embedding"].astype(hidden.dtype)
    rows = hidden.reshape(-1, hidden.shape[-1])
    scores = few_rows_product(rows, table).reshape(*hidden.shape[:-1], -1)
  else:
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


def count_params(params: Params) -> int:
  """Returns the number of weights in a tree of arrays or shapes."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))
