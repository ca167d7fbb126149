"""Multipliers folded into the weights: MiniCPM and Granite as plain Llama.

The families scale activations: x E s_e at the input, x + s_r f(x) at every
residual, q.k s_a in attention and s_l at the logits. Each factor stands next
to a linear map, which can hold it instead. The model stays the same function,
up to the rounding of the scaled weights (half a unit in the last place of the
dtype they are stored in), and every server of Llama models reads it.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from oreo_jax.config import ModelConfig
from oreo_jax.models.lora import Params


def fold_multipliers(
  params: Params, config: ModelConfig
) -> tuple[Params, ModelConfig]:
  """Returns the same function as (params, config) with all multipliers 1.

  A tied head is untied when input and output are scaled differently.

  Args:
    params: of a policy or a value network, without adapters.
    config: the architecture.
  """
  plain = dataclasses.replace(
    config,
    embed_scale=1.0,
    residual_scale=1.0,
    attention_scale=0.0,
    logit_scale=1.0,
    family="",
  )
  params = {**params, "layers": dict(params["layers"])}
  layers = params["layers"]

  def scale_layers(name: str, leaf: str, factor: float) -> None:
    layers[name] = {
      **layers[name],
      leaf: _scaled(layers[name][leaf], factor),
    }

  if config.residual_scale != 1.0:
    scale_layers("o", "kernel", config.residual_scale)
    scale_layers("down", "kernel", config.residual_scale)
  if config.attention_scale:
    factor = config.attention_scale * math.sqrt(config.head_dim)
    if config.qk_norm:
      # The norm behind the projection would undo a scaled kernel.
      scale_layers("q_norm", "scale", factor)
    else:
      scale_layers("q", "kernel", factor)
      if config.qkv_bias:
        scale_layers("q", "bias", factor)
  table = params["embedding"]
  if "value_head" not in params:
    if not config.tie_embeddings:
      params["head"] = _scaled(params["head"], config.logit_scale)
    elif config.logit_scale != config.embed_scale:
      params["head"] = _scaled(table, config.logit_scale).T
      plain = dataclasses.replace(plain, tie_embeddings=False)
  params["embedding"] = _scaled(table, config.embed_scale)
  return params, plain


def _scaled(weight: jax.Array, factor: float) -> jax.Array:
  if factor == 1.0:
    return weight
  return (weight.astype(jnp.float32) * factor).astype(weight.dtype)
