import io

from oreo_jax.progress import Progress


class Terminal(io.StringIO):
  def isatty(self):
    return True


def run_progress(stream, seconds_a_unit, **options):
  now = [0.0]
  with Progress(
    100,
    "collect",
    unit="sample",
    stream=stream,
    clock=lambda: now[0],
    **options,
  ) as bar:
    for _ in range(100 - options.get("initial", 0)):
      now[0] += seconds_a_unit
      bar.update(1, loss=0.5)
  return stream.getvalue()


def test_progress_in_a_log_is_a_line_a_tenth():
  lines = run_progress(io.StringIO(), 1.0).splitlines()
  assert len(lines) == 10
  assert lines[3] == ("collect: 40% (40/100), 1 sample/s, 60 s left, loss 0.5")
  assert lines[-1] == (
    "collect: 100% (100/100), 1 sample/s, took 100.0 s, loss 0.5"
  )


def test_progress_of_quick_work_is_one_line():
  text = run_progress(io.StringIO(), 0.001)
  assert text.splitlines() == [
    "collect: 100% (100/100), 1000 sample/s, took 0.1 s, loss 0.5"
  ]


def test_progress_of_a_resumed_run_counts_its_own_work_only():
  lines = run_progress(io.StringIO(), 1.0, initial=60).splitlines()
  assert lines[0].startswith("collect: 70% (70/100), 1 sample/s, 30 s left")


def test_progress_on_a_terminal_redraws():
  text = run_progress(Terminal(), 1.0)
  assert "\r" in text
  assert "100/100" in text


def test_progress_of_another_process_is_silent():
  assert run_progress(io.StringIO(), 1.0, enabled=False) == ""
  assert run_progress(Terminal(), 1.0, enabled=False) == ""
