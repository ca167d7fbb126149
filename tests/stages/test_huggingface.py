"""From a Hugging Face checkpoint through the stages and back to one."""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import tiny
from safetensors.numpy import load_file

from oreo_jax import data, models, report
from oreo_jax.config import (
  Config,
  ConfigError,
  CriticConfig,
  DataConfig,
  LoraConfig,
  ModelConfig,
  TrainConfig,
)
from oreo_jax.models.hf.load import load_eos_ids, load_hf_config
from oreo_jax.stages import collect, evaluate, export, sft, train
from oreo_jax.stages import trajectories as trajectory_values
from oreo_jax.stages.workspace import Workspace
from oreo_jax.tasks import Problem
from oreo_jax.train import OBJECTIVES, full_params, init_state, make_setup

TEMPLATE = (
  "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|turn|>\n"
  "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_tokenizer():
  tokenizer = data.make_tokenizer("byte")
  tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
  tokenizer.chat_template = TEMPLATE
  return tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """A random Qwen2 of 2 layers with a byte tokenizer and a chat template."""
  path = tmp_path_factory.mktemp("checkpoint") / "tiny"
  tokenizer = chat_tokenizer()
  config = models.preset("tiny-qwen2", vocab_size=len(tokenizer) + 4)
  params = tiny.draw_params(config)
  models.save_hf(path, params, config, tokenizer=tokenizer, eos_ids=(257, 0))
  return path


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory):
  """Right answers say so: a critic can learn it."""
  path = tmp_path_factory.mktemp("data") / "answers.jsonl"
  rng = np.random.default_rng(0)
  data.save_trajectories(
    path,
    [
      data.Trajectory.from_text(
        f"{problem}?",
        ("yes" if right else "no") + " so" * int(rng.integers(1, 4)),
        float(right),
        id=f"{problem}/{right}",
        problem=str(problem),
      )
      for problem in range(24)
      for right in (0, 1)
    ],
  )
  return path


def make_config(init, path, **settings):
  train = {
    "objective": "value",
    "batch_size": 8,
    "epochs": 10.0,
    "critic_lr": 3e-2,
    "log_every": 4,
    "measure_every": 0,
    **settings,
  }
  return Config(
    init=str(init),
    critic=CriticConfig(kind="lora"),
    lora=LoraConfig(rank=2, alpha=2.0),
    data=DataConfig(path=str(path), row_length=32, held_out=0.25),
    train=TrainConfig(**train),
  )


@pytest.fixture(scope="module")
def trained(checkpoint, trajectories, tmp_path_factory):
  """The work directory of a critic with adapters on the checkpoint."""
  config = make_config(checkpoint, trajectories)
  workspace = Workspace(config, tmp_path_factory.mktemp("value"))
  with jax.set_mesh(workspace.mesh):
    train.train_objective(workspace)
    export.export(workspace)
  return workspace


def test_architecture_comes_from_the_checkpoint(
  checkpoint, trajectories, tmp_path
):
  config = make_config(checkpoint, trajectories)
  ours = {"unroll": 2, "remat": "dots", "attention": "blockwise"}
  ours["attention_block"] = 16
  config.model = ModelConfig(num_layers=7, **ours)
  found = Workspace(config, tmp_path).config.model
  want = load_hf_config(checkpoint)
  assert found == dataclasses.replace(want, **ours)
  assert found.num_layers == 2 and found.qkv_bias and found.family == "qwen2"


def test_tokenizer_and_every_end_come_from_the_checkpoint(
  checkpoint, trajectories, tmp_path
):
  config = make_config(checkpoint, trajectories)
  workspace = Workspace(config, tmp_path / "plain")
  assert workspace.tokenizer.chat_template == TEMPLATE
  assert load_eos_ids(checkpoint) == (257, 0)
  assert workspace.codec.end_ids == (257, 0)
  # A base model under a chat template: the turn's end is none of its EOS.
  config.data.chat = True
  turn = workspace.tokenizer.convert_tokens_to_ids("<|turn|>")
  assert Workspace(config, tmp_path / "chat").codec.end_ids == (257, 0, turn)


def test_chat_wraps_prompts_and_answers(checkpoint, trajectories, tmp_path):
  config = make_config(checkpoint, trajectories)
  config.data.chat = True
  workspace = Workspace(config, tmp_path)
  trajectory = workspace.trajectories()[1]
  sequence = data.tokenize_trajectory(trajectory, workspace.tokenizer)
  text = workspace.tokenizer.decode(sequence.tokens)
  assert text == f"<user>0?<|turn|>\n<assistant>{trajectory.response}<|turn|>"
  answer = workspace.tokenizer.decode(sequence.tokens[sequence.action_mask])
  assert answer == f"{trajectory.response}<|turn|>"
  # Sampling starts from the same tokens.
  (prompt,) = workspace.codec.prompts([Problem("0", "0?")])
  np.testing.assert_array_equal(prompt, sequence.tokens[~sequence.action_mask])


def test_policy_starts_from_the_checkpoint(checkpoint, trajectories, tmp_path):
  workspace = Workspace(make_config(checkpoint, trajectories), tmp_path)
  want = models.load_hf(checkpoint)[0]
  tiny.assert_trees_close(workspace.start_policy(), want, rtol=0, atol=0)


def test_value_objective_learns_and_keeps_no_policy(trained):
  rows = [
    json.loads(line)
    for line in (trained.path("value") / "metrics.jsonl").open()
  ]
  assert rows[-1]["value/loss"] < 0.5 * rows[0]["value/loss"]
  assert not any(key.startswith(("policy/", "lr/policy")) for key in rows[0])
  held = trained.record("value")["held_out_values"]
  assert held["heldout/within_problem_auc"] == 1.0
  assert trained.roles("value") == ["critic"]


@pytest.fixture(scope="module")
def adapted_above(checkpoint, trajectories, tmp_path_factory):
  """Critics with adapters in the last layer alone, by `train.keep_trunk`."""
  workspaces = {}
  for keep_trunk in (False, True):
    config = make_config(
      checkpoint,
      trajectories,
      epochs=3.0,
      log_every=1,
      critic_lr=3e-3,
      keep_trunk=keep_trunk,
    )
    config.lora.last_layers = 1
    folder = tmp_path_factory.mktemp("adapted")
    workspace = workspaces[keep_trunk] = Workspace(config, folder)
    with jax.set_mesh(workspace.mesh):
      train.train_objective(workspace)
  return workspaces


def test_a_kept_trunk_trains_as_one_that_runs_every_step(adapted_above):
  losses = {}
  for keep_trunk, workspace in adapted_above.items():
    folder = workspace.path("value")
    assert (folder / "trunk").is_dir() == keep_trunk
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    losses[keep_trunk] = [json.loads(line)["value/loss"] for line in lines]
  # The states are kept in bfloat16.
  assert len(losses[True]) > 4
  np.testing.assert_allclose(losses[True], losses[False], rtol=2e-2)
  assert losses[True] != losses[False]


def test_a_search_holds_the_frozen_layers_once(adapted_above, trained):
  for workspace, alike in ((adapted_above[False], True), (trained, False)):
    layout = workspace.layout("lm", "value")
    policy = layout.place(workspace.start_policy())
    critic = evaluate._judge(workspace, layout, "value", policy).critic
    assert models.has_trunk(critic) == alike
    if alike:
      assert models.stands_on(critic, policy)
      own, config = models.layers_above(critic, layout.model)
      assert config.num_layers == models.count_layers(own) == 1
    # What it says is what the saved one says.
    whole = workspace.load_model("value", "critic")[0]
    tokens = jnp.arange(12, dtype=jnp.int32)[None]
    want, got = (
      models.values(x, models.apply(x, tokens, layout.model).hidden)
      for x in (whole, critic)
    )
    assert np.ptp(want) > 1e-3
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_value_objective_trains_adapters_on_one_copy_of_the_base(checkpoint):
  base, model = models.load_hf(checkpoint)
  config = make_config(checkpoint, "")
  config.model = model
  setup = make_setup(config, OBJECTIVES["value"], 8)
  state = init_state(jax.random.key(0), setup, base)
  full = full_params(state.params, base, setup)
  assert set(state.params) == set(state.opt_state) == {"critic"}
  critic = full["critic"]
  assert critic["embedding"] is base["embedding"]
  assert critic["layers"]["q"]["kernel"] is base["layers"]["q"]["kernel"]
  trained = models.count_params(state.params)
  moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
  # Two moments a weight, and the counters.
  assert 2 * trained <= moments <= 2 * trained + 4
  assert trained < 0.3 * models.count_params(base)


def test_export_is_the_critic_that_was_trained(trained):
  path = trained.path("export") / "value"
  assert not (trained.path("export") / "policy").exists()
  hf = json.loads((path / "config.json").read_text())
  assert hf["architectures"] == ["Qwen2ForSequenceClassification"]
  params, config = models.load_hf(path)
  want, architecture = trained.load_model("value", "critic")
  assert config == architecture
  tiny.assert_trees_close(params, want, rtol=0, atol=0)
  assert data.load_tokenizer(path).chat_template == TEMPLATE
  assert "score.weight" in load_file(path / "model.safetensors")


def test_export_holds_the_adapters_alone_too(trained, checkpoint):
  folder = trained.path("export")
  adapter = load_file(folder / "value_adapter" / "adapter_model.safetensors")
  settings = json.loads(
    (folder / "value_adapter" / "adapter_config.json").read_text()
  )
  assert settings["base_model_name_or_path"] == str(checkpoint)
  base = load_file(checkpoint / "model.safetensors")
  merged = load_file(folder / "value" / "model.safetensors")
  scale = settings["lora_alpha"] / settings["r"]
  names = [n.removesuffix(".lora_A.weight") for n in adapter if "lora_A" in n]
  assert len(names) == 2 * 7  # layers, targets
  moved = 0.0
  for name in names:
    down = adapter[f"{name}.lora_A.weight"]
    update = scale * adapter[f"{name}.lora_B.weight"] @ down
    leaf = name.removeprefix("base_model.model.") + ".weight"
    want = base[leaf] + update
    np.testing.assert_allclose(merged[leaf], want, atol=1e-6)
    moved = max(moved, np.abs(update).max())
  assert moved > 1e-3
  assert not (folder / "policy_adapter").exists()


def test_export_does_not_overwrite_unasked(trained):
  with pytest.raises(ConfigError, match="--overwrite"):
    export.export(trained)


def test_export_needs_a_trained_model(checkpoint, trajectories, tmp_path):
  workspace = Workspace(make_config(checkpoint, trajectories), tmp_path)
  with pytest.raises(ConfigError, match="run the stage `value`"):
    export.export(workspace)


def test_exported_policy_starts_another_run(checkpoint, trajectories, tmp_path):
  config = make_config(
    checkpoint, trajectories, objective="rejection", lr=1e-3, max_steps=1
  )
  workspace = Workspace(config, tmp_path / "first")
  with jax.set_mesh(workspace.mesh):
    train.train_objective(workspace)
    export.export(workspace)
  policy = workspace.path("export") / "policy"
  assert load_eos_ids(policy) == workspace.codec.end_ids
  again = Workspace(make_config(policy, trajectories), tmp_path / "second")
  assert again.config.model == workspace.config.model
  want = workspace.load_model("rejection", "policy")[0]
  tiny.assert_trees_close(again.start_policy(), want, rtol=0, atol=0)


def test_a_frozen_policy_is_an_objective_of_its_own():
  with pytest.raises(ConfigError, match="train.objective=value"):
    TrainConfig(critic_warmup=1.0).validate("train")


def test_evaluation_without_a_task_judges_the_value(trained):
  with jax.set_mesh(trained.mesh):
    results = evaluate.evaluate(trained)
  scores = {row["name"]: row for row in results["value_scores"]["scores"]}
  value = scores[trajectory_values.VALUE]
  assert value["within_auc"] == value["pooled_auc"] == 1.0
  # Before the answer nothing tells one answer from another.
  assert scores[trajectory_values.START]["within_auc"] == 0.5
  assert results["problems"] == 6 and results["methods"] == []
  assert results["values"]["pooled_auc"][-1] == 1.0
  assert report.read_results(trained.directory) == results
  assert "AUC within" in report.format_table(results)
  page = report.write_report(trained.directory).read_text()
  assert trajectory_values.LOGP in page and "Accuracy</h2>" not in page


def test_scores_of_answers_do_not_depend_on_packing(trained):
  held = data.split_by_problem(trained.trajectories(), fraction=0.25, seed=0)[1]
  sequences = data.tokenize_trajectories(held, trained.tokenizer)
  # Too long for a row: it gets a longer one.
  long = data.Trajectory.from_text("x" * 40, "y" * 50, 0.0, problem="long")
  sequences += data.tokenize_trajectories([long], trained.tokenizer)
  critic = trained.load_model("value", "critic")[0]
  base, model = trained.start_policy(), trained.config.model
  with jax.set_mesh(trained.mesh):
    along, answer_logps = trajectory_values.score_trajectories(
      trained, sequences, "value"
    )
  for index in (0, len(sequences) - 1):
    sequence = sequences[index]
    tokens = jax.numpy.asarray(sequence.tokens[None])
    hidden = models.apply(critic, tokens, model).hidden
    want = np.asarray(models.values(critic, hidden))[0, :-1]
    mask = sequence.action_mask[1:]
    np.testing.assert_allclose(along[index], want[mask], atol=1e-5)
    hidden = models.apply(base, tokens, model).hidden
    logits = models.logits(base, hidden, model)[0, :-1]
    logps = jax.nn.log_softmax(logits)[np.arange(len(mask)), tokens[0, 1:]]
    np.testing.assert_allclose(answer_logps[index], logps[mask], atol=1e-4)


def test_stages_of_a_chat_model_on_a_local_file(checkpoint, tmp_path):
  rows = [
    {"question": f"1+{i}?", "answer": f"It is {1 + i}.\n#### {1 + i}"}
    for i in range(8)
  ]
  file = tmp_path / "problems.jsonl"
  file.write_text("\n".join(map(json.dumps, rows)))
  config = make_config(checkpoint, "")
  config.task.name = "gsm8k"
  config.task.options = {"path": str(file), "prompt": "{question}"}
  config.data.chat = True
  config.data.row_length = 64
  config.sft.batch_size, config.sft.max_steps = 8, 1
  config.collect.problems, config.collect.samples = 2, 2
  config.collect.max_new_tokens = 4
  workspace = Workspace(config, tmp_path / "run")
  with jax.set_mesh(workspace.mesh):
    sft.fine_tune(workspace)
    collect.collect(workspace)
  assert workspace.record("sft")["demonstrations"] > 0
  for trajectory in workspace.trajectories():
    assert trajectory.is_chat and trajectory.turns[0].role == "user"
    assert trajectory.turns[0].content.startswith("1+")


@pytest.mark.parametrize(
  "name",
  [
    "gsm8k_smollm2_135m",
    "gsm8k_math_qwen2p5_1p5b",
    "gsm8k_math_deepseekmath_7b",
  ],
)
def test_published_configs_are_valid(name):
  root = pathlib.Path(__file__).parents[2]
  spec = importlib.util.spec_from_file_location(
    name, root / "configs" / f"{name}.py"
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  variants = ("math", "gsm8k") if "math" in name else ()
  for config in [module.get_config(), *map(module.get_config, variants)]:
    config.validate()
    assert config.critic.kind == ("separate" if "qwen" in name else "lora")
