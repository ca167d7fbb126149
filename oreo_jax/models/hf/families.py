"""What each Hugging Face family calls its tensors and its settings.

A key table maps a parameter's path to the tensor's name and its layout: the
tensor's dimensions, each given as the dimensions of our array (without the
layer dimension) that it joins. `((1, 2), (0,))` reads: first dimension = heads
x head_dim, second = embedding. One table serves import and export.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from oreo_jax.config import ModelConfig

Layout = tuple[tuple[int, ...], ...]


class Key(NamedTuple):
  """One kind of tensor of a checkpoint."""

  name: str  # with {layer} for the tensors of a layer
  layout: Layout  # for each of its dimensions, ours that it joins


_VECTOR: Layout = ((0,),)
_HEADS_VECTOR: Layout = ((0, 1),)
_TABLE: Layout = ((0,), (1,))
_TRANSPOSED: Layout = ((1,), (0,))
_TO_HEADS: Layout = ((1, 2), (0,))
_FROM_HEADS: Layout = ((2,), (0, 1))

_BLOCK = "model.layers.{layer}."
_LLAMA = {
  "embedding": Key("model.embed_tokens.weight", _TABLE),
  "layers.attention_norm.scale": Key(
    _BLOCK + "input_layernorm.weight", _VECTOR
  ),
  "layers.q.kernel": Key(_BLOCK + "self_attn.q_proj.weight", _TO_HEADS),
  "layers.k.kernel": Key(_BLOCK + "self_attn.k_proj.weight", _TO_HEADS),
  "layers.v.kernel": Key(_BLOCK + "self_attn.v_proj.weight", _TO_HEADS),
  "layers.o.kernel": Key(_BLOCK + "self_attn.o_proj.weight", _FROM_HEADS),
  "layers.mlp_norm.scale": Key(
    _BLOCK + "post_attention_layernorm.weight", _VECTOR
  ),
  "layers.gate.kernel": Key(_BLOCK + "mlp.gate_proj.weight", _TRANSPOSED),
  "layers.up.kernel": Key(_BLOCK + "mlp.up_proj.weight", _TRANSPOSED),
  "layers.down.kernel": Key(_BLOCK + "mlp.down_proj.weight", _TRANSPOSED),
  "final_norm.scale": Key("model.norm.weight", _VECTOR),
  "head": Key("lm_head.weight", _TRANSPOSED),
  "value_head": Key("score.weight", _TRANSPOSED),
}
_QKV_BIAS = {
  f"layers.{name}.bias": Key(
    f"{_BLOCK}self_attn.{name}_proj.bias", _HEADS_VECTOR
  )
  for name in "qkv"
}
_QK_NORM = {
  f"layers.{name}_norm.scale": Key(
    f"{_BLOCK}self_attn.{name}_norm.weight", _VECTOR
  )
  for name in "qk"
}


class Family(NamedTuple):
  """How one `model_type` differs from plain Llama."""

  architecture: str  # prefix of the class names
  keys: Mapping[str, Key]
  read: Callable[[Mapping[str, Any]], dict[str, Any]]  # own settings -> ours
  write: Callable[[ModelConfig], dict[str, Any]]  # and back
  needs: tuple[str, ...] = ()  # settings of ModelConfig it always has
  allows: tuple[str, ...] = ()  # settings of ModelConfig it may have
  defaults: Mapping[str, Any] = {}  # of config.json, where they are not Llama's
  in_transformers: bool = True  # False: opens with the authors' code only
  has_classifier: bool = True  # transformers has a ...ForSequenceClassification


def _nothing(_: Any) -> dict[str, Any]:
  return {}


def _read_mistral(hf: Mapping[str, Any]) -> dict[str, Any]:
  return {"sliding_window": hf.get("sliding_window", 4096) or 0}


def _write_mistral(config: ModelConfig) -> dict[str, Any]:
  return {"sliding_window": config.sliding_window or None}


def _read_qwen(hf: Mapping[str, Any]) -> dict[str, Any]:
  layers = hf["num_hidden_layers"]
  window = hf.get("sliding_window", 4096) or 0
  if not hf.get("use_sliding_window", False):
    window = 0
  kinds = hf.get("layer_types")
  if kinds is None:
    first = hf.get("max_window_layers", 28)
    kinds = ["sliding_attention" if i >= first else "" for i in range(layers)]
  sliding = [kind == "sliding_attention" for kind in kinds]
  if window and any(sliding) and not all(sliding):
    raise ValueError(
      "sliding_window on some layers only is not supported (layer_types, "
      "max_window_layers): all or none"
    )
  return {"sliding_window": window if all(sliding) else 0}


def _write_qwen(config: ModelConfig) -> dict[str, Any]:
  window = config.sliding_window
  return {
    "use_sliding_window": bool(window),
    "sliding_window": window or None,
    "max_window_layers": 0 if window else config.num_layers,
  }


def _read_granite(hf: Mapping[str, Any]) -> dict[str, Any]:
  return {
    "embed_scale": float(hf.get("embedding_multiplier", 1.0)),
    "residual_scale": float(hf.get("residual_multiplier", 1.0)),
    "attention_scale": float(hf.get("attention_multiplier", 1.0)),
    "logit_scale": 1.0 / hf.get("logits_scaling", 1.0),
  }


def _write_granite(config: ModelConfig) -> dict[str, Any]:
  return {
    "embedding_multiplier": config.embed_scale,
    "residual_multiplier": config.residual_scale,
    "attention_multiplier": config.attention_scale or config.head_dim**-0.5,
    "logits_scaling": _tidy(1.0 / config.logit_scale),
  }


def _read_minicpm(hf: Mapping[str, Any]) -> dict[str, Any]:
  # All three are 1 where config.json has no such key (the defaults of the
  # authors' configuration_minicpm.py), and the divisions take place all the
  # same: a scale of 1 is not "no scale".
  return {
    "embed_scale": float(hf.get("scale_emb", 1)),
    "residual_scale": hf.get("scale_depth", 1)
    / math.sqrt(hf["num_hidden_layers"]),
    "logit_scale": hf.get("dim_model_base", 1) / hf["hidden_size"],
  }


def _write_minicpm(config: ModelConfig) -> dict[str, Any]:
  return {
    "scale_emb": config.embed_scale,
    "scale_depth": _tidy(config.residual_scale * math.sqrt(config.num_layers)),
    "dim_model_base": _tidy(config.logit_scale * config.embed_dim),
  }


def _tidy(number: float) -> float:
  """Rounds off the last bits of a product, so that an import undoes it."""
  return round(number, 12)


# In the order in which a config without a family is matched.
FAMILIES: Mapping[str, Family] = {
  "llama": Family("Llama", _LLAMA, _nothing, _nothing),
  "qwen2": Family(
    "Qwen2",
    _LLAMA | _QKV_BIAS,
    _read_qwen,
    _write_qwen,
    needs=("qkv_bias",),
    allows=("sliding_window",),
  ),
  "qwen3": Family(
    "Qwen3",
    _LLAMA | _QK_NORM,
    _read_qwen,
    _write_qwen,
    needs=("qk_norm",),
    allows=("sliding_window",),
    defaults={"head_dim": 128},
  ),
  "mistral": Family(
    "Mistral",
    _LLAMA,
    _read_mistral,
    _write_mistral,
    allows=("sliding_window",),
    defaults={"num_key_value_heads": 8},
  ),
  "granite": Family(
    "Granite",
    _LLAMA,
    _read_granite,
    _write_granite,
    allows=("embed_scale", "residual_scale", "attention_scale", "logit_scale"),
    has_classifier=False,
  ),
  "minicpm": Family(
    "MiniCPM",
    _LLAMA,
    _read_minicpm,
    _write_minicpm,
    allows=("embed_scale", "residual_scale", "logit_scale"),
    defaults={"tie_word_embeddings": True},
    in_transformers=False,
  ),
}

# Settings in which families differ, with the value that means "plain Llama".
_PLAIN = {
  field.name: field.default
  for field in dataclasses.fields(ModelConfig)
  if field.name in {n for f in FAMILIES.values() for n in f.needs + f.allows}
}


def expresses(name: str, config: ModelConfig) -> bool:
  """Returns whether a family can hold this architecture without a change."""
  family = FAMILIES[name]
  special = {k for k, plain in _PLAIN.items() if getattr(config, k) != plain}
  if name == "minicpm" and (
    config.head_dim * config.num_heads != config.embed_dim
  ):
    return False  # Its config.json has no head_dim.
  return set(family.needs) <= special <= {*family.needs, *family.allows}


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
  """Returns the architecture that a config.json describes.

  Args:
    hf: the parsed config.json, of transformers 4 or 5.

  Raises:
    ValueError: on a family or a setting that this package does not build.
  """
  name = str(hf.get("model_type"))
  if name not in FAMILIES:
    raise ValueError(
      f"model_type={name!r} is not supported; known are " + ", ".join(FAMILIES)
    )
  family = FAMILIES[name]
  hf = {**family.defaults, **hf}
  for key in ("attention_bias", "mlp_bias", "quantization_config"):
    if hf.get(key):
      raise ValueError(f"{key}={hf[key]!r} is not supported")
  if hf.get("hidden_act", "silu") != "silu":
    raise ValueError(f"hidden_act={hf['hidden_act']!r} is not supported: silu")
  try:
    width, heads = hf["hidden_size"], hf["num_attention_heads"]
    needed: dict[str, Any] = dict.fromkeys(family.needs, True)
    return ModelConfig(
      family=name,
      vocab_size=hf["vocab_size"],
      embed_dim=width,
      num_layers=hf["num_hidden_layers"],
      num_heads=heads,
      num_kv_heads=hf.get("num_key_value_heads") or heads,
      head_dim=hf.get("head_dim") or width // heads,
      mlp_dim=hf["intermediate_size"],
      norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
      tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
      max_positions=hf.get("max_position_embeddings") or 0,
      **_read_rope(hf),
      **needed,
      **family.read(hf),
    )
  except KeyError as error:
    raise ValueError(f"the key {error} is missing") from None


def write_config(name: str, config: ModelConfig, head: str) -> dict[str, Any]:
  """Returns the config.json of an architecture, token ids left out.

  Args:
    name: the family; it must express the config.
    config: the architecture.
    head: "lm" or "value".
  """
  family = FAMILIES[name]
  kind = "ForSequenceClassification" if head == "value" else "ForCausalLM"
  hf = {
    "architectures": [family.architecture + kind],
    "model_type": name,
    "vocab_size": config.vocab_size,
    "hidden_size": config.embed_dim,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "intermediate_size": config.mlp_dim,
    "hidden_act": "silu",
    "rms_norm_eps": config.norm_eps,
    "rope_theta": config.rope_theta,
    "rope_scaling": _write_rope_scaling(config.rope_scaling),
    "tie_word_embeddings": config.tie_embeddings,
    "max_position_embeddings": config.max_positions or 2048,
    **family.write(config),
  }
  if head == "value":
    hf |= {
      "id2label": {"0": "value"},
      "label2id": {"value": 0},
      "problem_type": "regression",
    }
  return hf


def _read_rope(hf: Mapping[str, Any]) -> dict[str, Any]:
  # transformers 5 keeps all of it in rope_parameters, 4 in two keys.
  rope = {
    "rope_theta": hf.get("rope_theta", 10_000.0),
    **(hf.get("rope_scaling") or {}),
    **(hf.get("rope_parameters") or {}),
  }
  kind = rope.get("rope_type", rope.get("type", "default"))
  scaling: tuple[float, ...] = ()
  if kind == "llama3":
    scaling = (
      float(rope["factor"]),
      float(rope["low_freq_factor"]),
      float(rope["high_freq_factor"]),
      int(rope["original_max_position_embeddings"]),
    )
  elif kind != "default":
    raise ValueError(
      f"rope_type={kind!r} is not supported; known are default, llama3"
    )
  if rope.get("partial_rotary_factor", 1.0) != 1.0:
    raise ValueError("partial_rotary_factor is not supported: whole heads only")
  return {"rope_theta": float(rope["rope_theta"]), "rope_scaling": scaling}


def _write_rope_scaling(scaling: tuple[float, ...]) -> dict[str, Any] | None:
  if not scaling:
    return None
  factor, low, high, original = scaling
  return {
    "rope_type": "llama3",
    "factor": factor,
    "low_freq_factor": low,
    "high_freq_factor": high,
    "original_max_position_embeddings": original,
  }
