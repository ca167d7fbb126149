"""The files of checkpoints: safetensors, read block by block, and GGUF.

Nothing is unpickled and no code of a checkpoint runs.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Tensors(Protocol):
  """Named arrays of which a block can be read alone."""

  def names(self) -> Iterable[str]:
    """Returns the names of all tensors."""

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of a tensor."""

  def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """Returns a block of a tensor."""


class SafetensorFiles:
  """The tensors of a checkpoint directory, opened when first asked for."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._files: dict[str, Any] = {}
    index = path / INDEX
    if index.exists():
      self._where = dict(read_json(index)["weight_map"])
      for name in sorted(set(self._where.values())):
        if not (path / name).exists():
          raise ValueError(
            f"{path / name}: missing, though {INDEX} lists it; download the "
            "checkpoint again"
          )
    elif (path / SINGLE).exists():
      self._where = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
    else:
      raise ValueError(
        f"{path}: has neither {SINGLE} nor {INDEX}; other formats than "
        "safetensors are not read (pickles run code): convert them first"
      )

  def names(self) -> Iterable[str]:
    """Returns the names of all tensors."""
    return self._where.keys()

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of a tensor."""
    return tuple(self._slice(name).get_shape())

  def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """Returns a block of a tensor."""
    return self._slice(name)[index]

  def _slice(self, name: str) -> Any:
    file = self._where[name]
    try:
      return self._open(file).get_slice(name)
    except SafetensorError as error:
      raise ValueError(
        f"{self._path / file}: {error}, though {INDEX} says it is there"
      ) from None

  def _open(self, file: str) -> Any:
    if file not in self._files:
      try:
        self._files[file] = safe_open(self._path / file, framework="numpy")
      except SafetensorError as error:
        raise ValueError(
          f"{self._path / file}: damaged or cut short ({error}); download or "
          "write it again"
        ) from None
    return self._files[file]


class ArrayTensors:
  """Tensors that are in memory already."""

  def __init__(self, arrays: Mapping[str, np.ndarray]):
    self._arrays = arrays

  def names(self) -> Iterable[str]:
    """Returns the names of all tensors."""
    return self._arrays.keys()

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of a tensor."""
    return self._arrays[name].shape

  def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """Returns a block of a tensor."""
    return self._arrays[name][index]


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Returns a checkpoint's JSON file; a ValueError names a bad one."""
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise ValueError(
      f"{path}: missing; expected a Hugging Face checkpoint directory"
    ) from None
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"{path}: not valid JSON ({error})") from None


def _check_gguf(path: pathlib.Path) -> None:
  try:
    import gguf  # noqa: F401
    import torch  # noqa: F401
  except ImportError as error:
    raise ValueError(
      f"{path}: reading GGUF takes `pip install torch gguf` ({error})"
    ) from None
  if not path.exists():
    raise ValueError(f"{path}: missing")


def gguf_config(path: pathlib.Path) -> dict[str, Any]:
  """Reads the metadata alone."""
  _check_gguf(path)
  from transformers import AutoConfig

  config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
  return _without_quantization(config.to_dict())


def open_gguf(path: pathlib.Path) -> tuple[dict[str, Any], Tensors]:
  """Returns the config and the tensors of a GGUF file (needs torch, gguf)."""
  _check_gguf(path)
  import torch
  from transformers import AutoModelForCausalLM

  model = AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  )
  state = {k: v.numpy() for k, v in model.state_dict().items()}
  return _without_quantization(model.config.to_dict()), ArrayTensors(state)


def _without_quantization(hf: dict[str, Any]) -> dict[str, Any]:
  # The weights are dequantised when they are read. GGUF keeps 1e-5 as a
  # float32, whose digits beyond the sixth are noise.
  hf = {**hf, "quantization_config": None}
  hf["rms_norm_eps"] = float(f"{hf['rms_norm_eps']:.6g}")
  return hf
