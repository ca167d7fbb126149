"""Who is to blame when a run of several processes has to end."""

import os
import pathlib
import socket
import subprocess
import sys
import threading

import pytest

from oreo_jax import hosts
from oreo_jax.settings import ConfigError
from oreo_jax.watch import EXIT_LOST, Peer, Timeouts, Watch, judge

ROOT = pathlib.Path(__file__).parents[1]
TIMEOUTS = Timeouts(start=300, silence=60, hang=900, grace=10)


def peers(*changes):
  """Processes on hosts a, b, ..., heard of at second 1000, with changes."""
  return [
    Peer(**{"process": i, "host": "abc"[i], "heard": 1000.0, **change})
    for i, change in enumerate(changes)
  ]


@pytest.mark.parametrize(
  "changes, now",
  [
    (({}, {}), 1001),
    (({}, {}), 1060),
    # Some have done all their work and went.
    (({"still": 5}, {"ended": True, "lost": True, "heard": 0.0}), 1001),
    # One writes a big file and moves; the others have waited for long.
    (({"still": 3}, {"still": 5000}), 1001),
    # What failed may have seen the death of one who is not heard of any more.
    (
      ({"failure": (1, "reset"), "failed_at": 1001}, {"heard": 999}, {}),
      1020,
    ),
    # The others are given time to end by themselves.
    (({"failure": (75, "stopped"), "failed_at": 999}, {}), 1001),
  ],
)
def test_a_run_that_may_go_on(changes, now):
  assert judge(peers(*changes), now, TIMEOUTS) is None


@pytest.mark.parametrize(
  "changes, now, code, process, words",
  [
    (({}, {"lost": True}), 1001, EXIT_LOST, 1, "process 1 (host b) died"),
    (
      ({}, {"heard": 930.0}),
      1001,
      EXIT_LOST,
      1,
      "process 1 (host b) died: it was not heard of for 60 s",
    ),
    # A death comes before an error that it may have caused.
    (
      ({"failure": (1, "reset"), "failed_at": 999}, {"lost": True}),
      1001,
      EXIT_LOST,
      1,
      "process 1 (host b) died",
    ),
    (
      ({}, {"failure": (2, "no file x"), "failed_at": 990}),
      1001,
      2,
      1,
      "process 1 (host b) failed: no file x",
    ),
    # All have stopped: nobody is waited for, and the first is named.
    (
      (
        {"failure": (75, "saved"), "failed_at": 1001},
        {"failure": (75, "saved"), "failed_at": 1000, "lost": True},
      ),
      1001,
      75,
      1,
      "failed: saved",
    ),
    (
      (
        {"still": 901, "count": 9, "place": "step 9 (loop.py:1)"},
        {"still": 950, "count": 7, "place": "step 7 (loader.py:88)"},
        {"still": 920, "count": 9, "place": "step 9 (loop.py:1)"},
      ),
      1001,
      EXIT_LOST,
      1,
      "process 1 (host b) is at step 7 (loader.py:88). 2 others wait for it, "
      "at step 9 (loop.py:1)",
    ),
    (
      ({"still": 901, "place": "x"}, {"still": 950, "place": "y"}),
      1001,
      EXIT_LOST,
      -1,
      "process 0 (host a) is at x; process 1 (host b) is at y",
    ),
  ],
)
def test_a_run_that_ends_says_who_is_to_blame(
  changes, now, code, process, words
):
  verdict = judge(peers(*changes), now, TIMEOUTS)
  assert (verdict.code, verdict.process) == (code, process)
  assert words in verdict.message


def free_port():
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def meet(*processes, count=2, start=30.0, port=None):
  """What comes of it when these processes start, each in a thread."""
  address = ("localhost", port or free_port())
  outcomes = [None] * len(processes)

  def run(index, process, count):
    watch = Watch(address, count, process, Timeouts(start=start))
    try:
      outcomes[index] = watch.meet()
    except ConfigError as error:
      outcomes[index] = str(error)
    else:
      watch.leave()

  counts = count if isinstance(count, tuple) else (count,) * len(processes)
  threads = [
    threading.Thread(target=run, args=(index, *who))
    for index, who in enumerate(zip(processes, counts, strict=True))
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=60)
    assert not thread.is_alive()
  return outcomes


def test_processes_meet_and_leave_together():
  name = socket.gethostname()
  assert meet(0, 1, 2, count=3) == [[name] * 3] * 3


def test_a_process_that_does_not_come_is_named():
  first, second = meet(0, 2, count=3, start=2.0)
  assert first == second
  assert "only 2 of 3 processes came within 2 s (--start_timeout)" in first
  assert "missing 1;" in first and "process 2 (host" in first


def test_process_0_that_does_not_come_is_named_with_its_address():
  port = free_port()
  [message] = meet(1, start=2.0, port=port)
  assert (
    f"process 1 of 2 did not reach process 0 at localhost:{port}" in message
  )
  assert "firewall" in message


def test_processes_that_do_not_fit_together_all_say_why():
  messages = meet(0, 1, count=(2, 3), start=20.0)
  assert messages[0] == messages[1]
  assert "process 1 on host" in messages[0]
  assert "was told of 3 processes, process 0 of 2" in messages[0]
  # A stranger is turned away, and the others are told.
  messages = meet(0, 1, 1, count=3, start=20.0)
  assert "says it is process 1 of 3, as does host" in messages[0]


def test_a_port_that_is_taken_is_one_clear_error():
  with socket.create_server(("", 0)) as other:
    [message] = meet(0, port=other.getsockname()[1])
  assert "cannot be used" in message and "--coordinator=HOST:PORT" in message


@pytest.mark.parametrize(
  "port", [1234, 8482, 35000, 39999, 40000, 55527, 65535]
)
def test_the_watch_has_a_port_of_its_own(port):
  assert 1024 < hosts.watch_port(port) < 65536
  assert hosts.watch_port(port) != port


@pytest.fixture
def no_cluster(monkeypatch):
  for name in (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    "SLURM_JOB_ID",
  ):
    monkeypatch.delenv(name, raising=False)
  return monkeypatch


def test_without_a_cluster_the_missing_flags_are_named(no_cluster):
  with pytest.raises(ConfigError) as caught:
    hosts.start("localhost:1234", 2)
  assert "--process_id=I or JAX_PROCESS_ID" in str(caught.value)
  assert "--coordinator" not in str(caught.value)


@pytest.mark.parametrize(
  "arguments, words",
  [
    (("localhost", 2, 0), "expected HOST:PORT"),
    (("localhost:1234", 2, 2), "expected 0 to 1"),
  ],
)
def test_wrong_flags_are_one_clear_error(no_cluster, arguments, words):
  with pytest.raises(ConfigError, match=words):
    hosts.start(*arguments)


def test_the_variables_are_read(no_cluster):
  no_cluster.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1234")
  no_cluster.setenv("JAX_NUM_PROCESSES", "2")
  no_cluster.setenv("JAX_PROCESS_ID", "5")
  with pytest.raises(ConfigError, match="process 5 of 2"):
    hosts.start()
  no_cluster.setenv("JAX_PROCESS_ID", "first")
  with pytest.raises(ConfigError, match="JAX_PROCESS_ID is 'first'"):
    hosts.start()


def test_what_slurm_tells_a_task_is_understood(no_cluster):
  job = {
    "SLURM_JOB_ID": "1000",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
    "SLURM_NTASKS": "24",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
  }
  for name, value in job.items():
    no_cluster.setenv(name, value)
  told = hosts._detected(None, None, None, 1.0)
  assert told == (f"gpu07:{61440 + 1000}", 24, 9, [1])


# Processes that do nothing but watch each other; no jax, so they start quickly.
_PROCESS = """
import sys, time
from oreo_jax.watch import Timeouts, Watch, announce

process, port, how = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
timeouts = Timeouts(start=60, silence=20, hang=3, grace=2)
watch = Watch(("localhost", port), 3, process, timeouts)
watch.meet()
print("met", flush=True)
watch.mark("step 1")
if process == 1 and how == "hangs":
  time.sleep(1000)
watch.mark("step 2")
if process == 1 and how == "fails":
  verdict = watch.fail(2, "no file x")
  sys.exit(verdict.code)
if how == "moves":  # longer than a hang would be noticed after
  end = time.monotonic() + 6
  while time.monotonic() < end:
    sum(range(1000))
  watch.leave()
  sys.exit()
time.sleep(1000)
"""


def watched(how, *, kill=None):
  """Runs three processes; returns the code and the errors of each."""
  port = free_port()
  tasks = [
    subprocess.Popen(
      [sys.executable, "-c", _PROCESS, str(process), str(port), how],
      env={**os.environ, "PYTHONPATH": str(ROOT)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for process in range(3)
  ]
  try:
    for task in tasks:
      assert task.stdout.readline() == "met\n"
    if kill is not None:
      tasks[kill].kill()
    errors = [task.communicate(timeout=60)[1] for task in tasks]
  finally:
    for task in tasks:
      task.kill()
  return [task.returncode for task in tasks], errors


def test_processes_that_move_are_let_be():
  codes, errors = watched("moves")
  assert codes == [0, 0, 0], errors


@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_ends_all_who_name_the_dead(victim):
  codes, errors = watched("waits", kill=victim)
  for process in {0, 1, 2} - {victim}:
    assert codes[process] == EXIT_LOST
    assert f"error: process {victim} (host " in errors[process]
    assert "died: its connection has closed" in errors[process]


def test_a_failure_ends_all_with_its_code():
  codes, errors = watched("fails")
  assert codes == [2, 2, 2]
  for process in (0, 2):
    assert "error: process 1 (host" in errors[process]
    assert "failed: no file x" in errors[process]


def test_a_hang_ends_all_and_says_where_it_is():
  codes, errors = watched("hangs")
  assert codes == [EXIT_LOST] * 3, errors
  for error in errors:
    assert "no process has moved for 3 s (--hang_timeout): process 1" in error
    assert "is at step 1" in error
    assert "2 others wait for it, at step 2" in error
