"""Decoder models as pure functions of nested dicts of arrays."""

from oreo_jax.config import ModelConfig
from oreo_jax.models.apart import stack_layers, unstack_layers
from oreo_jax.models.cache import (
  Cache,
  Shared,
  carried,
  constrain_cache,
  init_cache,
  resting,
)
from oreo_jax.models.cached import apply_branches, prefill
from oreo_jax.models.functional import (
  Output,
  apply,
  count_params,
  head_matrix,
  logits,
  segment_positions,
  trunk,
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
from oreo_jax.models.shared_layers import (
  common_layers,
  has_trunk,
  layers_above,
  share_trunk,
  stands_on,
)
from oreo_jax.models.skeleton import (
  Params,
  abstract_params,
  count_layers,
  init,
  logical_axes,
)

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
  "carried",
  "common_layers",
  "constrain_cache",
  "count_layers",
  "count_params",
  "fold_multipliers",
  "has_trunk",
  "head_matrix",
  "init",
  "init_cache",
  "join_adapters",
  "layers_above",
  "load_hf",
  "logical_axes",
  "logits",
  "merge_adapters",
  "prefill",
  "preset",
  "quantize_weights",
  "resting",
  "save_adapter",
  "save_hf",
  "segment_positions",
  "share_trunk",
  "split_adapters",
  "stack_layers",
  "stands_on",
  "trunk",
  "unstack_layers",
  "value_params",
  "values",
  "without_adapters",
]
