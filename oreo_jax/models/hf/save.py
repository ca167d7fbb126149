"""Checkpoints that `transformers`, and servers that read its format, open.

A directory appears under its name when all of it is written. With several
processes all of them call the functions here, because gathering a parameter
takes every process, and process 0 writes.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from oreo_jax import files, hosts
from oreo_jax.config import ModelConfig
from oreo_jax.hosts import to_host
from oreo_jax.models.hf.families import (
  FAMILIES,
  Key,
  expresses,
  write_config,
)
from oreo_jax.models.hf.files import INDEX, SINGLE
from oreo_jax.models.hf.fold import fold_multipliers
from oreo_jax.models.hf.load import joined_shape
from oreo_jax.models.lora import ADAPTER, merge_adapters
from oreo_jax.models.skeleton import HEADS, Params

DTYPES = ("float32", "bfloat16", "float16")


def save_hf(
  path: str | pathlib.Path,
  params: Params,
  config: ModelConfig,
  *,
  head: str | None = None,
  family: str | None = None,
  tokenizer: Any = None,
  pad_token_id: int | None = None,
  eos_ids: Sequence[int] = (),
  dtype: str | None = None,
  max_shard_bytes: int = 5_000_000_000,
  overwrite: bool = False,
) -> None:
  """Writes a policy or a value network as a Hugging Face directory.

  A value network opens as `AutoModelForSequenceClassification` with one label.
  `transformers` reads it at the last token that is not `pad_token_id`; where
  padding is the end-of-sequence token that is the state before it, which is
  also where the search reads the value of a finished answer.

  Adapters are merged into the weights. The family is the one in the config, or
  the first that fits. `transformers` opens MiniCPM with remote code only: it is
  written as Granite, whose multipliers say the same with the same weights.
  Neither has a classifier there, so their value networks have the multipliers
  folded into the weights and are written as Llama. `family="minicpm"` keeps
  the authors' format.

  Args:
    path: the directory to make.
    params: as `apply` takes them, on any number of devices.
    config: the architecture.
    head: "lm" or "value"; by default what the parameters hold.
    family: a `model_type` to write instead of the config's.
    tokenizer: saved alongside, with its chat template; gives the token ids.
    pad_token_id: by default the tokenizer's.
    eos_ids: tokens that end an answer, for generation_config.json; by default
      the tokenizer's one.
    dtype: of the weights; by default each as it is kept.
    max_shard_bytes: bytes of a safetensors file before the next is begun.
    overwrite: replace a directory that is not empty.

  Raises:
    ValueError: when the directory is not empty, or no family expresses the
      architecture.
  """
  path = pathlib.Path(path)
  # Every process looks before the first parameter is gathered. That gather
  # needs all of them, so process 0 makes the directory only after they looked.
  check_free(path, overwrite)
  held = "value" if "value_head" in params else "lm"
  head = head or held
  if head not in HEADS or head != held:
    raise ValueError(
      f"head: got {head!r}, but the parameters hold a {held!r} head"
    )
  if dtype is not None and dtype not in DTYPES:
    raise ValueError(f"dtype: expected one of {DTYPES}, got {dtype!r}")
  if tokenizer is not None and len(tokenizer) > config.vocab_size:
    raise ValueError(
      f"tokenizer: has {len(tokenizer)} tokens, the model only "
      f"{config.vocab_size}: it is another model's"
    )
  if config.lora_rank:
    params, config = merge_adapters(params, config)
  params, config, family = _fit(params, config, head, family)
  ids = _token_ids(tokenizer, pad_token_id)
  stored = dtype or str(params["embedding"].dtype)
  hf = {**write_config(family, config, head), **ids, "torch_dtype": stored}
  with new_directory(path) as partial:
    _save_tensors(
      partial, params, FAMILIES[family].keys, dtype, max_shard_bytes
    )
    if partial is not None:
      files.write_json(partial / "config.json", hf)
      if head == "lm":
        ends = {"eos_token_id": list(eos_ids)} if len(eos_ids) > 1 else {}
        files.write_json(partial / "generation_config.json", {**ids, **ends})
      if tokenizer is not None:
        tokenizer.save_pretrained(partial)


def save_adapter(
  path: str | pathlib.Path,
  params: Params,
  config: ModelConfig,
  *,
  base: str = "",
  overwrite: bool = False,
) -> None:
  """Writes the adapters alone, as a PEFT directory.

  Args:
    path: the directory to make.
    params: with adapters; a value head goes along.
    config: the architecture, with `lora_rank` set.
    base: name or directory of the model that the adapters belong to.
    overwrite: replace a directory that is not empty.

  Raises:
    ValueError: when there are no adapters.
  """
  path = pathlib.Path(path)
  check_free(path, overwrite)
  if not config.lora_rank:
    raise ValueError("config.lora_rank is 0: there are no adapters to save")
  keys = FAMILIES[config.family or "llama"].keys
  is_value = "value_head" in params
  tensors = {}
  modules = set()
  for target in config.lora_targets:
    key = keys[f"layers.{target}.kernel"]
    modules.add(key.name.split(".")[-2])
    group = params["layers"][target]
    a, b = (to_host(group[name]) for name in ADAPTER)
    for layer in range(a.shape[0]):
      name = "base_model.model." + key.name.format(layer=layer)
      name = name.removesuffix(".weight")
      rank = a.shape[-1]
      tensors[f"{name}.lora_A.weight"] = _contiguous(
        a[layer].reshape(-1, rank).T
      )
      tensors[f"{name}.lora_B.weight"] = _contiguous(
        b[layer].reshape(rank, -1).T
      )
  if is_value:
    name = f"base_model.model.{keys['value_head'].name}"
    tensors[name] = _contiguous(to_host(params["value_head"]).T)
  settings = {
    "peft_type": "LORA",
    "task_type": "SEQ_CLS" if is_value else "CAUSAL_LM",
    "base_model_name_or_path": str(base),
    "r": config.lora_rank,
    "lora_alpha": config.lora_alpha,
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "target_modules": sorted(modules),
    "modules_to_save": ["score"] if is_value else None,
  }
  with new_directory(path) as partial:
    if partial is not None:
      files.write_json(partial / "adapter_config.json", settings)
      write_tensors(partial / "adapter_model.safetensors", tensors)


def check_free(path: pathlib.Path, overwrite: bool) -> None:
  """Raises ValueError when something would be overwritten unasked."""
  taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
  if taken and not overwrite:
    raise ValueError(
      f"{path}: exists and is not empty; give another path or overwrite=True"
    )


@contextlib.contextmanager
def new_directory(path: pathlib.Path) -> Iterator[pathlib.Path | None]:
  """Yields a temporary directory (None off process 0), renamed at the end."""
  if not hosts.is_chief():
    yield None
    return
  with files.whole_folder(path) as partial:
    yield partial


def write_tensors(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
  """Writes a safetensors file with the permissions any new file gets."""
  path.touch()
  mode = path.stat().st_mode
  save_file(tensors, path, {"format": "pt"})
  path.chmod(mode)  # safetensors makes it readable to its owner alone


def _fit(
  params: Params, config: ModelConfig, head: str, family: str | None
) -> tuple[Params, ModelConfig, str]:
  """Chooses the family to write.

  Returns:
    (params, config, family); the multipliers are folded into the weights where
    no family at choice has them.
  """
  if family is not None and family not in FAMILIES:
    raise ValueError(
      f"family: expected one of {tuple(FAMILIES)}, got {family!r}"
    )
  opens = [
    name
    for name, f in FAMILIES.items()
    if f.in_transformers and (head == "lm" or f.has_classifier)
  ]
  if family:
    names = [family]
  else:
    names = [config.family] if config.family in opens else opens
  for name in names:
    if expresses(name, config):
      return params, config, name
  folded, plain = fold_multipliers(params, config)
  for name in names:
    if expresses(name, plain):
      return folded, plain, name
  raise ValueError(
    f"no family of {tuple(names)} has the settings of this config together "
    f"(family={config.family!r}, qkv_bias={config.qkv_bias}, "
    f"qk_norm={config.qk_norm}, sliding_window={config.sliding_window})"
  )


def _token_ids(
  tokenizer: Any, pad_token_id: int | None
) -> dict[str, int | None]:
  names = ("bos_token_id", "eos_token_id", "pad_token_id")
  ids = {name: getattr(tokenizer, name, None) for name in names}
  if pad_token_id is not None:
    ids["pad_token_id"] = pad_token_id
  return ids


def _save_tensors(
  partial: pathlib.Path | None,
  params: Params,
  keys: Mapping[str, Key],
  dtype: str | None,
  max_shard_bytes: int,
) -> None:
  """Gathers parameter by parameter and writes files of at most that size."""
  flat = traverse_util.flatten_dict(params, sep=".")
  numbers = _plan(flat, keys, dtype, max_shard_bytes)
  count = max(numbers.values())
  current = 1
  pending: dict[str, np.ndarray] = {}

  def write(number: int, tensors: dict[str, np.ndarray]) -> None:
    if partial is not None:
      write_tensors(partial / _file(number, count), tensors)

  for leaf, array in flat.items():
    host = to_host(array)
    for name, tensor in _tensors(leaf, host, keys[leaf]):
      if numbers[name] != current:
        write(current, pending)
        current, pending = numbers[name], {}
      pending[name] = tensor.astype(jnp.dtype(dtype)) if dtype else tensor
  write(current, pending)
  if partial is not None and count > 1:
    total = sum(_bytes(array, dtype) for array in flat.values())
    files.write_json(
      partial / INDEX,
      {
        "metadata": {"total_size": total},
        "weight_map": {name: _file(n, count) for name, n in numbers.items()},
      },
    )


def _plan(
  flat: Mapping[str, jax.Array],
  keys: Mapping[str, Key],
  dtype: str | None,
  max_shard_bytes: int,
) -> dict[str, int]:
  """Returns the number of the file that each tensor goes into, from 1."""
  numbers, number, filled = {}, 1, 0
  for leaf, array in flat.items():
    layers = array.shape[0] if leaf.startswith("layers.") else 1
    size = _bytes(array, dtype) // layers
    for layer in range(layers):
      if filled and filled + size > max_shard_bytes:
        number, filled = number + 1, 0
      numbers[keys[leaf].name.format(layer=layer)] = number
      filled += size
  return numbers


def _tensors(
  leaf: str, host: np.ndarray, key: Key
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (name, tensor) of a parameter, in the checkpoint's layout."""
  if not leaf.startswith("layers."):
    yield key.name, _laid_out(host, key)
    return
  for layer, weights in enumerate(host):
    yield key.name.format(layer=layer), _laid_out(weights, key)


def _laid_out(array: np.ndarray, key: Key) -> np.ndarray:
  order = [d for dims in key.layout for d in dims]
  shape = joined_shape(key.layout, array.shape)
  return _contiguous(array.transpose(order).reshape(shape))


def _contiguous(array: np.ndarray) -> np.ndarray:
  # Safetensors writes the buffer as it lies.
  return np.ascontiguousarray(array)


def _bytes(array: jax.Array, dtype: str | None) -> int:
  return array.size * jnp.dtype(dtype or array.dtype).itemsize


def _file(number: int, count: int) -> str:
  return (
    SINGLE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
  )
