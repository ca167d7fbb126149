"""Architectures of published models, and tiny ones.

`load_hf` reads a checkpoint's own config.json; a preset is for what comes
before any download: memory plans, ahead-of-time compilation, random weights
of a real shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from oreo_jax.config import ModelConfig

# Source of each: config.json of the repository of that name on the Hugging
# Face Hub. What the authors state elsewhere, and the tests count, is behind it.
_PUBLISHED = {
  # The paper's main policy. Model card: 1.54B weights, 1.31B of them outside
  # the embedding, 28 layers, 12 query and 2 key/value heads.
  "Qwen/Qwen2.5-Math-1.5B": ModelConfig(
    family="qwen2",
    vocab_size=151_936,
    embed_dim=1536,
    num_layers=28,
    num_heads=12,
    num_kv_heads=2,
    head_dim=128,
    mlp_dim=8960,
    rope_theta=10_000.0,
    norm_eps=1e-6,
    qkv_bias=True,
    tie_embeddings=True,
    max_positions=4096,
  ),
  # The paper's 7B policy. DeepSeek LLM (arXiv 2401.02954), table 2: 30
  # layers, width 4096, 32 heads, context 4096.
  "deepseek-ai/deepseek-math-7b-instruct": ModelConfig(
    family="llama",
    vocab_size=102_400,
    embed_dim=4096,
    num_layers=30,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    mlp_dim=11_008,
    rope_theta=10_000.0,
    norm_eps=1e-6,
    tie_embeddings=False,
    max_positions=4096,
  ),
  # The paper's ALFWorld policy. MiniCPM (arXiv 2404.06395): scale_emb 12,
  # scale_depth 1.4, dim_model_base 256; 2.4B weights outside the embedding,
  # 2.7B in all.
  "openbmb/MiniCPM-2B-dpo-bf16": ModelConfig(
    family="minicpm",
    vocab_size=122_753,
    embed_dim=2304,
    num_layers=40,
    num_heads=36,
    num_kv_heads=36,
    head_dim=64,
    mlp_dim=5760,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
    embed_scale=12.0,
    residual_scale=1.4 / 40**0.5,
    logit_scale=256 / 2304,
    max_positions=4096,
  ),
  # Small enough for a laptop. Model card: 135M weights, context 8192.
  "HuggingFaceTB/SmolLM2-135M-Instruct": ModelConfig(
    family="llama",
    vocab_size=49_152,
    embed_dim=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    mlp_dim=1536,
    rope_theta=100_000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
    max_positions=8192,
  ),
}

_TINY = ModelConfig(
  vocab_size=64,
  embed_dim=32,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=64,
  max_positions=128,
)

# One a family, for tests: every switch of the architecture is on in one.
_TESTS = {
  "tiny-llama": dataclasses.replace(
    _TINY, family="llama", tie_embeddings=False
  ),
  "tiny-qwen2": dataclasses.replace(_TINY, family="qwen2", qkv_bias=True),
  "tiny-qwen3": dataclasses.replace(_TINY, family="qwen3", qk_norm=True),
  "tiny-mistral": dataclasses.replace(
    _TINY, family="mistral", tie_embeddings=False, sliding_window=8
  ),
  "tiny-granite": dataclasses.replace(
    _TINY,
    family="granite",
    embed_scale=12.0,
    residual_scale=0.22,
    attention_scale=1 / 64,
    logit_scale=1 / 8,
  ),
  "tiny-minicpm": dataclasses.replace(
    _TINY,
    family="minicpm",
    embed_scale=12.0,
    residual_scale=1.4 / 2**0.5,
    logit_scale=1 / 4,
  ),
}

PRESETS: Mapping[str, ModelConfig] = _PUBLISHED | _TESTS


def preset(name: str, **settings) -> ModelConfig:
  """Returns a copy of a preset, with some settings replaced.

  Args:
    name: a key of `PRESETS`.
    **settings: fields of ModelConfig, such as `dtype` or `remat`.

  Raises:
    ValueError: on an unknown name.
  """
  if name not in PRESETS:
    raise ValueError(
      f"preset {name!r} is unknown; known are " + ", ".join(PRESETS)
    )
  return dataclasses.replace(PRESETS[name], **settings)
