#!/usr/bin/env bash
# Runs an oreo command on all workers of a Cloud TPU VM.
#
#   launch/tpu_vm.sh --name=mine --zone=us-west4-a --type=v5litepod-16 \
#     --nfs=10.0.0.2:/share -- \
#     run --config=configs/gsm8k_math_qwen2p5_1p5b.py \
#     --config.init=/mnt/oreo/Qwen2.5-Math-1.5B --workdir=/mnt/oreo/run
#
# It makes the TPU unless there is one of that name, copies the committed state
# of this repository to every worker, installs it, and runs the command with
# --distributed. After a pre-emption run it with --delete, and then the same
# again to go on from the last checkpoint.
#
#   --name=NAME      of the TPU
#   --zone=ZONE
#   --type=TYPE      such as v5litepod-16, v5p-128, v6e-64
#   --project=ID     by default that of gcloud's configuration
#   --runtime=NAME   by default the one that fits the type
#   --queued         ask for it in the queue (queued resources) and wait
#   --slices=N       several slices, which are always queued; by default 1
#   --spot           may be taken away at any time, and costs less
#   --nfs=IP:/SHARE  mounted at /mnt/oreo on every worker: the work directory
#                    must lie on a file system that all of them share
#   --skip-install   the workers are installed
#   --delete         delete the TPU (and its place in the queue); no command
#   --dry-run        print every command, and run none
set -euo pipefail

usage() {
  sed -n '2,/^set -euo/{/^set/d;s/^# \{0,1\}//;p}' "$0"
}

name="" zone="" type="" project="" runtime="" queued="" slices=1 spot="" nfs=""
skip_install="" delete="" dry_run=""
while [ $# -gt 0 ]; do
  case "$1" in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --queued) queued=1 ;;
    --slices=*) slices=${1#*=} ;;
    --spot) spot=1 ;;
    --nfs=*) nfs=${1#*=} ;;
    --skip-install) skip_install=1 ;;
    --delete) delete=1 ;;
    --dry-run) dry_run=1 ;;
    --)
      shift
      break
      ;;
    --help | -h)
      usage
      exit
      ;;
    *)
      echo "error: what is $1? (the oreo command comes after --)" >&2
      usage >&2
      exit 2
      ;;
  esac
  shift
done
fail() {
  echo "error: $1" >&2
  exit 2
}
[ -n "$name" ] && [ -n "$zone" ] || fail "--name and --zone are needed"
[[ "$slices" =~ ^[1-9][0-9]*$ ]] || fail "--slices=$slices is not a number"
[ "$slices" -gt 1 ] && queued=1
[ -n "$delete" ] || [ $# -gt 0 ] || fail "no oreo command after --"

if [ -z "$runtime" ]; then
  case "$type" in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) runtime=tpu-ubuntu2204-base ;;
  esac
fi

where=("--zone=$zone")
[ -n "$project" ] && where+=("--project=$project")
tpu=(gcloud compute tpus tpu-vm)
queue=(gcloud compute tpus queued-resources)

# Prints a command, and runs it unless nothing is to be run.
run() {
  printf '+ '
  printf '%q ' "$@"
  echo
  [ -n "$dry_run" ] || "$@"
}

# Runs a line of shell on every worker of every slice.
on_all_workers() {
  if [ "$slices" -gt 1 ]; then
    run gcloud alpha compute tpus queued-resources ssh "$name" "${where[@]}" \
      --node=all --worker=all --command="$1"
  else
    run "${tpu[@]}" ssh "$name" "${where[@]}" --worker=all --command="$1"
  fi
}

copy_to_all_workers() {
  if [ "$slices" -gt 1 ]; then
    run gcloud alpha compute tpus queued-resources scp "$1" "$name:$2" \
      "${where[@]}" --node=all --worker=all
  else
    run "${tpu[@]}" scp "$1" "$name:$2" "${where[@]}" --worker=all
  fi
}

state_of_queue() {
  "${queue[@]}" describe "$name" "${where[@]}" --format="value(state.state)"
}

exists() {
  [ -z "$dry_run" ] || return 1 # print how it would be made
  if [ -n "$queued" ]; then
    state_of_queue > /dev/null 2>&1
  else
    "${tpu[@]}" describe "$name" "${where[@]}" > /dev/null 2>&1
  fi
}

create() {
  [ -n "$type" ] || fail "there is no TPU $name in $zone: --type is needed"
  local flags=("--accelerator-type=$type")
  [ -n "$spot" ] && flags+=(--spot)
  if [ -z "$queued" ]; then
    run "${tpu[@]}" create "$name" "${where[@]}" "${flags[@]}" \
      "--version=$runtime"
    return
  fi
  flags+=("--runtime-version=$runtime")
  if [ "$slices" -gt 1 ]; then
    flags+=("--node-count=$slices" "--node-prefix=$name")
  else
    flags+=("--node-id=$name")
  fi
  run "${queue[@]}" create "$name" "${where[@]}" "${flags[@]}"
}

wait_for_queue() {
  echo "waiting until $name is ACTIVE"
  [ -z "$dry_run" ] || return 0
  local state
  while true; do
    state=$(state_of_queue)
    case "$state" in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED)
        fail "$name is $state: see '${queue[*]} describe $name ${where[*]}', \
and remove it with --delete"
        ;;
    esac
    echo "  $(date +%T) $state"
    sleep 30
  done
}

install() {
  local archive
  archive=$(mktemp --suffix=.tar.gz)
  trap 'rm -f "$archive"' RETURN
  run git -C "$(dirname "$0")/.." archive --format=tar.gz \
    "--output=$archive" HEAD
  copy_to_all_workers "$archive" oreo.tar.gz
  # The workers' own Python is 3.10, which is too old.
  on_all_workers 'set -e; rm -rf oreo; mkdir oreo; tar -xzf oreo.tar.gz -C oreo
cd oreo; pip3 install --quiet --user uv
python3 -m uv venv --quiet --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv/bin/python -e ".[tpu,math]"'
}

mount_share() {
  on_all_workers "set -e; mountpoint -q /mnt/oreo && exit 0
sudo apt-get install --yes --quiet nfs-common; sudo mkdir -p /mnt/oreo
sudo mount -t nfs $(printf %q "$nfs") /mnt/oreo; sudo chmod 777 /mnt/oreo"
}

if [ -n "$delete" ]; then
  if [ -n "$queued" ]; then
    run "${queue[@]}" delete "$name" "${where[@]}" --force --quiet
  else
    run "${tpu[@]}" delete "$name" "${where[@]}" --quiet
  fi
  exit
fi

exists || create
[ -n "$queued" ] && wait_for_queue
[ -n "$skip_install" ] || install
[ -n "$nfs" ] && mount_share
on_all_workers "cd oreo && .venv/bin/oreo $(printf '%q ' "$@")--distributed"
