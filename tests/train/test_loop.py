"""fit(): stopping, going on, and giving up."""

import functools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import processes, tiny

from oreo_jax.config import Config, ConfigError, SftConfig
from oreo_jax.data import make_loader
from oreo_jax.train import (
  OBJECTIVES,
  DivergedError,
  PreemptedError,
  fit,
  make_setup,
)
from oreo_jax.train.checkpoint import Checkpoints
from oreo_jax.train.flops import step_flops

STEPS = 6


@functools.cache
def base():
  return tiny.draw_params()


@functools.cache
def setup_of(**changes):
  stage = {
    "batch_size": 4,
    "lr": 1e-2,
    "log_every": 1,
    "measure_every": 0,
    "checkpoint_every": 2,
    **changes,
  }
  config = Config(model=tiny.MODEL, sft=SftConfig(**stage))
  config.validate()
  return make_setup(config, OBJECTIVES["sft"], STEPS)


class Steps:
  """A loader that calls `before(step)` ahead of each batch."""

  def __init__(self, before=lambda step: None):
    self._loader = make_loader(
      tiny.draw_sequences(20), batch_size=4, row_length=16, epochs=3
    )
    self._before = before
    self.asked = []

  def batch(self, step):
    self.asked.append(step)
    self._before(step)
    return self._loader.batch(step)


def run(directory, loader=None, setup=None, **options):
  mesh = tiny.mesh()
  with jax.set_mesh(mesh):
    return fit(
      base(),
      loader or Steps(),
      setup or setup_of(),
      mesh=mesh,
      directory=directory,
      **options,
    )


def rows(directory):
  lines = (directory / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def without_times(written):
  measured = ("time/", "speed/", "memory/")
  return [
    {k: v for k, v in row.items() if not k.startswith(measured)}
    for row in written
  ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  """An uninterrupted run."""
  directory = tmp_path_factory.mktemp("uninterrupted")
  state = run(directory)
  return jax.device_get(state), rows(directory)


def test_runs_to_the_end(uninterrupted):
  state, written = uninterrupted
  assert state.step == STEPS
  assert [row["step"] for row in written] == list(range(1, STEPS + 1))
  assert written[-1]["loss"] < written[0]["loss"]
  assert all(np.isfinite(list(row.values())).all() for row in written)


def test_rows_say_what_a_step_costs(uninterrupted):
  written = uninterrupted[1]
  assert "time/compile_s" in written[0]
  for row in written[1:]:
    assert "time/compile_s" not in row
    assert 0 < row["time/data_s"] < row["time/step_s"]
    assert row["memory/process_peak_gib"] > 0
    # A CPU has no peak in the table, and none is made up.
    assert "speed/mfu" not in row
    assert row["speed/step_flops"] == sum(
      step_flops(setup_of(), 4, 16).values()
    )
  # An epoch's tokens, counted from the sequences: all but the last of each.
  sequences = tiny.draw_sequences(20)
  slots = sum(len(s.tokens) - 1 for s in sequences)
  epoch = written[:2]
  tokens = sum(row["speed/tokens_per_s"] * row["time/step_s"] for row in epoch)
  assert tokens == pytest.approx(slots)
  assert [row["batch/fill"] for row in epoch] == pytest.approx(
    [row["batch/tokens"] / 64 for row in epoch]
  )


def test_a_trace_is_written_of_the_steps_asked_for(tmp_path):
  run(tmp_path, setup=setup_of(profile=(2, 3)))
  traces = list((tmp_path / "profile").rglob("*.xplane.pb"))
  assert len(traces) == 1
  data = jax.profiler.ProfileData.from_file(str(traces[0]))
  steps = {
    dict(event.stats)["step_num"]
    for plane in data.planes
    for line in plane.lines
    for event in line.events
    if event.name == "train"
  }
  assert steps == {2, 3}


def test_a_trace_of_steps_that_never_come_is_one_error(tmp_path):
  with pytest.raises(ConfigError, match="--profile=5:9.*has 6 steps"):
    run(tmp_path, setup=setup_of(profile=(5, 9)))


def terminate_at(step):
  def before(now):
    if now == step:
      os.kill(os.getpid(), signal.SIGTERM)

  return before


def test_sigterm_saves_and_the_run_goes_on_bit_for_bit(uninterrupted, tmp_path):
  handler = signal.getsignal(signal.SIGTERM)
  with pytest.raises(PreemptedError, match="saved at step 4"):
    run(tmp_path, Steps(terminate_at(3)))
  assert signal.getsignal(signal.SIGTERM) is handler
  again = Steps()
  state = run(tmp_path, again)
  assert again.asked == [4, 5]
  tiny.assert_trees_close(state, uninterrupted[0], rtol=0, atol=0)
  assert without_times(rows(tmp_path)) == without_times(uninterrupted[1])


def test_a_crash_goes_on_from_the_last_checkpoint(uninterrupted, tmp_path):
  def crash(step):
    if step == 5:
      raise OSError("the disk went away")

  with pytest.raises(OSError, match="went away"):
    run(tmp_path, Steps(crash))
  again = Steps()
  state = run(tmp_path, again)
  assert again.asked == [4, 5]
  tiny.assert_trees_close(state, uninterrupted[0], rtol=0, atol=0)
  # Step 5 was written by both runs and stands there once.
  assert without_times(rows(tmp_path)) == without_times(uninterrupted[1])


def test_a_damaged_checkpoint_is_passed_over(uninterrupted, tmp_path):
  with pytest.raises(PreemptedError, match="saved at step 4"):
    run(tmp_path, Steps(terminate_at(3)))
  files = (tmp_path / "checkpoints" / "4" / "tree" / "d").iterdir()
  largest = max(files, key=lambda path: path.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)
  again = Steps()
  state = run(tmp_path, again)
  assert again.asked == [2, 3, 4, 5]
  tiny.assert_trees_close(state, uninterrupted[0], rtol=0, atol=0)
  # Steps 3 and 4 were written by both runs and stand there once.
  assert without_times(rows(tmp_path)) == without_times(uninterrupted[1])


def test_a_finished_run_is_not_run_again(uninterrupted, tmp_path):
  run(tmp_path)
  again = Steps()
  state = run(tmp_path, again)
  assert again.asked == []
  tiny.assert_trees_close(state, uninterrupted[0], rtol=0, atol=0)


def stand_in(figures):
  """In place of the compiled step: counts, and reports these figures."""

  def make_step(setup, state, mesh):
    del setup, state, mesh

    def step(state, ref, batch):
      del ref, batch
      number = int(state.step)
      metrics = {"loss": 1.0, "grad_norm/policy": 1.0}
      metrics |= {"batch/tokens": 1.0, "batch/action_tokens": 1.0}
      metrics |= figures.get(number, {})
      metrics = {k: jnp.float32(v) for k, v in metrics.items()}
      return state._replace(step=state.step + 1), metrics

    return step

  return make_step


@pytest.mark.parametrize("log_every", [1, 6])
@pytest.mark.parametrize(
  "figures",
  [
    {"loss": np.nan},
    {"loss": np.inf},
    # The loss is that before the update: the state is spoilt already.
    {"grad_norm/policy": np.nan},
  ],
)
def test_a_diverged_run_keeps_the_last_good_checkpoint(
  tmp_path, monkeypatch, figures, log_every
):
  monkeypatch.setattr(
    "oreo_jax.train.loop.make_train_step", stand_in({3: figures})
  )
  setup = setup_of(log_every=log_every)
  with pytest.raises(DivergedError, match="at step 4.*learning rate"):
    run(tmp_path, setup=setup)
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    assert checkpoints.latest_step() == 2


def test_measures_when_due_and_at_the_end(tmp_path, monkeypatch):
  monkeypatch.setattr("oreo_jax.train.loop.make_train_step", stand_in({}))
  calls = []

  def measure(state, ref):
    calls.append(int(state.step))
    assert ref is base()
    return {"heldout/figure": float(state.step)}

  run(tmp_path, setup=setup_of(measure_every=4), measure=measure)
  assert calls == [4, 6]
  written = {row["step"]: row.get("heldout/figure") for row in rows(tmp_path)}
  assert written == {1: None, 2: None, 3: None, 4: 4.0, 5: None, 6: 6.0}


def test_a_diverged_run_is_not_measured(tmp_path, monkeypatch):
  monkeypatch.setattr(
    "oreo_jax.train.loop.make_train_step", stand_in({3: {"loss": np.nan}})
  )

  def measure(state, ref):
    assert state.step < 4
    return {"heldout/figure": 0.5}

  with pytest.raises(DivergedError, match="loss is nan at step 4"):
    run(tmp_path, setup=setup_of(measure_every=1), measure=measure)
  # The row that shows it is written.
  assert [row["loss"] for row in rows(tmp_path)] == [1.0, 1.0, 1.0, None]


def test_weights_that_measure_as_no_number_have_diverged(tmp_path, monkeypatch):
  monkeypatch.setattr("oreo_jax.train.loop.make_train_step", stand_in({}))

  def measure(state, ref):
    if state.step == 4:
      raise FloatingPointError("a value of a held-out answer is not finite")
    return {"heldout/figure": 0.5}

  with pytest.raises(DivergedError, match="held-out .* at step 4.*lower the"):
    run(tmp_path, setup=setup_of(measure_every=2), measure=measure)
  assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    assert checkpoints.latest_step() == 2


_TRAIN = """
from oracles import tiny
from oreo_jax.config import Config, MeshConfig, SftConfig
from oreo_jax.data import make_loader
from oreo_jax.sharding import make_mesh, process_rows
from oreo_jax.train import OBJECTIVES, fit, make_setup

mesh = make_mesh(MeshConfig(data=2, tensor=4))
index, count = process_rows(mesh)
loader = make_loader(
  tiny.draw_sequences(20), batch_size=4, row_length=16, epochs=3,
  process_index=index, process_count=count,
)
stage = SftConfig(batch_size=4, lr=1e-2, log_every=1, measure_every=0,
                  checkpoint_every=2)
config = Config(model=tiny.MODEL, sft=stage)
setup = make_setup(config, OBJECTIVES["sft"], 6)
base = tiny.place(tiny.draw_params(), tiny.MODEL, mesh)
with jax.set_mesh(mesh):
  fit(base, loader, setup, mesh=mesh, directory=sys.argv[4])
"""


@pytest.mark.slow
@pytest.mark.parametrize("count, devices", [(4, 2), (2, 4)])
def test_a_tensor_axis_over_several_processes_trains_as_one(
  uninterrupted, tmp_path, count, devices
):
  processes.run(_TRAIN, tmp_path, processes=count, devices=devices)
  for name in ("loss", "grad_norm/policy"):
    assert [row[name] for row in rows(tmp_path)] == pytest.approx(
      [row[name] for row in uninterrupted[1]], rel=1e-4
    )
  # One process of one device goes on from what the others saved.
  again = Steps()
  state = run(tmp_path, again)
  assert again.asked == []
  tiny.assert_trees_close(
    state.params, uninterrupted[0].params, rtol=1e-3, atol=1e-4
  )
