"""Hugging Face checkpoints, read straight into their shards.

Tensors are read slice by slice: a process opens the files, but only the bytes
that its own devices hold leave the disk. Safetensors only (or GGUF through
`transformers`' reader): nothing is unpickled and no code of a checkpoint runs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from oreo_jax.config import ModelConfig
from oreo_jax.models.hf.families import FAMILIES, Key, Layout, read_config
from oreo_jax.models.hf.files import (
  SafetensorFiles,
  Tensors,
  gguf_config,
  open_gguf,
  read_json,
)
from oreo_jax.models.skeleton import (
  HEADS,
  Params,
  abstract_params,
  logical_axes,
)
from oreo_jax.sharding import shardings_of

Index = tuple[slice, ...]  # where a block lies in an array

# Buffers that old checkpoints carry and the config determines.
_COMPUTED = ("rotary_emb.inv_freq",)


def load_hf(
  path: str | pathlib.Path,
  *,
  mesh: jax.sharding.Mesh | None = None,
  head: str | None = None,
  dtype: str = "float32",
  param_dtype: str = "float32",
) -> tuple[Params, ModelConfig]:
  """Reads a checkpoint directory into sharded parameters.

  Args:
    path: a directory with config.json and safetensors (one file, or several
      with an index), or a .gguf file (needs torch and gguf).
    mesh: where the parameters go; by default all to one device.
    head: "lm" or "value"; by default what the checkpoint holds. A value network
      read from a language model starts with a head of zeros.
    dtype: compute dtype of the returned config.
    param_dtype: dtype of the weights, whatever the files hold.

  Returns:
    (params, config), as `apply` takes them.

  Raises:
    ValueError: when a file is missing or damaged, or the architecture is not
      one that this package builds; the message names the file.
  """
  path = pathlib.Path(path)
  if path.suffix == ".gguf":
    hf, tensors = open_gguf(path)
    source = path
  else:
    source = path / "config.json"
    hf = read_json(source)
    tensors = SafetensorFiles(path)
  config = _config_of(hf, source)
  config = dataclasses.replace(config, dtype=dtype, param_dtype=param_dtype)
  held = _head_of(hf)
  head = head or held
  if head not in HEADS:
    raise ValueError(f"head: expected one of {HEADS}, got {head!r}")
  if head == "lm" and held == "value":
    raise ValueError(
      f"{source}: holds a value model (a classifier with one label), which "
      'has no vocabulary head; load it with head="value"'
    )
  keys = FAMILIES[config.family].keys
  _check_names(path, tensors, keys, config, head, held)
  return _read_params(path, tensors, keys, config, head, held, mesh), config


def load_hf_config(path: str | pathlib.Path) -> ModelConfig:
  """Reads the architecture alone; `path` as for `load_hf`."""
  path = pathlib.Path(path)
  if path.suffix == ".gguf":
    return _config_of(gguf_config(path), path)
  return _config_of(read_json(path / "config.json"), path / "config.json")


def load_eos_ids(path: str | pathlib.Path) -> tuple[int, ...]:
  """Reads the tokens that end an answer; chat models often have several.

  They are those of generation_config.json, which may name others than
  config.json does, and those of config.json where it names none.
  """
  path = pathlib.Path(path)
  if path.suffix == ".gguf":
    files = [gguf_config(path)]
  else:
    names = ("generation_config.json", "config.json")
    files = [read_json(path / n) for n in names if (path / n).exists()]
  for values in files:
    ids = values.get("eos_token_id")
    if ids is not None:
      return tuple(ids) if isinstance(ids, list) else (ids,)
  return ()


def joined_shape(layout: Layout, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns a tensor's shape from our array's, without the layer dimension."""
  return tuple(math.prod(shape[d] for d in dims) for dims in layout)


def read_block(
  tensors: Tensors,
  name: str,
  layout: Layout,
  shape: tuple[int, ...],
  index: Index,
) -> np.ndarray:
  """Reads a block of one of our arrays from the tensor that holds it.

  Args:
    tensors: the checkpoint.
    name: the tensor.
    layout: which of our dimensions each of its dimensions joins.
    shape: of our array, without the layer dimension.
    index: where the block lies in our array; of joined dimensions only the
      first may be cut.

  Returns:
    The block, in our order of dimensions.
  """
  bounds = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
  slices = []
  for dims in layout:
    # A step along the first of the joined dimensions is `inner` steps along
    # the tensor's.
    inner = math.prod(shape[d] for d in dims[1:])
    start, stop = bounds[dims[0]]
    slices.append(slice(start * inner, stop * inner))
  # The tensor has our dimensions in this order: take the joined ones apart,
  # then bring them into ours.
  order = [d for dims in layout for d in dims]
  sizes = [bounds[d][1] - bounds[d][0] for d in order]
  block = tensors.read(name, tuple(slices)).reshape(sizes)
  return block.transpose(np.argsort(order))


def _read_params(
  path: pathlib.Path,
  tensors: Tensors,
  keys: Mapping[str, Key],
  config: ModelConfig,
  head: str,
  held: str,
  mesh: jax.sharding.Mesh | None,
) -> Params:
  """Reads every parameter into its shards.

  Args:
    path: the checkpoint, for messages.
    tensors: the checkpoint's tensors.
    keys: the family's key table.
    config: the architecture.
    head: the head to return.
    held: the head that the checkpoint holds.
    mesh: where the parameters go; None for one device.

  Returns:
    The parameters.
  """
  shapes = abstract_params(config, head=head)
  if mesh is None:
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: one_device, shapes)
  else:
    shardings = shardings_of(logical_axes(config, head=head), shapes, mesh)
  flat_shapes = traverse_util.flatten_dict(shapes, sep=".")
  flat_shardings = traverse_util.flatten_dict(shardings, sep=".")
  params = {}
  for leaf, abstract in flat_shapes.items():
    key = keys[leaf]
    fresh = leaf == "value_head" and held != "value"
    if not fresh:
      _check_shape(path, tensors, key, leaf, abstract)

    if fresh:
      read = functools.partial(_zeros, abstract)
    else:
      read = functools.partial(_read_leaf, tensors, key, leaf, abstract)
    params[leaf] = jax.make_array_from_callback(
      abstract.shape, flat_shardings[leaf], _once(read)
    )
  return traverse_util.unflatten_dict(params, sep=".")


def _zeros(abstract: jax.ShapeDtypeStruct, index: Index) -> np.ndarray:
  return np.zeros(abstract.shape, abstract.dtype)[index]


def _read_leaf(
  tensors: Tensors,
  key: Key,
  leaf: str,
  abstract: jax.ShapeDtypeStruct,
  index: Index,
) -> np.ndarray:
  """Reads the block at `index` of a parameter, over its layers if stacked."""
  if not _is_stacked(leaf):
    block = read_block(tensors, key.name, key.layout, abstract.shape, index)
    return np.asarray(block, abstract.dtype)
  first, last, _ = index[0].indices(abstract.shape[0])
  # Layer by layer into one array, as both at once would double the memory.
  sizes = [
    len(range(*cut.indices(size)))
    for cut, size in zip(index, abstract.shape, strict=True)
  ]
  blocks = np.empty(sizes, abstract.dtype)
  for layer in range(first, last):
    blocks[layer - first] = read_block(
      tensors,
      key.name.format(layer=layer),
      key.layout,
      abstract.shape[1:],
      index[1:],
    )
  return blocks


def _once(read: Callable[[Index], np.ndarray]) -> Callable[[Any], np.ndarray]:
  """Reads each block once, however many devices hold a copy of it."""
  blocks: dict[tuple, np.ndarray] = {}

  def cached(index: Index) -> np.ndarray:
    # A slice is not hashable.
    name = tuple((s.start, s.stop) for s in index)
    if name not in blocks:
      blocks[name] = read(index)
    return blocks[name]

  return cached


def _is_stacked(leaf: str) -> bool:
  return leaf.startswith("layers.")


def _check_shape(
  path: pathlib.Path,
  tensors: Tensors,
  key: Key,
  leaf: str,
  abstract: jax.ShapeDtypeStruct,
) -> None:
  """Raises ValueError where a tensor is not of the size the config asks for."""
  shape = abstract.shape[1:] if _is_stacked(leaf) else abstract.shape
  want = joined_shape(key.layout, shape)
  for layer in range(abstract.shape[0] if _is_stacked(leaf) else 1):
    name = key.name.format(layer=layer)
    if tensors.shape(name) != want:
      raise ValueError(
        f"{path}: {name} has shape {tensors.shape(name)}, and config.json asks "
        f"for {want}: the two belong to different models"
      )


def _check_names(
  path: pathlib.Path,
  tensors: Tensors,
  keys: Mapping[str, Key],
  config: ModelConfig,
  head: str,
  held: str,
) -> None:
  """Raises ValueError if a tensor is missing, or one would be ignored.

  An ignored tensor (a bias, an extra norm) would change the outputs.
  """
  wanted = traverse_util.flatten_dict(
    abstract_params(config, head=head), sep="."
  )
  if held != "value":
    wanted.pop("value_head", None)
  names = set()
  for leaf, abstract in wanted.items():
    layers = abstract.shape[0] if _is_stacked(leaf) else 1
    names |= {keys[leaf].name.format(layer=i) for i in range(layers)}
  heads = {keys["head"].name, keys["value_head"].name}
  present = set(tensors.names())
  missing = sorted(names - present)
  if missing:
    raise ValueError(
      f"{path}: {len(missing)} tensors that config.json asks for are missing, "
      f"the first is {missing[0]}"
    )
  extra = sorted(
    n for n in present - names - heads if not n.endswith(_COMPUTED)
  )
  if extra:
    raise ValueError(
      f"{path}: {len(extra)} tensors have no place in a {config.family} model, "
      f"the first is {extra[0]}; loading without them would give other outputs"
    )


def _config_of(hf: Mapping[str, Any], source: pathlib.Path) -> ModelConfig:
  try:
    return read_config(hf)
  except ValueError as error:
    raise ValueError(f"{source}: {error}") from None


def _head_of(hf: Mapping[str, Any]) -> str:
  names = hf.get("architectures") or [""]
  return "value" if names[0].endswith("ForSequenceClassification") else "lm"
