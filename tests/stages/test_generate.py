"""`oreo generate`: one prompt, a checkpoint or what training left."""

import jax
import pytest
from oracles import tiny

from oreo_jax import cli, compilation, data, decode, models
from oreo_jax.config import (
  Config,
  ConfigError,
  DataConfig,
  GenerateConfig,
  ModelConfig,
)
from oreo_jax.stages import generate
from oreo_jax.stages.workspace import Workspace

TEMPLATE = (
  "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n"
  "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """A random Llama whose answers are bytes, with a chat template."""
  path = tmp_path_factory.mktemp("checkpoint") / "tiny"
  tokenizer = data.make_tokenizer("byte")
  tokenizer.chat_template = TEMPLATE
  config = models.preset("tiny-llama", vocab_size=len(tokenizer))
  models.save_hf(
    path, tiny.draw_params(config), config, tokenizer=tokenizer, eos_ids=(0,)
  )
  return path


@pytest.fixture(scope="module")
def value(tmp_path_factory):
  path = tmp_path_factory.mktemp("value") / "tiny"
  tokenizer = data.make_tokenizer("byte")
  config = models.preset("tiny-llama", vocab_size=len(tokenizer))
  critic = tiny.draw_params(config, head="value")
  models.save_hf(path, critic, config, tokenizer=tokenizer)
  return path


def answer(checkpoint, tmp_path, *, chat=False, **settings):
  """Returns what `oreo generate` says, message by message."""
  config = Config(
    init=str(checkpoint),
    model=ModelConfig(dtype="float32", param_dtype="float32"),
    data=DataConfig(chat=chat),
    generate=GenerateConfig(**{"max_new_tokens": 12, **settings}),
  )
  workspace = Workspace(config, tmp_path / "nothing is written here")
  said = []
  with jax.set_mesh(workspace.mesh):
    generate.run(workspace, lambda text, end="\n": said.append(text + end))
  assert not workspace.directory.exists()
  return said


def engine_of(checkpoint, chat=False):
  params, config = models.load_hf(
    checkpoint, dtype="float32", param_dtype="float32"
  )
  tokenizer = data.load_tokenizer(checkpoint)
  return decode.Engine(params, config, tokenizer, eos_ids=(0, 257))


@pytest.mark.parametrize("chat", [False, True])
def test_a_lone_answer_is_said_while_it_grows(checkpoint, tmp_path, chat):
  said = answer(checkpoint, tmp_path, chat=chat, prompt="2 + 2 =")
  prompt = [{"role": "user", "content": "2 + 2 ="}] if chat else "2 + 2 ="
  (want,) = engine_of(checkpoint).generate(
    [prompt], sampler=decode.GREEDY, max_new_tokens=12
  )
  assert len(said) > 1 and said[-1].endswith("\n")
  assert "".join(said) == want[0].text + "\n"


def test_several_answers_are_said_as_they_end(checkpoint, tmp_path):
  said = answer(
    checkpoint, tmp_path, prompt="a", samples=3, temperature=1.0, seed=4
  )
  (want,) = engine_of(checkpoint).generate(
    ["a"], n=3, max_new_tokens=12, seed=4
  )
  assert len(said) == 3
  for number, completion in enumerate(want, 1):
    (text,) = [text for text in said if text.startswith(f"--- {number}: ")]
    assert text.split("\n", 1)[1] == completion.text + "\n"
    assert f"{len(completion.tokens)} tokens" in text


@pytest.mark.parametrize(
  ("strategy", "made"),
  [
    ("beam", decode.Strategy(beams=3)),
    ("best_of_n", decode.best_of(3)),
    ("best_of_k", decode.best_of_actions(3)),
    ("lookahead", decode.look_ahead_search(1, 3)),
  ],
)
def test_a_value_network_guides_the_search(
  checkpoint, value, tmp_path, strategy, made
):
  said = answer(
    checkpoint,
    tmp_path,
    prompt="2 + 2 =",
    value=str(value),
    strategy=strategy,
    budget=3,
    depth=1,
  )
  engine = engine_of(checkpoint)
  engine.critic = models.load_hf(
    value, head="value", dtype="float32", param_dtype="float32"
  )[0]
  (want,) = engine.search(["2 + 2 ="], made, max_new_tokens=12)
  assert said[0] == want.text + "\n"
  assert said[1].endswith(f"score {want.score:.3f}\n")


def test_a_search_without_a_value_network_is_refused(checkpoint, tmp_path):
  with pytest.raises(ConfigError, match="--strategy=beam .* --value=DIR"):
    answer(checkpoint, tmp_path, prompt="a", strategy="beam")


def test_a_prompt_is_needed(checkpoint, tmp_path):
  with pytest.raises(ConfigError, match="--prompt=TEXT is needed"):
    answer(checkpoint, tmp_path)


def test_no_config_is_needed(monkeypatch):
  calls = []
  monkeypatch.setattr(cli.app, "run", lambda main: calls.append(list(argv)))
  for given in (
    ["oreo", "generate", "--config.init=x", "--prompt=a"],
    ["oreo", "generate", f"--config={cli._DEFAULT_CONFIG}", "--prompt=a"],
  ):
    argv = given
    monkeypatch.setattr(cli.sys, "argv", argv)
    cli.main()
  first, second = calls
  assert first[2] == second[2] and "--config.init=x" in first
  assert second == given


def test_programs_are_kept_in_a_folder_of_this_kind_of_machine(
  tmp_path, monkeypatch
):
  settings = {}
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  monkeypatch.setattr(jax.config, "update", settings.__setitem__)
  compilation.keep_programs()
  folder = compilation.cache_folder()
  assert settings["jax_compilation_cache_dir"] == str(folder)
  assert folder.is_dir() and folder.parent == tmp_path / "oreo_jax"
  # Who names a folder, or has a home that cannot be written to, keeps it so.
  settings.clear()
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
  compilation.keep_programs()
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  compilation.keep_programs()
  assert not settings


def test_a_value_network_on_the_same_layers_is_held_once(checkpoint, tmp_path):
  policy, model = models.load_hf(checkpoint)
  critic = models.value_params(policy, model)
  up = critic["layers"]["up"]
  up["kernel"] = up["kernel"].at[-1].multiply(2.0)
  folder = tmp_path / "value"
  models.save_hf(folder, critic, model, tokenizer=data.make_tokenizer("byte"))
  config = Config(
    init=str(checkpoint),
    generate=GenerateConfig(prompt="2 + 2 =", value=str(folder)),
  )
  workspace = Workspace(config, tmp_path / "nothing is written here")
  engine = generate._engine(workspace, workspace.layout("lm", "value"))
  assert models.stands_on(engine.critic, engine.policy)
  own, _ = models.layers_above(engine.critic, engine.critic_config)
  assert models.count_layers(own) == 1
