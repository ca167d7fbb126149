"""Settings: mistakes are named, and a saved config is the config."""

import dataclasses
import importlib.util
import math
import pathlib

import pytest

from oreo_jax.config import (
  Config,
  ConfigError,
  ModelConfig,
  TaskConfig,
  computed_like,
  field_paths,
  from_dict,
  save_config,
  to_dict,
  unknown_key,
)
from oreo_jax.settings import parse_tuple

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def load(path):
  spec = importlib.util.spec_from_file_location("config_file", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config


@pytest.mark.parametrize(
  "values, nearest",
  [
    ({"train": {"lrr": 1.0}}, "config.train.lr?"),
    ({"train": {"critic_learning": 1.0}}, "config.train.critic_l"),
    ({"trian": {}}, "config.train."),
    ({"model": {"embed_dims": 3}}, "config.model.embed_dim?"),
    ({"seeds": 3}, "config.seed?"),
  ],
)
def test_unknown_key_names_the_nearest(values, nearest):
  with pytest.raises(ConfigError, match="is not a setting") as caught:
    from_dict(values)
  assert f"did you mean {nearest}" in str(caught.value)


def test_a_key_like_no_other_gets_no_guess():
  assert "did you mean" not in unknown_key("zzzz", field_paths(Config()))


@pytest.mark.parametrize(
  "values, message",
  [
    ({"train": {"lr": "fast"}}, "config.train.lr: expected float, got 'fast'"),
    ({"train": {"epochs": None}}, "config.train.epochs: expected float"),
    ({"seed": 1.5}, "config.seed: expected int, got 1.5"),
    ({"seed": True}, "config.seed: expected int, got True"),
    ({"lora": {"policy": 1}}, "config.lora.policy: expected bool, got 1"),
    ({"evaluate": {"budgets": 7}}, "config.evaluate.budgets: expected tuple"),
    ({"train": 3}, "config.train: expected a section, got 3"),
  ],
)
def test_wrong_type_names_the_setting(values, message):
  with pytest.raises(ConfigError, match=message):
    from_dict(values)


def test_whole_numbers_and_lists_are_taken_where_they_fit():
  config = from_dict({"train": {"lr": 1}, "evaluate": {"budgets": [1, 3]}})
  assert config.train.lr == 1.0 and isinstance(config.train.lr, float)
  assert config.evaluate.budgets == (1, 3)


@pytest.mark.parametrize(
  "values, flag",
  [
    ({"train": {"granularity": "word"}}, "train.granularity"),
    ({"train": {"kl": "k1"}}, "train.kl"),
    ({"train": {"beta": 0.0}}, "train.beta"),
    ({"train": {"schedule": "step"}}, "train.schedule"),
    ({"train": {"batch_size": 10, "grad_accum": 3}}, "train.grad_accum"),
    ({"train": {"measure_every": 15}}, "train.measure_every"),
    ({"sft": {"warmup": 2.0}}, "sft.warmup"),
    ({"sft": {"lr": -1.0}}, "sft.lr"),
    ({"model": {"num_kv_heads": 3}}, "model.num_kv_heads"),
    ({"model": {"head_dim": 3}}, "model.head_dim"),
    ({"model": {"dtype": "float64"}}, "model.dtype"),
    ({"critic": {"kind": "twin"}}, "critic.kind"),
    ({"lora": {"targets": ["q", "w"]}}, "lora.targets"),
    ({"data": {"on_error": "ignore"}}, "data.on_error"),
    ({"data": {"held_out": 1.0}}, "data.held_out"),
    ({"data": {"tokenizer": "hf"}}, "data.tokenizer_path"),
    ({"collect": {"top_p": 0.0}}, "collect.top_p"),
    ({"collect": {"min_p": 1.5}}, "collect.min_p"),
    (
      {"collect": {"repetition_penalty": 0.0}},
      "collect.repetition_penalty",
    ),
    ({"evaluate": {"top_k": -1}}, "evaluate.top_k"),
    ({"evaluate": {"min_p": -0.1}}, "evaluate.min_p"),
    ({"evaluate": {"split": "train"}}, "evaluate.split"),
  ],
)
def test_a_setting_that_cannot_work_names_its_flag(values, flag):
  with pytest.raises(ConfigError) as caught:
    from_dict(values).validate()
  assert f"--config.{flag}" in str(caught.value)


def test_saved_config_is_the_config(tmp_path):
  config = Config(
    seed=3,
    model=ModelConfig(vocab_size=7, rope_scaling=(8.0, 1.0, 4.0, 8192)),
    task=TaskConfig("maze", {"variant": "easy", "walls": 3}),
  )
  save_config(config, tmp_path / "run" / "config.py")
  found = load(tmp_path / "run" / "config.py")()
  assert found == config and to_dict(found) == to_dict(config)
  assert [p.name for p in (tmp_path / "run").iterdir()] == ["config.py"]


def test_sections_are_hashable():
  assert hash(Config()) == hash(Config())
  assert hash(ModelConfig()) != hash(ModelConfig(num_layers=7))


@pytest.mark.parametrize(
  "name", sorted(path.name for path in CONFIGS.glob("*.py"))
)
def test_shipped_configs_are_valid(name):
  config = load(CONFIGS / name)()
  config.validate()
  assert from_dict(to_dict(config)) == config


def test_every_setting_has_a_default():
  for field in dataclasses.fields(Config):
    assert getattr(Config(), field.name) is not None


# Numbers that may be below zero, each with the reason.
MAY_BE_NEGATIVE = {
  "train.reward_offset": "rewards may be shifted down",
  **{
    f"compare.{name}.alpha": "-1 is as the method's row says"
    for name in (
      "rejection",
      "dpo",
      "kto",
      "dqo",
      "oreo_token",
      "oreo_step",
      "oreo_response",
    )
  },  # fmt: skip
  "mesh.data": "-1 takes the devices that are left",
  "mesh.fsdp": "-1 takes the devices that are left",
  "mesh.tensor": "-1 takes the devices that are left",
  "mesh.dcn_data": "-1 takes the devices that are left",
}


def numbers(section=None, path=""):
  """Yields the path and the type of every number, of tuples' entries too."""
  section = section or Config()
  for field in dataclasses.fields(section):
    name = f"{path}.{field.name}" if path else field.name
    value = getattr(section, field.name)
    if dataclasses.is_dataclass(value):
      yield from numbers(value, name)
    elif field.type in (int, float):
      yield name, field.type
    elif field.type is tuple and field.metadata["limits"].entry is not str:
      yield name, tuple


def changed(name, value):
  """A config with one setting changed, as a flag changes it."""
  config = Config()
  *sections, last = name.split(".")
  section = config
  for part in sections:
    section = getattr(section, part)
  setattr(section, last, value)
  return config


def refuses(name, value):
  with pytest.raises(ConfigError, match=rf"^config\.{name}: expected ") as e:
    changed(name, value).validate()
  return f"got {value!r}: set --config.{name}=" in str(e.value)


@pytest.mark.parametrize("name, kind", list(numbers()))
def test_no_number_may_be_what_cannot_work(name, kind):
  for bad in (math.nan, math.inf, -math.inf):
    assert refuses(name, (bad,) if kind is tuple else bad)
  minus_one = {int: -1, float: -1.0, tuple: (-1,)}[kind]
  if name not in MAY_BE_NEGATIVE:
    assert refuses(name, minus_one)
  elif name != "mesh.data":
    config = changed(name, minus_one)
    config.mesh.data = -1 if name == "train.reward_offset" else 1
    config.validate()
  if kind is int:
    assert refuses(name, 2**31)
    assert refuses(name, True)
  assert refuses(name, "1")


def test_there_are_numbers_to_check():
  names = [name for name, _ in numbers()]
  assert len(names) > 100
  assert set(MAY_BE_NEGATIVE) < set(names)
  assert {"train.lr", "evaluate.budgets", "compare.dpo.lr_scales"} < set(names)


@pytest.mark.parametrize(
  "values, flag",
  [
    ({"train": {"log_every": 0}}, "train.log_every"),
    ({"train": {"critic_lr": 0.0, "value_head_lr": 1e-6}}, "train.critic_lr"),
    ({"train": {"kl_target": 0.1, "alpha": 0.0}}, "train.alpha"),
    ({"train": {"ema_decay": 1.5}}, "train.ema_decay"),
    ({"train": {"ema_decay": 1.0}}, "train.ema_decay"),
    ({"train": {"dqo_lambda": -3.0}}, "train.dqo_lambda"),
    ({"train": {"dqo_lambda": 1.5}}, "train.dqo_lambda"),
    ({"train": {"label_smoothing": 7.0}}, "train.label_smoothing"),
    ({"train": {"pairs": 0}}, "train.pairs"),
    ({"train": {"critic_lr": -1.0}}, "train.critic_lr"),
    ({"train": {"warmup": 1.1}}, "train.warmup"),
    ({"train": {"b2": 1.0}}, "train.b2"),
    ({"evaluate": {"budgets": [1, 2.5]}}, "evaluate.budgets"),
    ({"evaluate": {"budgets": []}}, "evaluate.budgets"),
    ({"mesh": {"fsdp": 0}}, "mesh.fsdp"),
    ({"mesh": {"fsdp": -1}}, "mesh.data"),
    ({"compare": {"dqo": {"beta": -1.0}}}, "compare.dqo.beta"),
    ({"compare": {"dqo": {"alpha": -0.5}}}, "compare.dqo.alpha"),
    ({"model": {"rope_scaling": [8.0, 1.0]}}, "model.rope_scaling"),
  ],
)
def test_settings_that_used_to_pass_are_refused(values, flag):
  with pytest.raises(ConfigError, match=rf"config\.{flag}: expected .* got "):
    from_dict(values).validate()


@pytest.mark.parametrize(
  "values",
  [
    {"critic_lr": 0.0},
    # Nothing learns alpha there: DPO has none.
    {"objective": "dpo", "kl_target": 0.1, "alpha": 0.0},
    {"measure_every": 0},
    {"dqo_lambda": 0.0},
    {"reward_offset": -0.5},
  ],
)
def test_settings_that_work_pass(values):
  from_dict({"train": values}).validate()


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_a_checkpoint_keeps_its_own_tokenizer(tokenizer):
  config = Config(init="some/checkpoint")
  config.validate()
  config.data.tokenizer = tokenizer
  with pytest.raises(ConfigError, match="--config.data.tokenizer=hf"):
    config.validate()
  config.data.tokenizer = "hf"
  config.validate()


def test_a_tuple_flag_may_be_short():
  assert parse_tuple("1,3") == parse_tuple("(1, 3)") == (1, 3)
  assert parse_tuple("3") == parse_tuple("[3]") == (3,)
  assert parse_tuple("()") == parse_tuple("") == ()
  words = ("rejection", "oreo_token")
  assert parse_tuple("rejection,oreo_token") == words
  assert parse_tuple("('rejection','oreo_token')") == words
  assert parse_tuple("(rejection, oreo_token)") == words


def test_how_a_model_runs_is_not_what_it_is():
  ours = ModelConfig(
    dtype="bfloat16",
    param_dtype="bfloat16",
    remat="full",
    attention="blockwise",
    attention_block=64,
    unroll=2,
  )
  given = computed_like(ours, ModelConfig(embed_dim=8, rope_theta=5.0))
  assert given == dataclasses.replace(ours, embed_dim=8, rope_theta=5.0)
