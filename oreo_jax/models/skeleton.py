"""Building modules, and what can be known of a model without its weights.

A module is built once a (config, head) under `eval_shape`, split into its
static graph and its abstract state, and merged with the caller's arrays at
trace time.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx

from oreo_jax.config import ModelConfig
from oreo_jax.models.decoder import Decoder

Params = dict[str, Any]

HEADS = ("lm", "value")


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


def unstacked(params: Params) -> tuple[Params, ...] | None:
  """Returns the layers, a tree each, if they are those of `unstack_layers`."""
  layers = params["layers"]
  return layers if isinstance(layers, tuple) else None


def count_layers(params: Params) -> int:
  """Returns how many layers the weights are of."""
  layers = params["layers"]
  if isinstance(layers, tuple):
    return len(layers)
  return jax.tree.leaves(layers)[0].shape[0]


def module(params: Params, config: ModelConfig) -> Decoder:
  """Returns the module of some weights.

  What they lack stays abstract in it: those of `layers_above` have no
  embedding.
  """
  head = "value" if "value_head" in params else "lm"
  graph, state = _skeleton(config, head)
  state = jax.tree.map(lambda leaf: leaf, state)
  layers = unstacked(params)
  if layers is not None:
    # The first stands for all: what runs them gets the others beside.
    params = {**params, "layers": layers[0]}
  nnx.replace_by_pure_dict(state, params)
  return nnx.merge(graph, state)


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
