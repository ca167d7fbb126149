"""The presets are the models they say they are."""

import pytest

from oreo_jax.models import abstract_params, count_params, preset
from oreo_jax.models.hf.families import expresses
from oreo_jax.models.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_valid_and_of_its_family(name):
  config = preset(name)
  config.validate()
  assert expresses(config.family, config)
  if "/" in name:
    assert config.num_heads * config.head_dim == config.embed_dim


@pytest.mark.parametrize(
  "name, total, outside",
  [
    ("Qwen/Qwen2.5-Math-1.5B", 1.54e9, 1.31e9),
    ("deepseek-ai/deepseek-math-7b-instruct", 6.91e9, 6.07e9),
    ("openbmb/MiniCPM-2B-dpo-bf16", 2.72e9, 2.44e9),
    ("HuggingFaceTB/SmolLM2-135M-Instruct", 134.5e6, 106.2e6),
  ],
)
def test_published_models_have_the_published_size(name, total, outside):
  config = preset(name)
  count = count_params(abstract_params(config))
  tables = 1 if config.tie_embeddings else 2
  tables *= config.vocab_size * config.embed_dim
  assert count == pytest.approx(total, rel=5e-3)
  assert count - tables == pytest.approx(outside, rel=5e-3)


def test_preset_is_a_copy_with_settings():
  config = preset("tiny-llama", dtype="bfloat16")
  assert config.dtype == "bfloat16"
  assert PRESETS["tiny-llama"].dtype == "float32"
  with pytest.raises(ValueError, match="preset 'tiny' is unknown; known are"):
    preset("tiny")
