"""Fills in `gke_jobset.yaml` and hands it to kubectl.

  python launch/gke.py --name=mine --tpu=v5e:4x4 --image=IMAGE --claim=CLAIM \
    -- run --config=configs/gsm8k_math_qwen2p5_1p5b.py \
    --config.init=/mnt/oreo/Qwen2.5-Math-1.5B --workdir=/mnt/oreo/run

Every pod runs the oreo command with --distributed; `--dry-run` prints the YAML.
"""

import argparse
import json
import math
import pathlib
import re
import string
import subprocess
import sys
from typing import NamedTuple

TEMPLATE = pathlib.Path(__file__).with_name("gke_jobset.yaml")


class Tpu(NamedTuple):
  """A generation of TPUs on GKE: its label, and how its chips are wired."""

  accelerator: str
  topologies: tuple[str, ...]


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
TPUS = {
  "v5e": Tpu("tpu-v5-lite-podslice", _FLAT),
  "v5p": Tpu(
    "tpu-v5p-slice",
    (
      *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
      *("8x8x8", "8x8x16", "8x16x16"),
    ),
  ),
  "v6e": Tpu("tpu-v6e-slice", _FLAT),
}


def parse_tpu(text: str) -> tuple[str, str, int, int]:
  """Returns label, topology, hosts and chips a host of, say, "v5e:4x4"."""
  kind, _, topology = text.partition(":")
  if kind not in TPUS:
    raise argparse.ArgumentTypeError(
      f"{text!r}: the TPU is one of {', '.join(TPUS)}, as in v5e:4x4"
    )
  tpu = TPUS[kind]
  if topology not in tpu.topologies:
    raise argparse.ArgumentTypeError(
      f"{text!r}: the topology of {kind} is one of {', '.join(tpu.topologies)}"
    )
  chips = math.prod(int(size) for size in topology.split("x"))
  # A flat slice of up to eight chips is one host; all larger ones, and all of
  # v5p, are made of hosts with four chips.
  single_host = kind != "v5p" and chips <= 8
  chips_a_host = chips if single_host else 4
  return tpu.accelerator, topology, chips // chips_a_host, chips_a_host


def fill_in(**fields: str | int) -> str:
  """Returns the YAML; a KeyError names a field that is not given."""
  template = string.Template(TEMPLATE.read_text("utf-8"))
  return template.substitute(fields)


def parse_arguments(arguments=None):
  """Returns the flags; `command` is what `oreo` is to do."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--name", required=True, help="of the JobSet")
  parser.add_argument("--namespace", default="default")
  parser.add_argument(
    "--tpu", required=True, type=parse_tpu, help="such as v5e:4x4"
  )
  parser.add_argument("--slices", type=int, default=1)
  parser.add_argument(
    "--image", required=True, help="made from launch/Dockerfile"
  )
  parser.add_argument(
    "--claim",
    required=True,
    help="PersistentVolumeClaim (ReadWriteMany), mounted at /mnt/oreo",
  )
  parser.add_argument(
    "--restarts", type=int, default=10, help="after pods that were lost"
  )
  parser.add_argument(
    "--dry-run", action="store_true", help="print the YAML and do nothing"
  )
  parser.add_argument(
    "command", nargs="+", help="after --: an oreo command with its flags"
  )
  options = parser.parse_args(arguments)
  # The names of pods, slice and index included, are DNS labels of 63 letters.
  if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", options.name):
    parser.error(
      f"--name={options.name}: up to 40 of a-z, 0-9 and -, a letter first"
    )
  if options.slices < 1 or options.restarts < 0:
    parser.error("--slices must be at least 1 and --restarts at least 0")
  return options


def main() -> int:
  """Prints the YAML or applies it; returns the exit code."""
  options = parse_arguments()
  accelerator, topology, hosts, chips = options.tpu
  text = fill_in(
    name=options.name,
    namespace=options.namespace,
    accelerator=accelerator,
    topology=topology,
    hosts=hosts,
    chips=chips,
    slices=options.slices,
    image=json.dumps(options.image),
    claim=options.claim,
    restarts=options.restarts,
    # JSON is YAML, and quotes whatever the words hold.
    args=json.dumps([*options.command, "--distributed"]),
  )
  if options.dry_run:
    print(text, end="")
    return 0
  command = ["kubectl", "apply", "--filename=-"]
  return subprocess.run(command, input=text, text=True).returncode


if __name__ == "__main__":
  sys.exit(main())
