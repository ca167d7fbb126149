"""The pool of environments: answers, crashes, hangs, and what is left."""

import functools
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from oracles.environments import Parrot, unable

from oreo_jax.tasks import Problem
from oreo_jax.tasks.environment import Environment, Step
from oreo_jax.tasks.environment_pool import EnvironmentPool, Lost


def problems(numbers, prompt=""):
  return {n: Problem(f"p{n}", prompt) for n in numbers}


@pytest.fixture
def make_pool():
  pools = []

  def make(make_environment=Parrot, **options):
    pools.append(EnvironmentPool(make_environment, **options))
    return pools[-1]

  yield make
  for pool in pools:
    pool.close()


def is_running(pid):
  try:
    status = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except FileNotFoundError:
    return False
  return status.rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(pids, seconds=10.0):
  end = time.monotonic() + seconds
  while any(map(is_running, pids)) and time.monotonic() < end:
    time.sleep(0.02)
  return not any(map(is_running, pids))


def play(pool, count, turns):
  """Plays episodes of different lengths; returns all that was said."""
  said = {number: [] for number in range(count)}
  unplayed = list(range(count))
  flying = {}
  while unplayed or flying:
    new = [unplayed.pop(0) for _ in range(min(pool.free, len(unplayed)))]
    for number, step in pool.start(problems(new)).items():
      said[number].append(step)
      flying[number] = 0
    actions = {}
    for number, turn in flying.items():
      last = turn == turns + number % 3
      actions[number] = f"end {number}" if last else f"go {turn}"
    for number, step in pool.step(actions).items():
      said[number].append(step)
      flying[number] += 1
      if step.done:
        del flying[number]
  return said


def test_the_number_of_workers_changes_nothing(make_pool):
  expected = play(make_pool(slots=1), 23, 4)
  assert expected[4][:2] == [Step("say something, p4"), Step("p4 1: go 0")]
  assert expected[4][-1] == Step("bye", 4.0, True)
  assert len(expected[4]) == 1 + 4 + 1 + 1
  for slots, workers in [(9, 0), (1, 1), (5, 2), (3, 3), (2, 5)]:
    pool = make_pool(slots=slots, workers=workers)
    assert play(pool, 23, 4) == expected
    assert pool.started == min(workers, slots)
    assert pool.free == slots and not pool.lost


@pytest.mark.parametrize("workers", [0, 2])
def test_listing_and_going_on_from_actions(make_pool, workers):
  pool = make_pool(slots=4, workers=workers)
  first = pool.start(problems([7, 8]), after={7: ["a", "b"]})
  assert first == {7: Step("p7 2: b"), 8: Step("say something, p8")}
  assert pool.actions([7, 8]) == {7: ["go on", "end 2"], 8: ["go on", "end 0"]}
  assert pool.step({8: "end 1"}) == {8: Step("bye", 1.0, True)}
  # Actions that end it are enough, and give its slot back.
  ended = pool.start(problems([9]), after={9: ["a", "end 3", "b"]})
  assert ended == {9: Step("bye", 3.0, True)}
  assert pool.free == 3
  pool.end([7, 7, 9])
  assert pool.free == 4
  with pytest.raises(ValueError, match=r"episodes \[7\] are not in flight"):
    pool.step({7: "a"})


class Mute(Environment):
  def reset(self, problem):
    return "?"

  def step(self, action):
    return Step("?")


def test_what_an_environment_need_not_have(make_pool):
  pool = make_pool(Mute, slots=1)
  pool.start(problems([0]))
  assert pool.actions([0]) == {0: None}
  assert Mute().copy() is None
  assert isinstance(Mute(), Environment)


CRASHES = [
  ("exit 3", "crash", "the process died (exit code 3)"),
  ("kill", "crash", "the process died (signal SIGKILL)"),
  ("abort", "crash", "the process died (signal SIGABRT)"),
  ("sleep 60", "timeout", "no answer within 2 s"),
  ("raise no such door", "error", "RuntimeError: no such door (environments."),
  ("quit", "error", "SystemExit: the engine gives up (environments."),
]


@pytest.mark.parametrize("action, kind, reason", CRASHES)
def test_one_episode_is_lost_and_no_other(make_pool, action, kind, reason):
  # Long enough for a busy machine where nothing hangs.
  timeout_s = 2.0 if kind == "timeout" else 60.0
  pool = make_pool(slots=6, workers=2, timeout_s=timeout_s)
  pool.start(problems(range(6)))
  pool.step({n: "a" for n in range(6)})
  actions = {n: "b" for n in range(6)} | {2: action}
  answers = pool.step(actions)
  lost = answers.pop(2)
  assert isinstance(lost, Lost)
  assert (lost.kind, lost.reason[: len(reason)]) == (kind, reason)
  # Those that shared its process go on as if nothing had been.
  assert answers == {n: Step(f"p{n} 2: b") for n in (0, 1, 3, 4, 5)}
  after = pool.step({n: "c" for n in answers})
  assert after == {n: Step(f"p{n} 3: c") for n in answers}
  assert pool.lost == {kind: 1}
  assert pool.started == (2 if kind == "error" else 3)
  # The slot takes another episode.
  assert pool.start(problems([9])) == {9: Step("say something, p9")}


@pytest.mark.parametrize("workers", [0, 1])
def test_exceptions_are_told_once(make_pool, workers, caplog):
  pool = make_pool(slots=3, workers=workers)
  answers = pool.start(problems([0, 1]) | problems([2], "no start"))
  assert answers[2].kind == "error"
  pool.step({0: "raise a", 1: "b"})
  warnings = [r.getMessage() for r in caplog.records]
  assert len(warnings) == 2
  assert (
    "episode 2 (problem p2) is lost: error: ValueError: this" in warnings[0]
  )
  assert pool.lost == {"error": 2} and pool.free == 2


def test_a_worker_killed_between_turns_loses_nothing(make_pool):
  pool = make_pool(slots=4, workers=2)
  pool.start(problems(range(4)))
  pids = {
    int(s.observation)
    for s in pool.step(dict.fromkeys(range(4), "pid")).values()
  }
  pool.step({n: f"a{n}" for n in range(4)})
  for pid in pids:
    os.kill(pid, signal.SIGKILL)
  assert len(pids) == 2 and wait_until_gone(pids)
  answers = pool.step({n: "b" for n in range(4)})
  assert answers == {n: Step(f"p{n} 3: b") for n in range(4)}
  assert not pool.lost and pool.started == 4


def test_an_episode_that_cannot_be_repeated_is_lost(make_pool):
  pool = make_pool(slots=2, workers=1)
  pool.start(problems([0, 1]))
  pool.step({0: "clock", 1: "a"})
  answers = pool.step({1: "kill", 0: "b"})
  assert answers[1].kind == "crash"
  assert "function of the problem and the actions" in answers[0].reason


def test_it_goes_on_after_an_interruption(make_pool, monkeypatch):
  pool = make_pool(slots=2, workers=2)
  pool.start(problems([0, 1]))
  pool.step({0: "a", 1: "a"})

  def interrupt(unused):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(pool._crew, "_wait", lambda: interrupt(None))
    with pytest.raises(KeyboardInterrupt):
      pool.step({0: "sleep 60", 1: "x"})
  assert pool.step({0: "b", 1: "b"}) == {n: Step(f"p{n} 2: b") for n in (0, 1)}


def test_large_messages_and_prints(make_pool):
  pool = make_pool(slots=1, workers=1)
  pool.start({0: Problem("p0", "x" * 3_000_000)})
  assert len(pool.step({0: "large 3000000"})[0].observation) == 3_000_000
  assert pool.step({0: "print \n{}"})[0].observation == "p0 2: print \n{}"
  odd = "\ud800 \x00 \N{SNOWMAN}"
  assert pool.step({0: odd})[0].observation == f"p0 3: {odd}"


def test_a_stopped_worker_takes_no_large_message_and_is_replaced(make_pool):
  pool = make_pool(slots=1, workers=1, timeout_s=2.0)
  pool.start(problems([0]))
  pid = int(pool.step({0: "pid"})[0].observation)
  os.kill(pid, signal.SIGSTOP)
  began = time.monotonic()
  assert pool.step({0: "x" * 3_000_000})[0].kind == "timeout"
  assert time.monotonic() - began < 20 and wait_until_gone([pid])


def test_what_an_engine_leaves_goes_with_its_process(make_pool):
  pool = make_pool(slots=3, workers=3)
  pool.start(problems(range(3)))
  children = pool.step(dict.fromkeys(range(3), "child"))
  folders = pool.step(dict.fromkeys(range(3), "folder"))
  pool.step({0: "kill"})
  first = int(children[0].observation)
  assert wait_until_gone([first])
  pool.close()
  assert wait_until_gone([int(c.observation) for c in children.values()])
  assert not any(os.path.exists(f.observation) for f in folders.values())


def test_workers_load_no_jax(make_pool):
  pool = make_pool(slots=1, workers=1)
  pool.start(problems([0]))
  heavy = "modules jax flax transformers oreo_jax.tasks"
  assert pool.step({0: heavy})[0].observation == "oreo_jax.tasks"


@pytest.mark.parametrize(
  "make_environment, reason",
  [
    (unable, "OSError: there is no engine here"),
    (functools.partial(Parrot, no_such_option=1), "no_such_option"),
  ],
)
def test_an_environment_that_cannot_be_made(
  make_pool, make_environment, reason
):
  pool = make_pool(make_environment, slots=2, workers=1)
  lost = pool.start(problems([0, 1]))
  assert all(
    step.kind == "error" and reason in step.reason for step in lost.values()
  )


def test_a_worker_that_cannot_start(make_pool, monkeypatch):
  # As an environment of the program itself, whose module has another name.
  monkeypatch.setattr(Mute, "__module__", "__main__")
  monkeypatch.setattr(sys.modules["__main__"], "Mute", Mute, raising=False)
  pool = make_pool(Mute, slots=2, workers=2)
  with pytest.raises(RuntimeError, match=r"attribute 'Mute'.*workers=0"):
    pool.start(problems([0, 1]))


@pytest.mark.parametrize(
  "options, message",
  [
    ({"slots": 0}, "slots must be at least 1"),
    ({"slots": 1, "workers": -1}, "workers must be 0 or more"),
    ({"slots": 1, "timeout_s": 0}, "timeout_s must be positive"),
  ],
)
def test_bad_settings(options, message):
  with pytest.raises(ValueError, match=message):
    EnvironmentPool(Parrot, **options)


def test_more_than_there_are_slots(make_pool):
  pool = make_pool(slots=2)
  with pytest.raises(ValueError, match="cannot start 3 episodes: 2 of 2 slots"):
    pool.start(problems(range(3)))
  pool.start(problems([1]))
  with pytest.raises(ValueError, match=r"episodes \[1\] are in flight already"):
    pool.start(problems([1]))


PARENT = """
import sys, time
from oracles.environments import Parrot
from oreo_jax.tasks import Problem
from oreo_jax.tasks.environment_pool import EnvironmentPool
pool = EnvironmentPool(Parrot, slots=3, workers=3, timeout_s=2.0)
pool.start({n: Problem(f"p{n}", "") for n in range(3)})
steps = pool.step(dict.fromkeys(range(3), "pid"))
print(*(step.observation for step in steps.values()), flush=True)
if "hang" in sys.argv:
  pool.step({0: "sleep 600"})
if "exit" not in sys.argv:
  time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  "state, blow",
  [
    ("idle", signal.SIGKILL),
    ("idle", signal.SIGTERM),
    ("idle", signal.SIGINT),
    ("hang", signal.SIGKILL),
    ("hang", signal.SIGINT),
    ("exit", None),
  ],
)
def test_no_worker_outlives_its_parent(state, blow):
  root = pathlib.Path(__file__).parents[2]
  path = os.pathsep.join([str(root), str(root / "tests")])
  parent = subprocess.Popen(
    [sys.executable, "-c", PARENT, state],
    env=os.environ | {"PYTHONPATH": path},
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
  )
  pids = [int(pid) for pid in parent.stdout.readline().split()]
  assert len(pids) == 3
  if blow:
    time.sleep(0.2)
    assert all(map(is_running, pids))
    parent.send_signal(blow)
  parent.wait(20)
  parent.stdout.close()
  # One in the middle of an action that never ends has a timer of its own.
  assert wait_until_gone(pids)


def memory_kb(pid):
  status = pathlib.Path(f"/proc/{pid}/status").read_text()
  return int(status.partition("VmRSS:")[2].split()[0])


@pytest.mark.slow
def test_memory_is_flat(make_pool):
  pool = make_pool(functools.partial(Parrot, size=10_000), slots=8, workers=1)
  play(pool, 200, 3)
  pool.start(problems([1000]))
  pid = int(pool.step({1000: "pid"})[1000].observation)
  before = memory_kb(pid), memory_kb(os.getpid())
  pool.end([1000])
  play(pool, 1000, 3)
  after = memory_kb(pid), memory_kb(os.getpid())
  assert after[0] - before[0] < 1000
  assert after[1] - before[1] < 4000
