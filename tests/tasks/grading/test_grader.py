"""The grader: hand-made cases, hostile answers, workers that die."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from oreo_jax.tasks.grading import pool as pool_module
from oreo_jax.tasks.grading.grader import MathGrader
from oreo_jax.tasks.grading.pool import GraderPool

# Reference, answer, whether they are equal.
CASES = [
  # Fractions, decimals, mixed numbers.
  (r"\frac{1}{2}", "0.5", 1),
  (r"\frac{1}{2}", r"\dfrac12", 1),
  (r"\frac{1}{2}", r"\frac{2}{4}", 1),
  (r"\frac{3}{2}", r"1\frac{1}{2}", 1),
  ("1.5", "1 1/2", 1),
  ("1", "1 1/2", 0),
  (r"\frac{1}{3}", "0.333333", 1),
  (r"\frac{1}{3}", "0.33", 0),
  (r"-\frac{2}{3}", r"\frac{-2}{3}", 1),
  (r"-\frac{2}{3}", r"\frac{2}{3}", 0),
  (r"0.\overline{3}", r"\frac{1}{3}", 1),
  (r"0.\overline{3}", "0", 0),
  # Commas, money, signs.
  ("1000", "1,000", 1),
  ("1000", "1{,}000", 1),
  ("1000000", "10^6", 1),
  ("18", r"\$18.00", 1),
  ("18", "$18$", 1),
  ("18", "18.", 1),
  ("18", "-18", 0),
  ("-3", "- 3", 1),
  ("6020", "6.02e3", 1),
  ("2000", r"2 \times 10^3", 1),
  ("0.001", "10^{-3}", 1),
  # Units and percent.
  ("5", r"5\text{ cm}", 1),
  ("5", "5 cm", 1),
  (r"5\text{ cm}", "5", 1),
  ("12", r"\text{12 inches}", 1),
  ("18", "18 dollars", 1),
  ("90", r"90^\circ", 1),
  (r"90^\circ", "90", 1),
  ("50", r"50\%", 1),
  (r"50\%", "0.5", 1),
  (r"50\%", "0.05", 0),
  ("5", "5 million", 0),
  # Intervals and inequalities.
  ("[0,1)", r"\left[0, 1\right)", 1),
  ("[0,1)", "(0,1)", 0),
  (r"(-\infty,3]", r"x \le 3", 1),
  ("(1,2)", "1<x<2", 1),
  ("[1,2]", r"x \in [1,2]", 1),
  (r"(-\infty,0)\cup(1,\infty)", r"(1,\infty)\cup(-\infty,0)", 1),
  (r"\infty", r"-\infty", 0),
  # Sets, tuples, lists.
  (r"\{1,2\}", r"\{2,1\}", 1),
  (r"\{1,2\}", r"\{1,3\}", 0),
  ("1,2", "2,1", 1),
  ("3,4", r"3 \text{ and } 4", 1),
  ("3,4,5", "3,4", 0),
  ("(1,2)", "(2,1)", 0),
  (r"\left(3,\frac{\pi}{2}\right)", r"(3, \pi/2)", 1),
  (r"\emptyset", r"\varnothing", 1),
  (r"1\pm\sqrt{2}", r"1+\sqrt{2}, 1-\sqrt{2}", 1),
  # Matrices.
  (
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
    r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}",
    1,
  ),
  (
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
    r"\begin{pmatrix}1&2\\4&3\end{pmatrix}",
    0,
  ),
  # Expressions and equations.
  ("(x+1)^2", "x^2+2x+1", 1),
  ("(x+1)^2", "x^2+1", 0),
  (r"2\sqrt{2}", r"\sqrt{8}", 1),
  (r"\sqrt2", r"\sqrt{2}", 1),
  (r"\pi", "3.14159", 0),
  ("x=5", "5", 1),
  ("5", "x=5", 1),
  ("y=2x+1", "2x-y+1=0", 1),
  ("1024", "2^{10}", 1),
  (r"\binom{5}{2}", "10", 1),
  (r"\log_2 8", "3", 1),
  ("3+2i", "2i+3", 1),
  ("3", "3x", 0),
  (r"\frac{3}{2}", "3:2", 1),
  ("2516_8", "2516", 1),
  ("2516_8", "2516_9", 0),
  # Blanks between digits.
  ("1 1/2", "11/2", 0),
  ("11/2", "1 1/2", 0),
  ("1 1/2", "3/2", 1),
  ("1 1/2", "1.5", 1),
  ("1 1/2", "5.5", 0),
  (r"11\frac{1}{2}", r"1 1\frac{1}{2}", 0),
  ("1 1/2 hours", "5.5 hours", 0),
  ("1 1/2 hours", r"\frac{3}{2}", 1),
  ("x = 1 1/2", "3/2", 1),
  ("x = 1 1/2", "11/2", 0),
  ("1 1/2 x", r"\frac{3x}{2}", 1),
  ("1 1/2 x", r"\frac{11x}{2}", 0),
  ("12", "1 2", 0),
  ("1 2", "12", 0),
  ("1,2", "1 2", 1),
  ("(12)", "(1 2)", 0),
  ("x^{12}", "x^{1 2}", 0),
  ("34x", "3 4x", 0),
  ("12", r"1\text{ }2", 0),
  ("12345", "12 345", 1),
  ("12345.0", r"12\,345", 1),
  ("10^6", "1 000 000", 1),
  (r"\log_2 8", "3", 1),
  (r"\frac 1 2", "0.5", 1),
  ("x y", "xy", 1),
  # Halves of a day, and other words that exclude each other.
  ("10 am", "10 pm", 0),
  ("10 am", "10 am", 1),
  ("10 am", "10 a.m.", 1),
  ("10 am", "10AM", 1),
  ("10 am", r"10\text{ p.m.}", 0),
  ("10:30 am", "10:30 pm", 0),
  ("10:30 am", r"\text{10:30 A.M.}", 1),
  ("10 am", "10", 1),
  ("Monday 10 am", "Monday, 10 pm", 0),
  ("30 degrees north", "30 degrees south", 0),
  ("30 degrees north", "30 degrees", 1),
  # Functions are no units.
  ("2", "2 sin x", 0),
  ("2 sin x", "2", 0),
  ("2", r"2\sin x", 0),
  ("2", r"2\text{ sin } x", 0),
  ("2 sin x", r"2\sin x", 1),
  ("2 sin x", r"2\sin(x)", 1),
  ("2 sin x", "2 cos x", 0),
  ("2 sin x", "2 sin y", 0),
  ("2 log x", "2", 0),
  ("2 sinh x", "2", 0),
  ("3", "3 halves", 0),
  ("5", "5 squared", 0),
  ("5", "5 feet squared", 1),
  ("5 sec", "5", 1),
  ("5 sec x", "5", 0),
  ("5 min", "5", 1),
  # Text.
  (r"\text{Evelyn}", "Evelyn", 1),
  (r"\text{Evelyn}", r"\text{Carla}", 0),
  (r"\text{even}", r"\text{odd}", 0),
  (r"\text{Monday}", "monday", 1),
  (r"\text{(A)}", "A", 1),
  ("A", "(A)", 1),
  (r"\text{A}", "B", 0),
  # Malformed LaTeX.
  (r"\frac{1}{2}", r"\frac{1}{2", 0),
  (r"\frac{1}{2}", r"\frac{1}", 0),
  ("5", r"\left(", 0),
  ("5", r"\begin{pmatrix}", 0),
  ("5", "{{{{", 0),
  ("5", "}", 0),
  ("5", "\\", 0),
  ("5", "$", 0),
  ("5", "\x00", 0),
  ("5", "\ud800", 0),
]


@pytest.fixture(scope="module")
def graded():
  """All cases in one go, in a thread: no signal may be needed."""
  grader, rewards = MathGrader(workers=2, timeout_s=60), []
  references, answers, _ = zip(*CASES, strict=True)
  thread = threading.Thread(
    target=lambda: rewards.append(grader.grade_answers(references, answers))
  )
  thread.start()
  thread.join()
  grader.close()
  return rewards[0], grader.counts


@pytest.mark.parametrize("case", range(len(CASES)))
def test_hand_made_case(graded, case):
  assert graded[0][case] == CASES[case][2], CASES[case]


def test_every_case_is_counted(graded):
  rewards, counts = graded
  assert rewards.dtype == np.float32
  assert counts.total() == len(CASES)
  assert not counts.keys() & {"timeout", "stalled", "crash"}


def test_two_boxed_answers_are_no_set():
  grader = MathGrader(workers=1)
  response = r"First \boxed{1}, then \boxed{2}."
  rewards = grader.grade_responses(["2", "1", "1,2"], [response] * 3)
  assert rewards.tolist() == [1.0, 0.0, 0.0]
  grader.close()


def test_plain_answers_need_no_process():
  grader = MathGrader()
  rewards = grader.grade_responses(
    ["18"] * 5,
    ["#### 18", "\\boxed{18}", "A: 18 eggs", "it is 18", "#### " + "1" * 9999],
  )
  assert rewards.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]
  assert grader.counts == {"plain": 3, "no_answer": 1, "too_long": 1}
  assert grader._pool.started == 0


# Ends quickly although nothing is done in a worker.
LONG = [
  "\\boxed{" * 20_000,
  "\\boxed{" + "1" * 100_000,
  "\\boxed{" + "{" * 100_000,
  "\\boxed{" + "}" * 100_000,
  "\\boxed" * 20_000,
  "####" * 30_000,
  "#### " + "(" * 100_000,
  "\nA:" * 40_000,
  "#### " + "1," * 50_000,
  "#### " + " " * 100_000 + "x",
  "\\" * 100_000,
  "\\boxed{" + "\\{" * 50_000 + "}",
]


def test_long_responses_end_at_once():
  grader = MathGrader()
  begin = time.monotonic()
  rewards = grader.grade_responses(["5"] * len(LONG), LONG)
  assert time.monotonic() - begin < 5
  assert not rewards.any() and grader._pool.started == 0


# Within the cap of the length; what is left for the workers.
NESTED = [
  "{" * 900,
  "}" * 900,
  "(" * 400 + "1" + ")" * 400,
  r"\sqrt{" * 120 + "2" + "}" * 120,
  r"\frac{" * 150,
  "x^{" * 200 + "2" + "}" * 200,
  "sin(" * 100 + "1" + ")" * 100,
  r"\left(" * 150,
  r"\begin{pmatrix}" * 50,
  "+" * 1000,
  "-" * 999 + "1",
  "x" * 1000,
  "a," * 500,
  "1/0",
  r"\frac{0}{0}",
  "2**2**2**2**9",
  "__import__('os').system('false')",
]
HUGE = [
  "9^{9^{9^9}}",
  "100000000!",
  "(1+x)^{99999}",
  r"\sum_{k=1}^{10^9} \frac{1}{k}",
  r"\int_0^1 x^{x^{x^x}} dx",
  r"10^{10^{10^{10}}} \bmod 7",
]


def grade_hostile(answers, timeout_s):
  """Grades hostile answers with a good one among them; returns the time."""
  grader = MathGrader(workers=2, timeout_s=timeout_s)
  answers = [*answers, r"x+\sqrt{3}"]
  begin = time.monotonic()
  rewards = grader.grade_answers([r"\sqrt{3}+x"] * len(answers), answers)
  seconds = time.monotonic() - begin
  grader.close()
  assert grader.counts.total() == len(answers)
  assert not rewards[:-1].any()
  return seconds, grader


@pytest.mark.slow
def test_huge_powers_are_killed():
  seconds, grader = grade_hostile(["9^{9^{9^9}}", "(1+x)^{99999}"], 3.0)
  assert grader.counts["timeout"] + grader.counts["crash"] >= 1
  assert not grader.counts["stalled"]
  # A limit each and a start each for at most three workers, on a busy machine.
  assert seconds < 60


@pytest.mark.slow
def test_hostile_answers_end_in_bounded_time():
  seconds, grader = grade_hostile([*NESTED, *HUGE], 4.0)
  assert seconds < 15 * len(NESTED + HUGE)
  # Whatever they did, the good answer behind them is graded.
  assert grader.counts["equal"] == 1


def test_a_worker_that_dies_costs_one_answer():
  pool = GraderPool(workers=1, timeout_s=30, memory_mb=1024)
  slow = ("x", "9^{9^{9^9}}")

  def kill_busy_worker():
    while not any(worker.job == 0 for worker in pool._workers):
      time.sleep(0.01)
    for worker in list(pool._workers):
      os.kill(worker.process.pid, signal.SIGKILL)

  killer = threading.Thread(target=kill_busy_worker)
  killer.start()
  assert pool.compare([slow, ("x+1", "1+x")]) == ["crash", "equal"]
  killer.join()
  assert pool.started == 2
  # One that dies while idle costs nothing.
  for worker in pool._workers:
    worker.process.kill()
    worker.process.wait()
  assert pool.compare([("x+1", "1+x"), ("x", "y")]) == ["equal", "different"]
  pool.close()


# Multiplies for minutes before it needs much memory.
BURNING = ("1", "100000000!")
EASY = ("x+1", "1+x")


def run_in_bursts(worker, stop, run_s, pause_s):
  """Lets a worker run a share of the time, as a loaded machine does."""
  pid = worker.process.pid
  try:
    while not stop.is_set():
      os.kill(pid, signal.SIGSTOP)
      time.sleep(pause_s)
      os.kill(pid, signal.SIGCONT)
      time.sleep(run_s)
  except ProcessLookupError:
    pass


@pytest.fixture
def loaded(monkeypatch):
  """Every worker that has a job runs a quarter of the time."""
  stop, threads = threading.Event(), []
  send = pool_module._Worker.send

  def send_and_slow(worker, *arguments):
    send(worker, *arguments)
    threads.append(
      threading.Thread(target=run_in_bursts, args=(worker, stop, 0.1, 0.3))
    )
    threads[-1].start()

  monkeypatch.setattr(pool_module._Worker, "send", send_and_slow)
  yield
  stop.set()
  for thread in threads:
    thread.join()


def test_work_without_end_is_a_timeout():
  pool = GraderPool(workers=1, timeout_s=1, memory_mb=1024)
  assert pool.compare([BURNING, EASY]) == ["timeout", "equal"]
  pool.close()


def test_load_changes_no_label(loaded):
  pool = GraderPool(workers=1, timeout_s=1, memory_mb=1024)
  assert pool.compare([BURNING, EASY]) == ["timeout", "equal"]
  pool.close()


def stop_at_send(monkeypatch, pause_s=None):
  """Stops a worker when it gets a job; lets it run after `pause_s` if given."""
  send = pool_module._Worker.send

  def send_and_stop(worker, *arguments):
    os.kill(worker.process.pid, signal.SIGSTOP)
    send(worker, *arguments)
    if pause_s is not None:
      wake = (worker.process.pid, signal.SIGCONT)
      threading.Timer(pause_s, os.kill, wake).start()

  monkeypatch.setattr(pool_module._Worker, "send", send_and_stop)


def test_waiting_is_no_timeout(monkeypatch):
  stop_at_send(monkeypatch, pause_s=3)
  pool = GraderPool(workers=1, timeout_s=1, memory_mb=1024)
  begin = time.monotonic()
  assert pool.compare([EASY]) == ["equal"]
  assert time.monotonic() - begin > 3
  pool.close()


def test_a_worker_that_stands_still_is_ended(monkeypatch):
  stop_at_send(monkeypatch)
  pool = GraderPool(workers=1, timeout_s=1, memory_mb=1024, wall_s=2)
  assert pool.compare([EASY]) == ["stalled"]
  assert not pool._workers


@pytest.mark.parametrize(
  "failures, total, warned",
  [(0, 100, False), (1, 100, False), (2, 100, True), (1, 1, True)],
)
def test_failures_are_counted_and_told(failures, total, warned, caplog):
  grader = MathGrader()
  outcomes = (["timeout", "crash"] * failures)[:failures]
  right = total - failures
  # One job an answer that is no plain number, each another one.
  answers = [f"x+{i}" for i in range(failures)] + ["18"] * right
  grader._pool.compare = lambda pairs: outcomes[: len(pairs)]
  with caplog.at_level("WARNING", logger="absl"):
    rewards = grader.grade_answers(["18"] * total, answers)
  assert rewards.sum() == right
  assert grader.counts.total() == total
  assert bool(caplog.messages) == warned
  if warned:
    (message,) = caplog.messages
    assert f"{failures} of {total} answers" in message
    assert "1 timeout" in message and "options.timeout_s" in message


def test_workers_are_replaced_after_their_share():
  pool = GraderPool(workers=1, timeout_s=30, memory_mb=1024, jobs_per_worker=2)
  assert pool.compare([("x+1", "1+x")] * 3) == ["equal"] * 3
  assert pool.started == 2
  pool.close()
  assert not pool._workers


def test_memory_is_bounded():
  pool = GraderPool(workers=1, timeout_s=60, memory_mb=256)
  outcomes = pool.compare([("x", "2^{2^{35}}"), ("x+1", "1+x")])
  assert outcomes[0] in ("different", "error", "crash")
  assert outcomes[1] == "equal"
  pool.close()


WITHOUT_CLOSING = """
from oreo_jax.tasks.grading.grader import MathGrader
grader = MathGrader(workers=1)
print(grader.grade_answers(["x+1"], ["1+x"]))
print([worker.process.pid for worker in grader._pool._workers][0])
"""


def test_no_process_is_left_behind():
  done = subprocess.run(
    [sys.executable, "-W", "error", "-c", WITHOUT_CLOSING],
    capture_output=True,
    text=True,
    check=True,
    env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
  )
  rewards, pid = done.stdout.split("\n")[:2]
  assert rewards == "[1.]" and not done.stderr
  with pytest.raises(ProcessLookupError):
    os.kill(int(pid), 0)


@pytest.mark.parametrize(
  "options, word",
  [
    ({"markers": ("answer",)}, "markers"),
    ({"markers": ()}, "markers"),
    ({"max_chars": 0}, "max_chars"),
    ({"timeout_s": 0}, "timeout_s"),
    ({"workers": -1}, "workers"),
  ],
)
def test_bad_options(options, word):
  with pytest.raises(ValueError, match=word):
    MathGrader(**options)


def test_bad_lengths():
  with pytest.raises(ValueError, match="1 references and 2 answers"):
    MathGrader().grade_answers(["1"], ["1", "2"])
