"""Both directions against transformers itself, where torch is installed."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch (CPU is enough)")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

from fixtures import make_hf_fixtures as fixtures

from oreo_jax.models import (
  ModelConfig,
  abstract_params,
  apply,
  load_hf,
  logits,
  preset,
  save_adapter,
  save_hf,
  values,
)

LM_CASES = [n for n in fixtures.CASES if n not in ("minicpm", "value")]
PRESETS = [f"tiny-{n}" for n in ("llama", "qwen2", "qwen3", "mistral")]
SCALED = ["tiny-granite", "tiny-minicpm"]
PAD = 63


def make(name, head="lm", seed=0, **settings):
  config = preset(name, **settings)
  rng = np.random.default_rng(seed)
  params = jax.tree.map(
    lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype),
    abstract_params(config, head=head),
  )
  return params, config


def our_logits(params, tokens, config: ModelConfig):
  tokens = jnp.asarray(tokens, jnp.int32)[None]
  hidden = apply(params, tokens, config).hidden
  return np.asarray(logits(params, hidden, config)[0])


def our_values(params, tokens, config: ModelConfig):
  tokens = jnp.asarray(tokens, jnp.int32)[None]
  return np.asarray(values(params, apply(params, tokens, config).hidden)[0])


def padded(rows, left):
  """Rows [B, T] padded with PAD, and their mask."""
  longest = max(map(len, rows))
  ids = np.full((len(rows), longest), PAD)
  for i, row in enumerate(rows):
    ids[i, longest - len(row) :] = row
    if not left:
      ids[i] = np.roll(ids[i], len(row) - longest)
  return torch.tensor(ids), torch.tensor((ids != PAD).astype(np.int64))


@pytest.mark.parametrize("name", LM_CASES)
def test_import_of_a_fresh_model(name, tmp_path):
  model = fixtures.build(name)
  model.config.architectures = [type(model).__name__]
  model.save_pretrained(tmp_path / "model")
  params, config = load_hf(tmp_path / "model")
  for tokens in fixtures.rows(seed=1):
    want = fixtures.outputs(model, tokens)
    got = our_logits(params, tokens, config)
    assert np.abs(got - want).max() <= 1e-4 * want.std()


@pytest.mark.parametrize("name", PRESETS + SCALED)
def test_export_of_a_policy(name, tmp_path):
  params, config = make(name)
  save_hf(tmp_path / "out", params, config, max_shard_bytes=20_000)
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
  for tokens in fixtures.rows(seed=1):
    with torch.no_grad():
      got = model(torch.tensor(tokens)[None]).logits[0].numpy()
    want = our_logits(params, tokens, config)
    assert np.abs(got - want).max() <= 1e-5 * want.std()


def test_export_of_llama3_rope(tmp_path):
  params, config = make("tiny-llama", rope_scaling=(8.0, 1.0, 4.0, 16))
  save_hf(tmp_path / "out", params, config)
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
  (tokens, *_) = fixtures.rows(seed=1)
  with torch.no_grad():
    got = model(torch.tensor(tokens)[None]).logits[0].numpy()
  want = our_logits(params, tokens, config)
  assert np.abs(got - want).max() <= 1e-5 * want.std()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PRESETS + SCALED)
def test_export_of_a_value_network(name, side, tmp_path):
  params, config = make(name, head="value")
  save_hf(tmp_path / "out", params, config, pad_token_id=PAD)
  model = transformers.AutoModelForSequenceClassification.from_pretrained(
    tmp_path / "out"
  )
  assert model.config.num_labels == 1
  rows = fixtures.rows(seed=2)
  ids, mask = padded(rows, left=side == "left")
  with torch.no_grad():
    got = model(ids, attention_mask=mask).logits[:, 0].numpy()
  want = [our_values(params, row, config)[-1] for row in rows]
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_transformers_writes_our_export_back_unchanged(tmp_path):
  params, config = make("tiny-qwen2")
  save_hf(tmp_path / "ours", params, config)
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
  model.save_pretrained(tmp_path / "theirs")
  again, again_config = load_hf(tmp_path / "theirs")
  assert again_config == config
  jax.tree.map(np.testing.assert_array_equal, params, again)


def test_export_warns_of_nothing(tmp_path, caplog, recwarn):
  params, config = make("tiny-mistral", param_dtype="bfloat16")
  save_hf(tmp_path / "out", params, config)
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
  assert model.dtype == torch.bfloat16
  assert not caplog.records and not recwarn.list


@pytest.mark.parametrize("head", ["lm", "value"])
def test_adapter_opens_in_peft(head, tmp_path):
  peft = pytest.importorskip("peft", reason="needs peft")
  params, config = make(
    "tiny-qwen2",
    head=head,
    lora_rank=4,
    lora_alpha=8.0,
    lora_targets=("q", "k", "v", "o", "gate", "up", "down"),
  )
  plain = dataclasses.replace(
    config, lora_rank=0, lora_alpha=0.0, lora_targets=()
  )
  base, _ = make("tiny-qwen2", head=head)
  for name in base["layers"]:
    base["layers"][name] = {
      key: params["layers"][name][key] for key in base["layers"][name]
    }
  base = {**params, "layers": base["layers"]}
  save_hf(tmp_path / "base", base, plain, pad_token_id=PAD)
  save_adapter(tmp_path / "adapter", params, config, base=tmp_path / "base")
  kind = transformers.AutoModelForCausalLM
  if head == "value":
    kind = transformers.AutoModelForSequenceClassification
  model = kind.from_pretrained(tmp_path / "base")
  model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
  (tokens, *_) = fixtures.rows(seed=1)
  with torch.no_grad():
    got = model(torch.tensor(tokens)[None]).logits[0].numpy()
  if head == "value":
    want = our_values(params, tokens, config)[-1:]
  else:
    want = our_logits(params, tokens, config)
  np.testing.assert_allclose(got, want, atol=2e-5 * max(1.0, want.std()))


def test_import_of_gguf(tmp_path):
  gguf = pytest.importorskip("gguf", reason="needs gguf")
  params, config = make("tiny-llama", norm_eps=1e-5)
  c = config
  writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
  writer.add_vocab_size(c.vocab_size)
  writer.add_context_length(c.max_positions)
  writer.add_embedding_length(c.embed_dim)
  writer.add_block_count(c.num_layers)
  writer.add_feed_forward_length(c.mlp_dim)
  writer.add_head_count(c.num_heads)
  writer.add_head_count_kv(c.num_kv_heads)
  writer.add_rope_freq_base(c.rope_theta)
  writer.add_layer_norm_rms_eps(c.norm_eps)
  writer.add_token_list([f"w{i}" for i in range(c.vocab_size)])

  def interleaved(kernel):
    """GGUF rotates neighbours (0, 1), (2, 3), ...: its rows lie that way."""
    heads = kernel.transpose(1, 2, 0)
    n, h, d = heads.shape
    return heads.reshape(n, 2, h // 2, d).swapaxes(1, 2).reshape(n * h, d)

  def add(name, array):
    writer.add_tensor(f"{name}.weight", np.ascontiguousarray(array))

  host = jax.tree.map(np.asarray, params)
  add("token_embd", host["embedding"])
  add("output_norm", host["final_norm"]["scale"])
  add("output", host["head"].T)
  for i in range(c.num_layers):
    layer = jax.tree.map(lambda x, i=i: x[i], host["layers"])
    add(f"blk.{i}.attn_norm", layer["attention_norm"]["scale"])
    add(f"blk.{i}.ffn_norm", layer["mlp_norm"]["scale"])
    add(f"blk.{i}.attn_q", interleaved(layer["q"]["kernel"]))
    add(f"blk.{i}.attn_k", interleaved(layer["k"]["kernel"]))
    value = layer["v"]["kernel"]
    add(f"blk.{i}.attn_v", value.reshape(c.embed_dim, -1).T)
    output = layer["o"]["kernel"]
    add(f"blk.{i}.attn_output", output.reshape(-1, c.embed_dim).T)
    for name in ("gate", "up", "down"):
      add(f"blk.{i}.ffn_{name}", layer[name]["kernel"].T)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  again, again_config = load_hf(tmp_path / "model.gguf")
  assert again_config == config
  jax.tree.map(np.testing.assert_array_equal, params, again)
