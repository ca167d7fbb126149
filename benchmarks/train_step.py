"""The training step of oreo_jax against the authors' way in PyTorch.

    python benchmarks/train_step.py --size=all > train_step.json

Each side is a process of its own, so that its peak memory is its own. They
take turns of a few steps, so that whatever else the machine does hits both. The
first step of a turn is not timed: a process that has waited finds the caches
full of another's data, and on some machines its memory taken back.
Both start from the same weights and see the same batch; the losses of every
step are compared, and a difference ends with exit code 1: a faster step that
computes something else is worth nothing.

The result is JSON on standard output: for each size and side all the seconds,
their median and spread, tokens a second, the process's peak memory and, for
ours, the compiler's own account. Needs `pip install torch`. Run it on an idle
machine: `load` says what else ran. See docs/performance.md.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time

from sides import Side, answers

SIDES = ("ours", "torch")
WARM_UP = 1  # steps at the start of each turn that are not timed
TURN = 3  # timed steps of a turn
TOLERANCE = 1e-4  # on the loss


def serve(side: str, size: str, threads: int) -> None:
  """Is the process of a side: does steps for the one that started it."""
  answer = answers(threads)
  from step_case import CASES

  if side == "ours":
    from step_ours import make
  else:
    import torch
    from step_torch import make

    torch.set_num_threads(threads)
  facts, take_step = make(CASES[size])
  answer(**facts)
  for request in sys.stdin:
    if request.strip() == "end":
      break
    start = time.perf_counter()
    loss = take_step()
    answer(seconds=time.perf_counter() - start, loss=loss)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # KiB on Linux, bytes on macOS.
  scale = 1 if sys.platform == "darwin" else 1024
  answer(process_peak_bytes=peak * scale)


def measure(size: str, repeats: int, threads: int) -> dict:
  """Measures both sides at one size, in turns."""
  from step_case import CASES

  sides = {}
  try:
    for name in SIDES:
      say(f"{size}: making {name}")
      sides[name] = Side(name, __file__, size, str(threads))
    steps, timed = ({name: [] for name in SIDES} for _ in range(2))
    turns = -(-repeats // TURN)
    for turn in range(turns):
      for name in SIDES:
        # The threads of the other side spin a little before they sleep.
        time.sleep(0.3)
        new = [sides[name].ask("step") for _ in range(WARM_UP + TURN)]
        steps[name] += new
        timed[name] += [step["seconds"] for step in new[WARM_UP:]]
      say(
        f"{size}: turn {turn + 1} of {turns}: "
        + ", ".join(f"{n} {s[-1]:.3f} s" for n, s in timed.items())
      )
    memory = {name: sides[name].ask("end") for name in SIDES}
  finally:
    for side in sides.values():
      side.close()

  tokens = CASES[size].tokens
  result = {
    "size": size,
    "tokens_per_step": tokens,
    **{
      name: {
        **sides[name].facts,
        **timings(timed[name], tokens),
        **memory[name],
      }
      for name in SIDES
    },
  }
  ours, theirs = (result[name] for name in SIDES)
  result["speed_ratio"] = theirs["median_s"] / ours["median_s"]
  result["memory_ratio"] = (
    ours["process_peak_bytes"] / theirs["process_peak_bytes"]
  )
  losses = [[step["loss"] for step in steps[name]] for name in SIDES]
  differences = [abs(a - b) for a, b in zip(*losses, strict=True)]
  result["check"] = {
    "first_loss": {name: steps[name][0]["loss"] for name in SIDES},
    "largest_difference_of_losses": max(differences),
    "same_loss": max(differences) <= TOLERANCE,
    "same_parameters": ours["parameters"] == theirs["parameters"],
  }
  return result


def timings(seconds: list[float], tokens: int) -> dict:
  """Returns the median of some times, and how far they are apart."""
  median = statistics.median(seconds)
  return {
    "seconds": [round(s, 4) for s in seconds],
    "median_s": median,
    "least_s": min(seconds),
    "most_s": max(seconds),
    "tokens_per_s": tokens / median,
  }


def say(text: str) -> None:
  """Tells whoever waits how far it is."""
  print(text, file=sys.stderr, flush=True)


def main() -> None:
  """Reads the arguments, measures and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__.splitlines()[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  parser.add_argument(
    "--size", choices=("small", "large", "all", "tiny"), default="all"
  )
  parser.add_argument(
    "--repeats",
    type=int,
    default=9,
    help="timed steps of each side, in turns of three",
  )
  parser.add_argument(
    "--threads", type=int, default=os.cpu_count(), help="cores of each side"
  )
  parser.add_argument(
    "--serve", nargs=3, help=argparse.SUPPRESS, metavar=("SIDE", "SIZE", "N")
  )
  arguments = parser.parse_args()
  if arguments.serve:
    side, size, threads = arguments.serve
    serve(side, size, int(threads))
    return
  if arguments.repeats < 1 or arguments.threads < 1:
    parser.error("--repeats and --threads must be at least 1")
  sizes = ("small", "large") if arguments.size == "all" else (arguments.size,)
  load = os.getloadavg()[0]
  results = [
    measure(size, arguments.repeats, arguments.threads) for size in sizes
  ]
  report = {
    "machine": {
      "processor": platform.processor() or platform.machine(),
      "cores": os.cpu_count(),
      "threads": arguments.threads,
      "python": platform.python_version(),
      "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    },
    "load": {"before": load, "after": os.getloadavg()[0]},
    "results": results,
  }
  print(json.dumps(report, indent=2))
  for result in results:
    say(
      f"{result['size']}: ours {result['ours']['tokens_per_s']:.0f} tokens/s, "
      f"{result['speed_ratio']:.2f} times theirs; "
      f"{result['memory_ratio']:.2f} times their memory; losses "
      f"{result['check']['largest_difference_of_losses']:.1e} apart"
    )
  checks = [result["check"] for result in results]
  if not all(c["same_loss"] and c["same_parameters"] for c in checks):
    sys.exit("the two sides do not compute the same: see `check`")


if __name__ == "__main__":
  main()
