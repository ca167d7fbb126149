"""launch/tpu_vm.sh and launch/gke.py, as far as one gets without a cloud."""

import json
import os
import shlex
import subprocess
import sys

import pytest
from tiny_run import ROOT

TPU_VM = ROOT / "launch" / "tpu_vm.sh"
GKE = ROOT / "launch" / "gke.py"
WORDS = ["train", "--config=x.py", "--config.evaluate.budgets=(1, 3)"]


def run(*words):
  outcome = subprocess.run(
    list(map(str, words)), capture_output=True, text=True
  )
  return outcome.returncode, outcome.stdout, outcome.stderr


def tpu_vm(*flags):
  """The commands that a dry run prints, as lists of words."""
  code, output, error = run(
    "bash", TPU_VM, "--dry-run", "--name=mine", "--zone=z", *flags
  )
  assert code == 0, error
  # A word with a line break is printed as $'...', which only bash reads.
  return [line for line in output.splitlines() if line.startswith("+ ")]


def test_it_is_good_shell():
  subprocess.run(["bash", "-n", TPU_VM], check=True)
  assert os.access(TPU_VM, os.X_OK)


def test_a_tpu_vm_is_made_installed_and_used():
  lines = tpu_vm("--type=v5litepod-16", "--project=p", "--", *WORDS)
  create, archive, copy, install, command = lines
  assert shlex.split(create)[1:] == [
    *("gcloud", "compute", "tpus", "tpu-vm", "create", "mine", "--zone=z"),
    *("--project=p", "--accelerator-type=v5litepod-16"),
    "--version=v2-alpha-tpuv5-lite",
  ]
  assert "archive --format=tar.gz" in archive and archive.endswith("HEAD ")
  assert "tpu-vm scp" in copy and "mine:oreo.tar.gz" in copy
  assert "--worker=all" in copy and "--worker=all" in install
  assert ".[tpu,math]" in install
  *gcloud, remote = shlex.split(command)
  assert "--worker=all" in gcloud and "--project=p" in gcloud
  assert remote == (
    "--command=cd oreo && .venv/bin/oreo train --config=x.py "
    r"--config.evaluate.budgets=\(1\,\ 3\) --distributed"
  )


def test_slices_are_queued_and_all_their_workers_used():
  create, command = tpu_vm(
    "--type=v5p-128", "--slices=2", "--spot", "--skip-install", "--", "sft"
  )
  assert shlex.split(create)[1:] == [
    *("gcloud", "compute", "tpus", "queued-resources", "create", "mine"),
    *("--zone=z", "--accelerator-type=v5p-128", "--spot"),
    *("--runtime-version=v2-alpha-tpuv5", "--node-count=2"),
    "--node-prefix=mine",
  ]
  assert "--node=all --worker=all" in command


def test_a_share_is_mounted_and_a_tpu_deleted():
  lines = tpu_vm(
    "--type=v6e-16", "--queued", "--nfs=10.0.0.2:/x", "--skip-install",
    "--", "sft",
  )  # fmt: skip
  assert "queued-resources create mine" in lines[0]
  assert "--node-id=mine" in lines[0] and "v2-alpha-tpuv6e" in lines[0]
  assert "mount -t nfs 10.0.0.2:/x /mnt/oreo" in lines[1]
  [line] = tpu_vm("--delete")
  assert "tpu-vm delete mine --zone=z --quiet" in line
  [line] = tpu_vm("--delete", "--queued")
  assert "queued-resources delete mine --zone=z --force --quiet" in line


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--name=a", "--", "sft"], "--name and --zone are needed"),
    (["--name=a", "--zone=z"], "no oreo command"),
    (["--name=a", "--zone=z", "--", "sft"], "--type is needed"),
    (["--name=a", "--zone=z", "--slices=x", "--", "sft"], "--slices=x"),
    (["--nome=a"], "what is --nome=a?"),
  ],
)
def test_wrong_flags_of_the_tpu_script_are_one_line(flags, words):
  code, _, error = run("bash", TPU_VM, "--dry-run", *flags)
  assert code == 2 and words in error


def test_the_tpu_script_explains_itself():
  code, output, error = run("bash", TPU_VM, "--help")
  assert code == 0 and not error and "--zone=ZONE" in output


def gke(*flags, command=WORDS):
  return run(
    sys.executable, GKE, "--dry-run", "--name=mine", "--image=r/oreo:1",
    "--claim=share", *flags, "--", *command,
  )  # fmt: skip


def test_a_jobset_is_filled_in():
  yaml = pytest.importorskip("yaml")
  code, output, error = gke("--tpu=v5e:4x4", "--slices=2", "--restarts=5")
  assert code == 0, error
  jobset = yaml.safe_load(output)
  assert jobset["kind"] == "JobSet" and jobset["metadata"]["name"] == "mine"
  assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 5
  [job] = jobset["spec"]["replicatedJobs"]
  assert job["replicas"] == 2
  spec = job["template"]["spec"]
  assert spec["parallelism"] == spec["completions"] == 4
  pod = spec["template"]["spec"]
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
    "cloud.google.com/gke-tpu-topology": "4x4",
  }
  [container] = pod["containers"]
  assert container["image"] == "r/oreo:1"
  assert container["args"] == [*WORDS, "--distributed"]
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  [volume] = pod["volumes"]
  assert volume["persistentVolumeClaim"] == {"claimName": "share"}


@pytest.mark.parametrize(
  "tpu, hosts, chips",
  [
    ("v5e:1x1", 1, 1),
    ("v5e:2x4", 1, 8),
    ("v5e:4x4", 4, 4),
    ("v5e:16x16", 64, 4),
    ("v5p:2x2x1", 1, 4),
    ("v5p:2x2x2", 2, 4),
    ("v5p:2x2x4", 4, 4),
    ("v5p:4x4x4", 16, 4),
    ("v6e:2x2", 1, 4),
    ("v6e:8x8", 16, 4),
  ],
)
def test_hosts_and_chips_follow_from_the_topology(tpu, hosts, chips):
  code, output, error = gke(f"--tpu={tpu}")
  assert code == 0, error
  assert f"parallelism: {hosts}\n" in output
  assert f"google.com/tpu: {chips}\n" in output


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--tpu=v4:2x2x1"], "one of v5e, v5p, v6e"),
    (["--tpu=v5e:4x5"], "the topology of v5e is one of 1x1, 2x2"),
    (["--tpu=v5e:4x4", "--name=Mine"], "--name=Mine"),
    (["--tpu=v5e:4x4", "--slices=0"], "--slices must be at least 1"),
    ([], "--tpu"),
  ],
)
def test_wrong_flags_of_gke_are_refused(flags, words):
  code, _, error = gke(*flags)
  assert code == 2 and words in error


def test_words_that_yaml_would_read_otherwise_arrive_as_they_are():
  words = ["train", "--config.x=yes: #{}", 'a "quoted" $word', "${name}"]
  code, output, error = gke("--tpu=v5e:4x4", command=words)
  assert code == 0, error
  [line] = [line for line in output.splitlines() if " args: " in line]
  assert json.loads(line.split("args: ")[1]) == [*words, "--distributed"]


def test_a_field_that_is_missing_is_refused():
  code, _, error = run(
    sys.executable, "-c",
    f"import sys; sys.path.insert(0, {str(GKE.parent)!r}); import gke; "
    "gke.fill_in(name='mine')",
  )  # fmt: skip
  assert code == 1 and "KeyError: 'namespace'" in error
