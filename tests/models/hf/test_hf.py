"""Checkpoints of every family, against what transformers computed for them."""

import dataclasses
import functools
import json
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from oreo_jax.config import MeshConfig, ModelConfig
from oreo_jax.models import (
  abstract_params,
  apply,
  load_hf,
  logits,
  save_hf,
  values,
)
from oreo_jax.models.hf.families import read_config, write_config
from oreo_jax.models.hf.files import SafetensorFiles
from oreo_jax.sharding import make_mesh

FIXTURES = pathlib.Path(__file__).parents[2] / "fixtures" / "hf"
NAMES = sorted(path.name for path in FIXTURES.iterdir())

# Settings that each family, and no smaller one, can hold.
FAMILIES = {
  "llama": {"rope_scaling": (8.0, 1.0, 4.0, 16), "tie_embeddings": False},
  "qwen2": {"qkv_bias": True, "sliding_window": 6},
  "qwen3": {"qk_norm": True, "head_dim": 6},
  "mistral": {"sliding_window": 4},
  "granite": {
    "embed_scale": 12.0,
    "residual_scale": 0.22,
    "attention_scale": 0.3,
    "logit_scale": 0.125,
  },
  "minicpm": {
    "embed_scale": 12.0,
    "residual_scale": 1.4 / 2**0.5,
    "logit_scale": 0.25,
  },
}


def make(family="", head="lm", seed=0, **settings):
  config = ModelConfig(
    vocab_size=40,
    embed_dim=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=24,
    family=family,
    max_positions=64,
  )
  settings = {**FAMILIES.get(family, {}), **settings}
  config = dataclasses.replace(config, **settings)
  rng = np.random.default_rng(seed)
  params = jax.tree.map(
    lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype),
    abstract_params(config, head=head),
  )
  return params, config


@functools.partial(jax.jit, static_argnames="config")
def outputs(params, tokens, segments, config):
  hidden = apply(params, tokens, config, segment_ids=segments).hidden
  if "value_head" in params:
    return values(params, hidden)[..., None]
  return logits(params, hidden, config)


def expected(name):
  stored = load_file(FIXTURES / name / "expected.safetensors")
  count = len(stored) // 2
  tokens = [stored[f"tokens_{i}"] for i in range(count)]
  return tokens, [stored[f"outputs_{i}"] for i in range(count)]


def filled(sequences, shape, filler):
  """Rows one after another or packed, the rest filled with `filler`."""
  tokens = np.full(shape, filler, np.int32)
  segments = np.zeros(shape, np.int32)
  places, start = [], 0
  for i, sequence in enumerate(sequences):
    row, start = (i, 0) if shape[0] > 1 else (0, start)
    place = (row, slice(start, start + len(sequence)))
    tokens[place], segments[place] = sequence, i + 1
    places.append(place)
    start += len(sequence)
  return tokens, segments, places


@pytest.mark.parametrize("name", NAMES)
def test_outputs_equal_transformers(name):
  params, config = load_hf(FIXTURES / name)
  sequences, wants = expected(name)
  scale = np.concatenate(wants).std()
  for shape in ((3, 14), (1, 33)):  # one a row, then packed; both with a rest
    tokens, segments, places = filled(sequences, shape, filler=17)
    got = np.asarray(outputs(params, tokens, segments, config))
    for place, want in zip(places, wants, strict=True):
      assert np.abs(got[place] - want).max() <= 1e-4 * scale


@pytest.mark.parametrize("name", ["qwen2", "llama_untied", "value"])
def test_import_into_shards_equals_the_plain_one(name):
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  plain, config = load_hf(FIXTURES / name)
  split, split_config = load_hf(FIXTURES / name, mesh=mesh)
  assert split_config == config
  jax.tree.map(np.testing.assert_array_equal, plain, split)
  kernel = split["layers"]["q"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (2, 8, 2, 4)


def test_import_reads_only_the_slices_that_its_devices_hold(monkeypatch):
  read = []
  original = SafetensorFiles.read

  def spy(self, name, index):
    part = original(self, name, index)
    read.append((name, part.size, np.prod(self.shape(name))))
    return part

  monkeypatch.setattr(SafetensorFiles, "read", spy)
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  load_hf(FIXTURES / "qwen2", mesh=mesh)
  for name, size, whole in read:
    if "norm" not in name and "bias" not in name:
      assert size == whole // 4, name
  # Every part once, although two devices hold each.
  names = [name for name, *_ in read if name.endswith("0.mlp.up_proj.weight")]
  assert len(names) == 4


@pytest.mark.parametrize("head", ["lm", "value"])
@pytest.mark.parametrize("family", FAMILIES)
def test_import_of_an_export_is_the_same_bit_for_bit(family, head, tmp_path):
  params, config = make(family, head)
  save_hf(tmp_path / "out", params, config, head=head, family=family)
  again, again_config = load_hf(tmp_path / "out")
  assert again_config == config
  jax.tree.map(np.testing.assert_array_equal, params, again)


@pytest.mark.parametrize("head", ["lm", "value"])
@pytest.mark.parametrize("family", ["granite", "minicpm"])
def test_families_without_a_class_are_written_as_one_that_has(
  family, head, tmp_path
):
  params, config = make(family, head)
  save_hf(tmp_path / "out", params, config)
  written = json.loads((tmp_path / "out" / "config.json").read_text())
  want = "LlamaForSequenceClassification" if head == "value" else "Granite"
  assert written["architectures"][0].startswith(want)
  again, again_config = load_hf(tmp_path / "out")
  tokens = np.arange(8, dtype=np.int32)[None]
  ones = np.ones_like(tokens)
  got = outputs(again, tokens, ones, again_config)
  want = outputs(params, tokens, ones, config)
  np.testing.assert_allclose(got, want, atol=1e-5 * want.std())


def test_minicpm_without_scales_has_those_of_its_authors():
  """Their code divides by sqrt(layers) and by the width, key or no key."""
  hf = json.loads((FIXTURES / "minicpm" / "config.json").read_text())
  scales = {"scale_emb": 1, "scale_depth": 1, "dim_model_base": 1}
  without = {k: v for k, v in hf.items() if k not in scales}
  config = read_config(without)
  assert config == read_config({**hf, **scales})
  assert config.embed_scale == 1.0
  assert config.residual_scale == pytest.approx(1 / math.sqrt(2))  # 2 layers
  assert config.logit_scale == pytest.approx(1 / 16)  # 16 wide
  written = write_config("minicpm", config, "lm")
  assert {k: written[k] for k in scales} == scales


def test_folding_moves_every_multiplier_into_the_weights(tmp_path):
  for extra in ({}, {"qkv_bias": True}, {"qk_norm": True}):
    params, config = make("granite", **extra)
    config = dataclasses.replace(config, family="")
    save_hf(tmp_path / "out", params, config, overwrite=True)
    again, again_config = load_hf(tmp_path / "out")
    tokens = np.arange(8, dtype=np.int32)[None]
    ones = np.ones_like(tokens)
    got = outputs(again, tokens, ones, again_config)
    want = outputs(params, tokens, ones, config)
    np.testing.assert_allclose(got, want, atol=1e-5 * want.std())


def test_family_is_the_first_that_fits(tmp_path):
  for family in ("llama", "qwen2", "qwen3", "mistral", "granite"):
    params, config = make(family)
    plain = dataclasses.replace(config, family="")
    save_hf(tmp_path / family, params, plain)
    assert load_hf(tmp_path / family)[1].family == family
  params, config = make("", qkv_bias=True, qk_norm=True)
  with pytest.raises(ValueError, match="no family of"):
    save_hf(tmp_path / "none", params, config)


def test_shards_of_an_export_read_back(tmp_path):
  params, config = make("llama")
  save_hf(tmp_path / "out", params, config, max_shard_bytes=5000)
  files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
  assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}" + (
    ".safetensors"
  )
  sizes = [(tmp_path / "out" / name).stat().st_size for name in files]
  assert max(sizes) < 5000 + 2000  # the header comes on top
  jax.tree.map(
    np.testing.assert_array_equal, params, load_hf(tmp_path / "out")[0]
  )
  assert not list(tmp_path.glob("*.partial"))


def test_export_from_shards_equals_export_from_one_device(tmp_path):
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  for name in ("one", "eight"):
    params, config = load_hf(
      FIXTURES / "llama_untied", mesh=mesh if name == "eight" else None
    )
    save_hf(tmp_path / name, params, config)
  one, eight = (
    (tmp_path / name / "model.safetensors").read_bytes()
    for name in ("one", "eight")
  )
  assert one == eight


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_of_an_export(dtype, tmp_path):
  params, config = make("llama")
  save_hf(tmp_path / "out", params, config, dtype=dtype)
  stored = load_file(tmp_path / "out" / "model.safetensors")
  assert {str(x.dtype) for x in stored.values()} == {dtype}
  again, _ = load_hf(tmp_path / "out")
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(
      np.asarray(a).astype(dtype).astype("float32"), b
    ),
    params,
    again,
  )


def test_bfloat16_weights_stay_bfloat16_and_the_value_head_float32(tmp_path):
  params, config = make("llama", "value", param_dtype="bfloat16")
  save_hf(tmp_path / "out", params, config)
  again, _ = load_hf(tmp_path / "out", param_dtype="bfloat16")
  assert again["value_head"].dtype == jnp.float32
  assert again["embedding"].dtype == jnp.bfloat16
  jax.tree.map(np.testing.assert_array_equal, params, again)


def test_value_network_of_a_language_model_starts_with_a_zero_head():
  params, _ = load_hf(FIXTURES / "llama_untied", head="value")
  assert "head" not in params
  np.testing.assert_array_equal(params["value_head"], np.zeros((16, 1)))


def test_export_writes_tokenizer_template_and_ids(tmp_path):
  import tokenizers
  import transformers

  words = {f"w{i}": i for i in range(38)} | {"<eos>": 38, "<pad>": 39}
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer(
      tokenizers.models.WordLevel(words, unk_token="w0")
    ),
    eos_token="<eos>",
    pad_token="<pad>",
  )
  tokenizer.chat_template = "{{ messages[0]['content'] }}"
  params, config = make("llama")
  save_hf(tmp_path / "out", params, config, tokenizer=tokenizer)
  again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  assert again.chat_template == tokenizer.chat_template
  assert again("w3 w4")["input_ids"] == tokenizer("w3 w4")["input_ids"]
  for name in ("config.json", "generation_config.json"):
    written = json.loads((tmp_path / "out" / name).read_text())
    assert (written["eos_token_id"], written["pad_token_id"]) == (38, 39)
  config = dataclasses.replace(config, vocab_size=39)
  with pytest.raises(ValueError, match="tokenizer: has 40 tokens"):
    save_hf(tmp_path / "small", params, config, tokenizer=tokenizer)


def test_export_does_not_overwrite_unasked(tmp_path):
  params, config = make("llama")
  (tmp_path / "note.txt").write_text("mine")
  with pytest.raises(ValueError, match="exists and is not empty"):
    save_hf(tmp_path, params, config)
  assert (tmp_path / "note.txt").exists()
  save_hf(tmp_path / "new", params, config)
  save_hf(tmp_path / "new", params, config, overwrite=True)


def test_failed_export_leaves_nothing(tmp_path):
  params, config = make("llama")

  class Broken:
    def __len__(self):
      return 1

    def save_pretrained(self, path):
      raise OSError("disk full")

  with pytest.raises(OSError, match="disk full"):
    save_hf(tmp_path / "out", params, config, tokenizer=Broken())
  assert not list(tmp_path.iterdir())


def test_wrong_arguments_of_an_export(tmp_path):
  params, config = make("llama")
  with pytest.raises(ValueError, match="hold a 'lm' head"):
    save_hf(tmp_path / "out", params, config, head="value")
  with pytest.raises(ValueError, match="dtype: expected one of"):
    save_hf(tmp_path / "out", params, config, dtype="int8")
  with pytest.raises(ValueError, match="family: expected one of"):
    save_hf(tmp_path / "out", params, config, family="gpt2")


def copy(name, tmp_path):
  shutil.copytree(FIXTURES / name, tmp_path / name)
  return tmp_path / name


def edit(path, **settings):
  file = path / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"model_type": "gpt2"}, "model_type='gpt2' is not supported; known are"),
    ({"attention_bias": True}, "attention_bias=True is not supported"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn'"),
    ({"intermediate_size": 32}, r"shape \(16, 24\), and config.json asks"),
    ({"num_hidden_layers": 3}, "9 tensors that config.json asks for are"),
    ({"num_hidden_layers": 1}, "9 tensors have no place in a llama model"),
    ({"tie_word_embeddings": False}, "the first is lm_head.weight"),
  ],
)
def test_config_that_does_not_fit(settings, message, tmp_path):
  path = copy("llama", tmp_path)
  edit(path, **settings)
  with pytest.raises(ValueError, match=message) as error:
    load_hf(path)
  assert str(path) in str(error.value)


def test_missing_setting_is_named(tmp_path):
  path = copy("llama", tmp_path)
  hf = json.loads((path / "config.json").read_text())
  del hf["hidden_size"]
  (path / "config.json").write_text(json.dumps(hf))
  with pytest.raises(ValueError, match="the key 'hidden_size' is missing"):
    load_hf(path)


def test_damaged_files_are_named(tmp_path):
  path = copy("llama", tmp_path)
  file = path / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-100])
  with pytest.raises(ValueError, match="model.safetensors: damaged or cut"):
    load_hf(path)
  file.unlink()
  with pytest.raises(ValueError, match="neither model.safetensors nor"):
    load_hf(path)
  (path / "config.json").write_text("{")
  with pytest.raises(ValueError, match="config.json: not valid JSON"):
    load_hf(path)
  (path / "config.json").unlink()
  with pytest.raises(ValueError, match="config.json: missing"):
    load_hf(path)


def test_missing_shard_is_named(tmp_path):
  path = copy("llama_untied", tmp_path)
  shard = path / "model-00002-of-00002.safetensors"
  whole = load_file(shard)
  shard.unlink()
  with pytest.raises(ValueError, match="00002.safetensors: missing, though"):
    load_hf(path)
  whole.popitem()
  save_file(whole, shard)
  with pytest.raises(ValueError, match="says it is there"):
    load_hf(path)


def test_value_model_is_no_language_model():
  with pytest.raises(ValueError, match='load it with head="value"'):
    load_hf(FIXTURES / "value", head="lm")
  with pytest.raises(ValueError, match="head: expected one of"):
    load_hf(FIXTURES / "value", head="critic")


def test_partly_sliding_windows_are_refused(tmp_path):
  path = copy("qwen2", tmp_path)
  edit(
    path,
    use_sliding_window=True,
    sliding_window=4,
    layer_types=["full_attention", "sliding_attention"],
  )
  with pytest.raises(ValueError, match="sliding_window on some layers only"):
    load_hf(path)


def test_gguf_without_its_reader_says_what_to_install(tmp_path):
  try:
    import gguf  # noqa: F401
    import torch  # noqa: F401
  except ImportError:
    with pytest.raises(ValueError, match="pip install torch gguf"):
      load_hf(tmp_path / "model.gguf")
  else:
    with pytest.raises(ValueError, match="model.gguf: missing"):
      load_hf(tmp_path / "model.gguf")
