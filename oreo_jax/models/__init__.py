"""Decoder models as pure functions of nested dicts of arrays."""

from oreo_jax.config import ModelConfig
from oreo_jax.models.cache import Cache, Shared, constrain_cache, init_cache
from oreo_jax.models.functional import (
  Output,
  Params,
  abstract_params,
  apply,
  apply_branches,
  count_params,
  head_matrix,
  init,
  logical_axes,
  logits,
  prefill,
  segment_positions,
  trunk,
  unstack_layers,
  value_params,
  values,
)
from oreo_jax.models.hf.fold import fold_multipliers
from oreo_jax.models.hf.load import load_hf
from oreo_jax.models.hf.save import save_adapter, save_hf
from oreo_jax.models.lora import (
  add_adapters,
  join_adapters,
  merge_adapters,
  split_adapters,
  without_adapters,
)
from oreo_jax.models.presets import preset
from oreo_jax.models.quantize import quantize_weights

__all__ = [
  "Cache",
  "ModelConfig",
  "Output",
  "Params",
  "Shared",
  "abstract_params",
  "add_adapters",
  "apply",
  "apply_branches",
  "constrain_cache",
  "count_params",
  "fold_multipliers",
  "head_matrix",
  "init",
  "init_cache",
  "join_adapters",
  "load_hf",
  "logical_axes",
  "logits",
  "merge_adapters",
  "prefill",
  "preset",
  "quantize_weights",
  "save_adapter",
  "save_hf",
  "segment_positions",
  "split_adapters",
  "trunk",
  "unstack_layers",
  "value_params",
  "values",
  "without_adapters",
]
