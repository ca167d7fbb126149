"""The command line, in processes of its own and, where enough, in this one."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from oreo_jax import cli
from oreo_jax.config import Config, ConfigError, save_config
from oreo_jax.train import DivergedError, PreemptedError

ROOT = pathlib.Path(__file__).parents[1]
MAZE = ROOT / "configs" / "maze.py"


def start(*arguments, cwd, devices=2, **variables):
  """Starts `python -m oreo_jax` on simulated devices."""
  # The flags of the tests; of two counts the last one holds.
  count = f"--xla_force_host_platform_device_count={devices}"
  environment = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {count}",
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    **variables,
  }
  return subprocess.Popen(
    [sys.executable, "-m", "oreo_jax", *map(str, arguments)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=cwd,
    env=environment,
  )


def oreo(*arguments, cwd, devices=2):
  """Runs `python -m oreo_jax`; returns its code, and what it printed."""
  process = start(*arguments, cwd=cwd, devices=devices)
  try:
    output, error = process.communicate(timeout=900)
  finally:
    process.kill()
  return process.returncode, output, error


@pytest.mark.parametrize(
  "argument, nearest",
  [
    ("--config.train.lrr=1", "config.train.lr?"),
    ("--config.trian.lr=1", "config.train.lr?"),
    ("--config.evaluate.budget=(1,)", "config.evaluate.budgets?"),
    ("--config.task.options.varient=easy", "config.task.options.variant?"),
  ],
)
def test_unknown_flag_names_the_nearest(argument, nearest):
  for file in ([f"--config={MAZE}"], ["--config", str(MAZE)]):
    with pytest.raises(ConfigError, match="is not a setting") as caught:
      cli.check_overrides([*file, argument])
    assert f"did you mean {nearest}" in str(caught.value)


def test_known_flags_pass():
  cli.check_overrides(
    ["run", f"--config={MAZE}:easy", "--config.train.lr=1", "--workdir=x"]
  )
  cli.check_overrides(["run", "--config.train.nonsense=1"])  # no file: later


def parse_config(*arguments):
  """The config that the command line's own parser makes of flags."""
  values = flags.FlagValues()
  argv = ["oreo", f"--config={MAZE}", *arguments]
  holder = config_flags.DEFINE_config_file(
    "config", flag_values=values, sys_argv=argv
  )
  values(argv)
  return holder.value


@pytest.mark.parametrize(
  "arguments, budgets",
  [
    ([], (1, 3, 7)),
    (["--config.evaluate.budgets=1,3"], (1, 3)),
    (["--config.evaluate.budgets=4"], (4,)),
    (["--config.evaluate.budgets", "(1, 2)"], (1, 2)),
    # The last one counts: this used to give (1, 1, 3).
    (["--config.evaluate.budgets=1", "--config.evaluate.budgets=1,3"], (1, 3)),
  ],
)
def test_the_last_tuple_flag_counts(arguments, budgets):
  config = parse_config(*arguments)
  config.validate()
  assert config.evaluate.budgets == budgets


def test_words_in_a_tuple_flag_need_no_quotes():
  config = parse_config(
    "--config.baselines=dpo", "--config.baselines=rejection,dqo"
  )
  config.validate()
  assert config.baselines == ("rejection", "dqo")


@pytest.mark.parametrize("arguments", [["frobnicate"], [], ["sft", "collect"]])
def test_bad_command_prints_the_usage(tmp_path, arguments):
  code, _, error = oreo(*arguments, f"--config={MAZE}", cwd=tmp_path)
  assert code != 0
  assert "usage: oreo sft | collect" in error
  assert "Traceback" not in error
  assert not list(tmp_path.iterdir())


def test_a_bucket_as_work_directory_is_refused():
  # It used to become the folder `gs:` of the current one.
  with pytest.raises(ConfigError, match="file system that all hosts share"):
    cli.checked_workdir("gs://bucket/run")
  assert cli.checked_workdir("runs/a") == "runs/a"


def test_unknown_key_and_wrong_type_are_one_line_each(tmp_path):
  code, _, error = oreo(
    "sft", f"--config={MAZE}", "--config.sft.lrr=1", cwd=tmp_path
  )
  assert code == 2 and "did you mean config.sft.lr?" in error
  assert "Traceback" not in error
  code, _, error = oreo(
    "sft", f"--config={MAZE}", "--config.sft.lr=fast", cwd=tmp_path
  )
  assert code != 0 and "config.sft.lr" in error and "fast" in error
  assert "Traceback" not in error


@pytest.mark.parametrize(
  "command, steps, message",
  [
    ("sft", "13:10", "--profile=13:10: expected the first and the last step"),
    ("sft", "0:3", "--profile=0:3: expected the first and the last step"),
    ("sft", "ten", "--profile=ten: expected the first and the last step"),
    ("evaluate", "1:2", "`oreo evaluate` does not train; the commands that do"),
  ],
)
def test_a_wrong_profile_is_one_line(tmp_path, command, steps, message):
  code, _, error = oreo(
    command, f"--config={MAZE}", f"--profile={steps}", cwd=tmp_path
  )
  assert code == 2 and message in error
  assert "Traceback" not in error
  assert not list(tmp_path.iterdir())


def test_saved_config_with_a_setting_that_is_gone_is_one_line(tmp_path):
  path = tmp_path / "config.py"
  save_config(Config(), path)
  path.write_text(path.read_text().replace("'lr':", "'lrate':", 1))
  with pytest.raises(ConfigError) as caught:
    cli.check_overrides([f"--config={path}"])
  assert str(caught.value) == (
    f"{path}: config.sft.lrate is not a setting; did you mean config.sft.lr?"
  )


def test_bad_rows_through_the_command_line(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text('{"prompt": "a", "response": "b", "reward": 1}\n{"pro\n')
  code, _, error = oreo(
    "train",
    f"--config={ROOT / 'configs' / 'trajectories.py'}:tiny",
    f"--config.data.path={path}",
    cwd=tmp_path,
  )
  assert code == 2 and "rows.jsonl:2" in error and "Traceback" not in error


@pytest.mark.parametrize(
  ("error", "code"),
  [
    (ConfigError("set --config.x"), 2),
    (DivergedError("lower the rate"), 2),
    (PreemptedError("saved at step 3"), 75),
  ],
)
def test_exit_codes_are_one_line_each(monkeypatch, capsys, error, code):
  def fail(unused_main):
    raise error

  monkeypatch.setattr(cli.app, "run", fail)
  monkeypatch.setattr(cli.sys, "argv", ["oreo"])
  with pytest.raises(SystemExit) as caught:
    cli.main()
  assert caught.value.code == code
  assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize(
  "error",
  [
    RuntimeError("XLA: internal"),
    # What jax raises in one process when another one has died. This used to be
    # taken for an error that its line explains.
    ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"),
  ],
)
def test_an_error_that_explains_nothing_keeps_its_traceback(monkeypatch, error):
  def fail(unused_main):
    raise error

  monkeypatch.setattr(cli.app, "run", fail)
  monkeypatch.setattr(cli.sys, "argv", ["oreo"])
  with pytest.raises(type(error), match=str(error)):
    cli.main()


SMALL = """
import importlib.util

from oreo_jax.config import ModelConfig

spec = importlib.util.spec_from_file_location("maze", {maze!r})
maze = importlib.util.module_from_spec(spec)
spec.loader.exec_module(maze)


def get_config():
  config = maze.get_config("easy")
  config.model = ModelConfig(
    embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8,
    mlp_dim=32,
  )
  config.sft.examples, config.sft.batch_size = 256, 16
  config.sft.epochs = 4.0
  config.collect.problems, config.collect.skip = 16, 256
  config.collect.samples = 8
  config.train.batch_size, config.train.epochs = 8, 1.0
  config.evaluate.problems, config.evaluate.value_problems = 16, 8
  config.evaluate.budgets, config.evaluate.value_samples = (1, 2), 4
  config.baselines = ()
  return config
"""


@pytest.mark.slow
def test_run_from_end_to_end_and_again(tmp_path):
  path = tmp_path / "small.py"
  path.write_text(SMALL.format(maze=str(MAZE)))
  code, output, error = oreo(
    "run", f"--config={path}", "--workdir=run", cwd=tmp_path
  )
  assert code == 0, error[-3000:]
  results = json.loads((tmp_path / "run" / "results.json").read_text())
  searches = {
    (m["policy"], m["search"], m["budget"]) for m in results["methods"]
  }
  assert {
    ("sft", "greedy", 1),
    ("oreo", "greedy", 1),
    ("oreo", "vote", 2),
    ("oreo", "weighted_vote", 2),
    ("oreo", "best_of_n", 2),
    ("oreo", "beam", 2),
  } <= searches
  for method in results["methods"]:
    assert method["total"] == 16
    assert 0 <= method["accuracy"] <= 1
    low, high = method["interval"]
    assert low <= method["accuracy"] <= high
  page = (tmp_path / "run" / "report.html").read_text()
  assert "<svg" in page and "http://" not in page.replace(
    "http://www.w3.org", ""
  )
  for stage in ("sft", "collect", "oreo"):
    assert f"{stage}: " in output
  # The saved config is a config; nothing is done twice.
  before = (tmp_path / "run" / "oreo" / "record.json").read_bytes()
  saved = tmp_path / "run" / "config.py"
  code, _, error = oreo("run", f"--config={saved}", cwd=tmp_path)
  assert code == 0, error[-3000:]
  assert "oreo is done" in error
  assert (tmp_path / "run" / "oreo" / "record.json").read_bytes() == before
  # Another setting is an error that names it.
  code, _, error = oreo(
    "train", f"--config={saved}", "--config.train.beta=0.5", cwd=tmp_path
  )
  assert code == 2
  assert "config.train.beta" in error and "--overwrite" in error


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
  rows = [
    {"prompt": f"{i} + 1?", "response": f"{i + j}", "reward": int(j == 1)}
    for i in range(40)
    for j in (1, 2)
  ]
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  command = [
    "train",
    f"--config={ROOT / 'configs' / 'trajectories.py'}:tiny",
    f"--config.data.path={path}",
    "--config.data.tokenizer=byte",
    "--config.data.row_length=32",
    "--config.data.held_out=0.2",
    "--config.mesh.fsdp=2",
    "--config.train.max_steps=3",
    "--config.train.batch_size=8",
    "--config.train.log_every=1",
  ]
  code, _, error = oreo(*command, "--workdir=one", cwd=tmp_path, devices=4)
  assert code == 0, error[-3000:]
  # What SLURM tells two tasks of a job.
  job = {
    "SLURM_JOB_ID": str(os.getpid()),
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_NTASKS": "2",
  }
  tasks = [
    start(
      *command,
      "--workdir=two",
      "--distributed",
      cwd=tmp_path,
      SLURM_PROCID=str(task),
      SLURM_LOCALID=str(task),
      **job,
    )
    for task in range(2)
  ]
  try:
    for task in tasks:
      error = task.communicate(timeout=600)[1]
      assert task.returncode == 0, error[-3000:]
  finally:
    for task in tasks:
      task.kill()
  one, two = (
    [
      json.loads(line)
      for line in (tmp_path / run / "oreo" / "metrics.jsonl").open()
    ]
    for run in ("one", "two")
  )
  assert len(one) == len(two) == 3
  for name in ("loss", "grad_norm/policy", "grad_norm/critic"):
    assert [r[name] for r in two] == pytest.approx(
      [r[name] for r in one], rel=1e-4
    )
  name = "heldout/pooled_auc"
  assert two[-1][name] == pytest.approx(one[-1][name], abs=1e-6)


LOST_SIGNAL = """
import gc, os, signal, time
from oreo_jax import cli
from oreo_jax.train import PreemptedError

cli._stop_on_sigterm()

def interrupted(phase, info):
  gc.callbacks.remove(interrupted)
  os.kill(os.getpid(), signal.SIGTERM)
  for _ in range(3):
    pass  # where Python looks for signals

gc.callbacks.append(interrupted)
try:
  gc.collect()
  print("lost")
  time.sleep(30)
except PreemptedError:
  print("stopped")
"""


def test_a_sigterm_in_a_garbage_collection_is_not_lost():
  result = subprocess.run(
    [sys.executable, "-c", LOST_SIGNAL],
    capture_output=True,
    text=True,
    timeout=60,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
  )
  assert result.stdout.split() == ["lost", "stopped"], result.stderr
