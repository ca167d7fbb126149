"""How weights lie while they sample and search.

A training mesh that splits weights over `fsdp` gathers them where they are
used. That is once a pass in a step of training, and once *a token* here:
terabytes for a collection. So weights are laid out anew before the first token.
Every device gets a copy, or shares one with as few devices as have room for it
(`tensor`); the other devices hold other rows (`data`).

They are held in the dtype that they are computed in, which changes nothing that
they say.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import AxisType, Mesh

from oreo_jax import chips, models
from oreo_jax.config import INT8, ConfigError, ModelConfig, SamplingConfig
from oreo_jax.memory import bytes_on_device
from oreo_jax.models import Params
from oreo_jax.sharding import AXES, shardings_of


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where and how networks of one architecture sample.

  Attributes:
    mesh: the devices of the training mesh in the same order, without `fsdp`.
    model: the architecture, computed as sampling does.
  """

  mesh: Mesh
  model: ModelConfig

  def of(self, model: ModelConfig) -> Layout:
    """Returns where a network of another architecture lies beside these."""
    how = ("dtype", "cache_dtype", "weight_dtype", "layers_apart")
    settings = {name: getattr(self.model, name) for name in how}
    return Layout(self.mesh, dataclasses.replace(model, **settings))

  def shapes(self, head: str = "lm") -> Params:
    """Returns the weights as abstract arrays with their shardings.

    Args:
      head: "lm" for a policy, "value" for a value network.
    """
    # As they are before layers are set apart, which devices that share them
    # do not know.
    model = dataclasses.replace(self.model, layers_apart=False)
    axes = models.logical_axes(model, head=head)
    shapes = models.abstract_params(model, head=head)
    dtype = jnp.dtype(self.model.dtype)

    def shape(
      path: Any, x: jax.ShapeDtypeStruct, sharding: Any
    ) -> jax.ShapeDtypeStruct:
      name = path[-1].key
      # What is computed in float32 whatever the dtype of the model is, and
      # whole numbers, stay as they are.
      keeps = name.endswith("scale") or name == "value_head"
      keeps = keeps or not jnp.issubdtype(x.dtype, jnp.floating)
      return jax.ShapeDtypeStruct(
        x.shape, x.dtype if keeps else dtype, sharding=sharding
      )

    shardings = shardings_of(axes, shapes, self.mesh)
    return jax.tree_util.tree_map_with_path(shape, shapes, shardings)

  def place(self, params: Params, *, beside: Params | None = None) -> Params:
    """Returns weights laid out to sample, from any mesh of these devices.

    On a lone CPU every layer has arrays of its own (`models.unstack_layers`).

    Args:
      params: of a policy or a value network, as `models.init` returns them.
      beside: another network of this architecture that is laid out already. The
        first layers, where both are the same, are then held once: see
        `models.share_trunk`.
    """
    if self.model.weight_dtype == INT8:
      # Where they lie: what moves is then int8 as well.
      params = jax.jit(models.quantize_weights)(params)
    head = "value" if "value_head" in params else "lm"
    params = jax.tree.map(_place, params, self.shapes(head))
    if self.model.layers_apart:
      params, _ = models.unstack_layers(params, self.model)
    return params if beside is None else models.share_trunk(params, beside)


def make_layout(
  config: ModelConfig,
  mesh: Mesh,
  settings: SamplingConfig,
  *,
  heads: Sequence[str] = ("lm",),
  memory: float | None = None,
) -> Layout:
  """Chooses how the weights of some networks lie while they sample together.

  Args:
    config: the architecture of all of them.
    mesh: the training mesh.
    settings: what the user wants of it.
    heads: of each network that is held at a time.
    memory: bytes of a device; by default what `chips` knows of it. Where that
      is nothing, as of a CPU, weights are taken to fit.

  Returns:
    The layout. No array has been made yet.

  Raises:
    ConfigError: if the weights do not fit, however they are split, or
      `settings.tensor` does not divide the devices.
  """
  dtype = config.dtype if settings.dtype == "auto" else settings.dtype
  model = dataclasses.replace(
    config,
    dtype=dtype,
    cache_dtype=INT8 if settings.cache == INT8 else config.cache_dtype,
    weight_dtype=INT8 if settings.weights == INT8 else config.weight_dtype,
    layers_apart=_is_lone_cpu(mesh),
  )
  if memory is None:
    memory = _memory_of(mesh)
  if settings.tensor:
    return Layout(_with_tensor(mesh, settings.tensor), model)
  for tensor in _tensor_sizes(config, mesh):
    layout = Layout(_with_tensor(mesh, tensor), model)
    size = sum(bytes_on_device(layout.shapes(head)) for head in heads)
    if size <= memory * settings.weights_share:
      break
  else:
    if size > memory:
      raise ConfigError(
        f"config.sampling.tensor=0: even over {tensor} devices the weights "
        f"that sample take {size / chips.GIB:.1f} GiB of "
        f"{memory / chips.GIB:.1f} a device; take larger devices, or set "
        "--config.sampling.dtype=bfloat16"
      )
  logging.info(
    "sampling: weights over %d devices each, %.2f GiB a device, in %s",
    tensor,
    size / chips.GIB,
    dtype,
  )
  return layout


def _tensor_sizes(config: ModelConfig, mesh: Mesh) -> Iterator[int]:
  """Yields over how many devices a copy may be split, the fewest first.

  That is a power of two, within a slice, which the heads and the columns of the
  MLP divide by. Key and value heads that it does not divide stay whole.
  """
  a_slice = mesh.devices.size // mesh.shape["dcn_data"]
  tensor = 1
  while not (
    a_slice % tensor or config.num_heads % tensor or config.mlp_dim % tensor
  ):
    yield tensor
    tensor *= 2


def _with_tensor(mesh: Mesh, tensor: int) -> Mesh:
  """Returns a mesh of the same devices in the same order, without `fsdp`.

  Arrays move between meshes inside `jit` only where the order is the same.
  """
  slices = mesh.shape["dcn_data"]
  a_slice = mesh.devices.size // slices
  if a_slice % tensor:
    raise ConfigError(
      f"config.sampling.tensor={tensor} does not divide the {a_slice} devices "
      "of the mesh: set --config.sampling.tensor=0 to have it chosen"
    )
  return Mesh(
    mesh.devices.reshape(slices, a_slice // tensor, 1, tensor),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
  )


def _is_lone_cpu(mesh: Mesh) -> bool:
  return mesh.devices.size == 1 and mesh.devices.flat[0].platform == "cpu"


def _memory_of(mesh: Mesh) -> float:
  chip = chips.lookup(mesh.devices.flat[0].device_kind)
  return chip.hbm_bytes if chip else math.inf


def _place(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
  """Returns an array with the dtype and the sharding of an abstract one."""
  # Cast before it moves: what crosses the network is then as small as what
  # arrives. On a single device nothing moves, and nothing is copied.
  x = x.astype(like.dtype)
  if x.sharding == like.sharding:
    return x
  return jax.jit(_same, out_shardings=like.sharding)(x)


def _same(x: jax.Array) -> jax.Array:
  return x
