"""Layers apart: how a lone CPU holds weights to decode with them.

A loop over stacked layers takes a slice of every weight and of every cache
before it multiplies. On a CPU that slice is a copy, which a step of decoding
pays for each token. And a CPU packs the second matrix of a product before it
multiplies; where a few rows meet a large weight, that should be the rows. So
here each layer has arrays of its own, and its kernels have what they produce
first. The layers run one after the other, so that there is more to compile.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from oreo_jax.config import ModelConfig
from oreo_jax.models.lora import contracted_dimensions
from oreo_jax.models.skeleton import Params, unstacked


def unstack_layers(
  params: Params, config: ModelConfig
) -> tuple[Params, ModelConfig]:
  """Returns weights for decoding on a CPU, and the config that goes with them.

  `layers` is a tuple, a tree a layer, and so are caches that are made with this
  config. A step of 135 million weights takes 37, 78 and 182 ms for 1, 8 and 32
  rows of stacked layers, and 29, 57 and 141 ms of these (one core, float32,
  texts of 128 tokens).

  `prefill`, `apply_branches` and `apply` take such weights, training does not.
  The arrays are copies.

  Args:
    params: as `init` returns them.
    config: their architecture.
  """
  layers = _unstack(params["layers"])
  return {**params, "layers": layers}, dataclasses.replace(
    config, layers_apart=True
  )


def stack_layers(
  params: Params, config: ModelConfig, count: int | None = None
) -> tuple[Params, ModelConfig]:
  """Returns weights as they were before `unstack_layers`.

  Args:
    params: of it; others stay as they are.
    config: of it.
    count: of them the first so many layers alone.
  """
  layers = unstacked(params)
  if layers is None:
    return params, config
  turned = [_turn(layer, back=True) for layer in layers[:count]]
  stacked = jax.tree.map(lambda *each: jnp.stack(each), *turned)
  return {**params, "layers": stacked}, dataclasses.replace(
    config, layers_apart=False
  )


@jax.jit
def _unstack(layers: Params) -> tuple[Params, ...]:
  count = jax.tree.leaves(layers)[0].shape[0]
  return tuple(
    _turn(jax.tree.map(lambda x, at=i: x[at], layers)) for i in range(count)
  )


def _turn(layer: Params, *, back: bool = False) -> Params:
  """Moves what a kernel contracts behind what it produces, or back."""

  def turn(name: str, kernel: jax.Array) -> jax.Array:
    count = contracted_dimensions(name)
    first, last = tuple(range(count)), tuple(range(-count, 0))
    source, place = (last, first) if back else (first, last)
    return jnp.moveaxis(kernel, source, place)

  return {
    name: {**group, "kernel": turn(name, group["kernel"])}
    if "kernel" in group
    else group
    for name, group in layer.items()
  }
