"""The linear map every projection is, with optional low-rank adapters.

LoRA (arXiv 2106.09685): y = x W + (alpha / r) (x A) B, with A drawn as a
weight and B zero, so that training starts at the frozen base. Adapters are
float32 whatever the base is: their small updates would vanish in bfloat16.

The functions below take parameter trees apart and put them together; none of
them copies the base.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from oreo_jax.config import ModelConfig

Params = dict[str, Any]
Axes = tuple[tuple[str, int], ...]  # logical name and size of each dimension

_FEW_ROWS = 64

ADAPTER = ("lora_a", "lora_b")


class Linear(nnx.Module):
  """A tensor contraction of the last dimensions of x with a kernel."""

  def __init__(
    self,
    inputs: Axes,
    outputs: Axes,
    *,
    rngs: nnx.Rngs,
    dtype: jnp.dtype,
    param_dtype: jnp.dtype,
    init_std: float = 0.0,
    init_scale: float = 1.0,
    bias: bool = False,
    int8: bool = False,
    outputs_first: bool = False,
    lora_rank: int = 0,
    lora_alpha: float = 0.0,
  ):
    """Names and sizes of the contracted and of the produced dimensions.

    With `outputs_first` these come first in the kernel.
    """
    in_axes, in_shape = zip(*inputs, strict=True)
    out_axes, out_shape = zip(*outputs, strict=True)
    fan_in = math.prod(in_shape)
    std = (init_std or fan_in**-0.5) * init_scale
    self.contracted = len(in_shape)
    self.dtype = dtype

    def draw(shape: tuple[int, ...], std: float) -> jax.Array:
      return jax.random.normal(rngs.params(), shape, jnp.float32) * std

    self.outputs_first = outputs_first
    shape, axes = in_shape + out_shape, in_axes + out_axes
    if outputs_first:
      shape, axes = out_shape + in_shape, out_axes + in_axes
    self.kernel = nnx.Param(
      draw(shape, std).astype(jnp.int8 if int8 else param_dtype),
      out_sharding=axes,
    )
    # See `models.quantize`.
    self.scale = (
      nnx.Param(jnp.ones(out_shape, jnp.float32), out_sharding=out_axes)
      if int8
      else None
    )
    self.bias = (
      nnx.Param(jnp.zeros(out_shape, param_dtype), out_sharding=out_axes)
      if bias
      else None
    )
    self.lora_scale = lora_alpha / lora_rank if lora_rank else 0.0
    if lora_rank:
      self.lora_a = nnx.LoRAParam(
        draw((*in_shape, lora_rank), fan_in**-0.5),
        out_sharding=(*in_axes, "rank"),
      )
      self.lora_b = nnx.LoRAParam(
        jnp.zeros((lora_rank, *out_shape), jnp.float32),
        out_sharding=("rank", *out_axes),
      )

  def __call__(self, x: jax.Array) -> jax.Array:
    """Contracts the last dimensions of `x`."""
    x = x.astype(self.dtype)
    kernel = self.kernel[...].astype(self.dtype)
    if self.outputs_first:
      y = _contract_last(kernel, x, self.contracted)
    else:
      y = _contract(x, kernel, self.contracted)
    if self.scale is not None:
      y = y * with_leading(self.scale[...].astype(self.dtype), y.ndim)
    if self.lora_scale:
      low = _contract(x, self.lora_a[...].astype(self.dtype), self.contracted)
      high = _contract(low, self.lora_b[...].astype(self.dtype), 1)
      y = y + high * self.lora_scale
    if self.bias is not None:
      y = y + with_leading(self.bias[...].astype(self.dtype), y.ndim)
    return y


def with_leading(array: jax.Array, ndim: int) -> jax.Array:
  """Puts dimensions of size 1 first, until there are `ndim` of them."""
  return jnp.expand_dims(array, tuple(range(ndim - array.ndim)))


def _contract(x: jax.Array, kernel: jax.Array, count: int) -> jax.Array:
  """Contracts the last `count` dimensions of x with the first of the kernel.

  As one product of two matrices: the CPU backend took twice as long for the
  gradient of the same contraction over more dimensions.
  """
  leading, produced = x.shape[:-count], kernel.shape[count:]
  size = math.prod(kernel.shape[:count])
  y = x.reshape(-1, size) @ kernel.reshape(size, -1)
  return y.reshape(*leading, *produced)


def _contract_last(kernel: jax.Array, x: jax.Array, count: int) -> jax.Array:
  """Contracts the last `count` dimensions of the kernel with those of x."""
  leading, produced = x.shape[:-count], kernel.shape[:-count]
  size = math.prod(x.shape[-count:])
  y = few_rows_product(x.reshape(-1, size), kernel.reshape(-1, size))
  return y.reshape(*leading, *produced)


def few_rows_product(x: jax.Array, table: jax.Array) -> jax.Array:
  """Returns x [M, K] times the transpose of a table [N, K], float32.

  A CPU packs the second of two matrices before it multiplies them, so that for
  a few rows the large one should come first.
  """
  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  rows_first = functools.partial(dot, "mk,nk->mn")

  def table_first(x: jax.Array, table: jax.Array) -> jax.Array:
    # Without the barrier the compiler turns the product around again.
    return jax.lax.optimization_barrier(dot("nk,mk->nm", table, x)).T

  if not 1 < x.shape[0] <= _FEW_ROWS:
    return rows_first(x, table)
  return jax.lax.platform_dependent(
    x, table, cpu=table_first, default=rows_first
  )


def add_adapters(key: jax.Array, params: Params, config: ModelConfig) -> Params:
  """Returns the same model with fresh adapters; its outputs are unchanged.

  Args:
    key: a `jax.random.key`.
    params: of a policy or a value network without adapters; shared.
    config: with `lora_rank` and `lora_targets` set.

  Raises:
    ValueError: when the config asks for no adapters, or for more layers of
      them than there are.
  """
  if config.lora_layers > config.num_layers:
    raise ValueError(
      f"config.lora.last_layers={config.lora_layers}: the model has "
      f"{config.num_layers} layers; set --config.lora.last_layers=0 for all"
    )
  if not (config.lora_rank and config.lora_targets):
    raise ValueError(
      "config: lora_rank and lora_targets must be set to add adapters"
    )
  fresh = {}
  for target in config.lora_targets:
    key, drawn = jax.random.split(key)
    kernel = params["layers"][target]["kernel"]
    inputs = contracted_dimensions(target)
    in_shape = kernel.shape[1 : 1 + inputs]
    out_shape = kernel.shape[1 + inputs :]
    layers, rank = kernel.shape[0], config.lora_rank
    a = jax.random.normal(drawn, (layers, *in_shape, rank), jnp.float32)
    fresh[target] = {
      "lora_a": a * math.prod(in_shape) ** -0.5,
      "lora_b": jnp.zeros((layers, rank, *out_shape), jnp.float32),
    }
  return join_adapters(params, {"layers": fresh})


def split_adapters(params: Params) -> tuple[Params, Params]:
  """Returns (base, what is trained: adapters and the value head)."""
  flat = traverse_util.flatten_dict(params)
  trained = {
    path: leaf
    for path, leaf in flat.items()
    if path[-1] in (*ADAPTER, "value_head")
  }
  base = {path: leaf for path, leaf in flat.items() if path not in trained}
  return (
    traverse_util.unflatten_dict(base),
    traverse_util.unflatten_dict(trained),
  )


def join_adapters(base: Params, trained: Params) -> Params:
  """Puts together what `split_adapters` took apart.

  The base may be another head's: under a value head a vocabulary head is left
  out.
  """
  flat = traverse_util.flatten_dict(base)
  flat |= traverse_util.flatten_dict(trained)
  if "value_head" in trained:
    flat.pop(("head",), None)
  return traverse_util.unflatten_dict(flat)


def merge_adapters(
  params: Params, config: ModelConfig, dtype: str | None = None
) -> tuple[Params, ModelConfig]:
  """Adds the adapters into their kernels: W + (alpha / r) A B.

  Args:
    params: with adapters, or without.
    config: the architecture.
    dtype: of the kernels that adapters were added to; None: as they were.

  Returns:
    (params, config) of the same model without adapters.
  """
  layers = {}
  for name, group in params["layers"].items():
    layers[name] = {k: v for k, v in group.items() if k not in ADAPTER}
    if "lora_a" in group:
      kernel, a, b = group["kernel"], group["lora_a"], group["lora_b"]
      rank = a.shape[-1]
      update = jnp.matmul(
        a.reshape(a.shape[0], -1, rank).astype(jnp.float32),
        b.reshape(b.shape[0], rank, -1).astype(jnp.float32),
      )
      update = update.reshape(kernel.shape) * (config.lora_alpha / rank)
      wide = kernel.astype(jnp.float32) + update
      layers[name]["kernel"] = wide.astype(dtype or kernel.dtype)
  return {**params, "layers": layers}, without_adapters(config)


def without_adapters(config: ModelConfig) -> ModelConfig:
  """Returns the architecture of the base alone."""
  return dataclasses.replace(
    config, lora_rank=0, lora_alpha=0.0, lora_targets=(), lora_layers=0
  )


def contracted_dimensions(target: str) -> int:
  """Returns how many dimensions of a projection's kernel are contracted."""
  return 2 if target == "o" else 1
