"""Networks that have their first layers in common: one copy of these weights.

Networks that were adapted from one base in the last layers alone (LoRA with
`lora.last_layers`) are the base below them. One of them keeps all its weights;
another keeps what lies above, and the first one's arrays stand in for the rest:

  {"trunk": {"embedding", "layers"}, "layers", "final_norm", "value_head"}

where "layers" has its own last layers and the trunk all those of the other
network, of which it reads the first.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from oreo_jax.config import ModelConfig
from oreo_jax.models.skeleton import Params, count_layers

TRUNK = "trunk"
_EMBEDDING = ("embedding", "embedding_scale")


def common_layers(params: Params, other: Params) -> int:
  """Returns how many first layers of two networks are the same, bit for bit.

  0 where they read tokens through another embedding, or are of other shapes.

  Args:
    params: as `init` or `unstack_layers` returns them.
    other: the same, of another network on the same devices.
  """
  ours, theirs = _beneath(params), _beneath(other)
  shapes = [
    {path: (x.shape, x.dtype) for path, x in _leaves(tree).items()}
    for tree in (ours, theirs)
  ]
  return int(_count_common(ours, theirs)) if shapes[0] == shapes[1] else 0


@jax.jit
def _count_common(ours: Params, theirs: Params) -> jax.Array:
  def same(x: Any, y: Any, keep: int = 0) -> jax.Array:
    """Compares two trees, but for the first `keep` dimensions of arrays."""
    alike = jax.tree.map(
      lambda x, y: jnp.all(x == y, axis=tuple(range(keep, x.ndim))), x, y
    )
    return functools.reduce(jnp.logical_and, jax.tree.leaves(alike))

  layers = ours["layers"], theirs["layers"]
  if isinstance(layers[0], tuple):
    alike = jnp.stack([same(x, y) for x, y in zip(*layers, strict=True)])
  else:
    alike = same(*layers, keep=1)
  for name in _EMBEDDING:
    if name in ours:
      alike &= same(ours[name], theirs[name])
  # The first layer that differs ends it.
  return jnp.sum(jnp.cumprod(alike.astype(jnp.int32)))


def share_trunk(params: Params, other: Params) -> Params:
  """Returns a network that reads another's arrays where both are the same.

  It keeps its own layers above the common ones, one at least. Where layers are
  stacked these are copies, so that the memory of `params` is free once they are
  dropped.

  Args:
    params: as `init` or `unstack_layers` returns them.
    other: the same, of a network of the same settings on the same devices.

  Returns:
    Weights for `apply`, or `params` where no layer is the same. `prefill` and
    `apply_branches` take `layers_above` of them.
  """
  depth = min(common_layers(params, other), count_layers(params) - 1)
  if not depth:
    return params
  own = {name: x for name, x in params.items() if name not in _EMBEDDING}
  layers = params["layers"]
  if isinstance(layers, tuple):
    own["layers"] = layers[depth:]
  else:
    own["layers"] = jax.tree.map(lambda x: x[depth:], layers)
  return {**own, TRUNK: _beneath(other)}


def layers_above(
  params: Params, config: ModelConfig
) -> tuple[Params, ModelConfig]:
  """Returns the own weights of a network on a trunk, and their architecture.

  Args:
    params: of `share_trunk`.
    config: of the whole network.

  Returns:
    (params, config) of the layers above the trunk alone. They start from the
    stream that the trunk says, and caches are of these layers.
  """
  own = {name: x for name, x in params.items() if name != TRUNK}
  count = count_layers(own)
  return own, dataclasses.replace(
    config, num_layers=count, lora_layers=min(config.lora_layers, count)
  )


def has_trunk(params: Params) -> bool:
  """Returns whether these weights are of `share_trunk`."""
  return TRUNK in params


def stands_on(params: Params, other: Params) -> bool:
  """Returns whether the trunk of a network is another's very arrays."""
  ours, theirs = _leaves(params[TRUNK]), _leaves(_beneath(other))
  return ours.keys() == theirs.keys() and all(
    leaf is theirs[path] for path, leaf in ours.items()
  )


def _beneath(params: Params) -> Params:
  return {
    name: x for name, x in params.items() if name in (*_EMBEDDING, "layers")
  }


def _leaves(tree: Params) -> dict[Any, jax.Array]:
  """Returns the arrays of a tree by their paths."""
  return dict(jax.tree_util.tree_leaves_with_path(tree))
