"""What several processes agree on, with real ones."""

import signal
import time

import numpy as np
import pytest
from oracles import processes

from oreo_jax import hosts
from oreo_jax.train.checkpoint import Checkpoints
from oreo_jax.watch import Verdict


def test_one_process_answers_for_itself():
  agreement = hosts.StopAgreement()
  assert [agreement.reached(i, i == 2) for i in range(4)] == [0, 0, 1, 0]
  assert hosts.any_of(True) and not hosts.any_of(False)
  assert hosts.is_chief()


class Clock:
  """In place of `time` and of the other processes."""

  def __init__(self, monkeypatch, paces):
    self.now = 0.0
    self.asked = []  # by process, the steps at which it asked
    self.paces = paces
    monkeypatch.setattr(hosts.time, "perf_counter", lambda: self.now)
    monkeypatch.setattr(hosts.jax, "process_count", lambda: len(paces))

  def gather(self, mine):
    others = [[0.0, pace] for pace in self.paces[1:]]
    return np.asarray([mine, *others], np.float32)


@pytest.mark.parametrize(
  "paces, interval", [([0.1, 0.1], 20), ([0.1, 0.5], 4), ([5.0, 0.1], 1)]
)
def test_processes_ask_by_the_pace_of_the_slowest(monkeypatch, paces, interval):
  clock = Clock(monkeypatch, paces)
  asked = []

  def gather(mine):
    asked.append(step)
    return clock.gather(mine)

  monkeypatch.setattr(
    "jax.experimental.multihost_utils.process_allgather", gather
  )
  agreement = hosts.StopAgreement(seconds=2.0)
  for step in range(1, 200):
    clock.now += paces[0]
    assert not agreement.reached(step, False)
  assert asked[0] == 1
  gaps = np.diff(asked)
  # Doubles at most, and ends where a question comes every two seconds.
  assert (gaps[1:] <= 2 * gaps[:-1]).all()
  assert gaps[-1] == pytest.approx(interval, abs=1)


class Blamed:
  """In place of the watch: the run ends because of process 1."""

  def __init__(self, message):
    self.verdict = Verdict(75, f"process 1 (host b) failed: {message}", 1)

  def fail(self, code, message):
    return self.verdict


@pytest.mark.parametrize(
  "index, message, printed",
  [
    # All stopped at the same step: the chief says it, and process 1.
    (0, "saved at step 3", "error: saved at step 3\n"),
    (1, "saved at step 3", "error: saved at step 3\n"),
    (2, "saved at step 3", ""),
    # What another process saw of it is not worth a traceback.
    (
      0,
      "Connection reset",
      "\nerror: process 1 (host b) failed: saved at step",
    ),
    (
      2,
      "Connection reset",
      "\nerror: process 1 (host b) failed: saved at step",
    ),
  ],
)
def test_a_run_that_ends_says_why_once(
  monkeypatch, capsys, index, message, printed
):
  codes = []
  monkeypatch.setattr(hosts, "_watch", Blamed("saved at step 3"))
  monkeypatch.setattr(hosts.jax, "process_index", lambda: index)
  monkeypatch.setattr(hosts.os, "_exit", codes.append)
  hosts.fail(75, message, f"error: {message}")
  error = capsys.readouterr().err
  assert error.startswith(printed) and bool(error) == bool(printed)
  assert codes == [75]


def test_a_process_alone_fails_by_itself():
  hosts.fail(2, "no file", "error: no file")  # returns


_TRAIN = """
import dataclasses, pathlib, time
from oracles import tiny
from oreo_jax.config import Config, MeshConfig, SftConfig
from oreo_jax.data import make_loader
from oreo_jax.sharding import make_mesh
from oreo_jax.train import OBJECTIVES, PreemptedError, fit, make_setup

directory = pathlib.Path(sys.argv[4])
count = jax.process_count()

class Slow:
  def __init__(self, loader):
    self.loader = loader

  def batch(self, step):
    if step == 8:
      (directory / f"ready{jax.process_index()}").touch()
    time.sleep(0.02)
    return self.loader.batch(step)

stage = SftConfig(batch_size=4, lr=1e-2, log_every=500, measure_every=0,
                  checkpoint_every=1000)
config = Config(model=tiny.MODEL, sft=stage)
setup = make_setup(config, OBJECTIVES["sft"], 1000)
mesh = make_mesh(MeshConfig(data=-1, fsdp=2))
loader = make_loader(
  tiny.draw_sequences(40), batch_size=4, row_length=16, epochs=300,
  process_index=jax.process_index(), process_count=count,
)
base = tiny.place(tiny.draw_params(), tiny.MODEL, mesh)
with jax.set_mesh(mesh):
  try:
    fit(base, Slow(loader), setup, mesh=mesh, directory=directory / "run")
  except PreemptedError as error:
    print("stopped:", error)
"""


@pytest.mark.slow
def test_a_sigterm_to_one_process_stops_all_at_one_step(tmp_path):
  with processes.started(_TRAIN, tmp_path, processes=2, devices=2) as (
    first,
    second,
  ):
    deadline = time.monotonic() + 240
    while len(list(tmp_path.glob("ready*"))) < 2:
      assert time.monotonic() < deadline and second.poll() is None
      time.sleep(0.1)
    second.send_signal(signal.SIGTERM)
    outputs = [task.communicate(timeout=120)[0] for task in (first, second)]
    assert first.returncode == second.returncode == 0, outputs
  messages = [
    [line for line in text.splitlines() if line.startswith("stopped:")]
    for text in outputs
  ]
  assert messages[0] == messages[1] and len(messages[0]) == 1, outputs
  with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
    step = checkpoints.latest_step()
  assert 8 <= step < 1000
  assert f"is saved at step {step}:" in messages[0][0]
