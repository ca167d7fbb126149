"""A real SLURM of one node on this machine: munged, slurmctld and slurmd.

  apt-get install slurm-wlm munge          # Debian, as root
  python tests/launch/slurm_node.py FOLDER sbatch ...

starts the daemons with everything they write in FOLDER, runs the command, waits
until the queue is empty, and ends the daemons.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")

_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is queued again waits until its credential has expired.
AuthInfo=socket={folder}/munge/socket,cred_expire=10
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
KillWait=30
SchedulerParameters=sched_interval=5
NodeName={host} NodeAddr=127.0.0.1 Port={slurmd_port} CPUs=2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing():
  """Returns why a node cannot be started here; empty if it can."""
  names = [name for name in PROGRAMS if _path(name) is None]
  if names:
    return f"{', '.join(names)} not installed (apt-get install slurm-wlm munge)"
  return "" if os.geteuid() == 0 else "the daemons of SLURM need root"


def _path(name):
  return shutil.which(
    name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
  )


def _free_port():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


@contextlib.contextmanager
def started(folder):
  """Runs the daemons; yields the variables that its commands need."""
  folder = pathlib.Path(folder).resolve()
  for name in ("munge", "state", "spool"):
    (folder / name).mkdir(parents=True, exist_ok=True)
  key = folder / "munge" / "key"
  key.write_bytes(os.urandom(1024))
  key.chmod(0o400)
  conf = folder / "slurm.conf"
  conf.write_text(
    _CONF.format(
      host=socket.gethostname().split(".")[0],
      folder=folder,
      ctld_port=_free_port(),
      slurmd_port=_free_port(),
    )
  )
  (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
  variables = {"SLURM_CONF": str(conf)}
  munge = folder / "munge"
  daemons = [
    ["munged", "--force", *(f"--{name}={munge}/{file}" for name, file in (
      ("key-file", "key"), ("socket", "socket"), ("pid-file", "pid"),
      ("log-file", "log"), ("seed-file", "seed"),
    ))],
    ["slurmctld", "-f", str(conf), "-i"],
    ["slurmd", "-f", str(conf)],
  ]  # fmt: skip
  pid_files = [munge / "pid", folder / "slurmctld.pid", folder / "slurmd.pid"]
  try:
    for words, pid_file in zip(daemons, pid_files, strict=True):
      subprocess.run(
        [_path(words[0]), *words[1:]],
        check=True,
        env={**os.environ, **variables},
      )
      _wait(pid_file.exists, f"{words[0]} writes {pid_file}")
    _wait(lambda: _node_state(variables) == "idle", "the node is idle")
    yield variables
  finally:
    for pid_file in reversed(pid_files):
      if pid_file.exists():
        with contextlib.suppress(ProcessLookupError, ValueError):
          os.kill(int(pid_file.read_text()), signal.SIGTERM)


def _node_state(variables):
  outcome = subprocess.run(
    ["sinfo", "--noheader", "--format=%T"],
    env={**os.environ, **variables},
    capture_output=True,
    text=True,
  )
  return outcome.stdout.strip()


def _wait(condition, what, seconds=120):
  deadline = time.monotonic() + seconds
  while not condition():
    if time.monotonic() > deadline:
      raise TimeoutError(f"not within {seconds} s: {what}")
    time.sleep(0.5)


def main():
  """Runs a command beside the daemons, until the queue is empty."""
  if missing():
    sys.exit(f"error: {missing()}")
  with started(sys.argv[1]) as variables:
    environment = {**os.environ, **variables}
    code = subprocess.run(sys.argv[2:], env=environment).returncode
    while subprocess.run(
      ["squeue", "--noheader"], env=environment, capture_output=True
    ).stdout.strip():
      time.sleep(1)
  return code


if __name__ == "__main__":
  sys.exit(main())
