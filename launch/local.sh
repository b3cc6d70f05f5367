#!/usr/bin/env bash
# Runs N processes of one run on this machine.
#
# Needs: an environment with guided_distill (make venv; source .venv/bin/activate), and devices that N processes can
# share out: on a machine with GPUs every process takes one.
# Type:  launch/local.sh N --config=configs/digits.py [--workdir=DIR] [...]
#
# The same command again goes on where the run was interrupted. PORT is where process 0 listens (12355), PROGRAM what is
# run in place of `python -m guided_distill.main`. When one process fails the others are stopped, and its exit code is
# that of this script.
set -euo pipefail

if [[ $# -lt 1 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh N --config=FILE [...], N the number of processes" >&2
  exit 2
fi
processes=$1
shift
read -r -a program <<<"${PROGRAM:-python -m guided_distill.main}"

pids=()
stop() {
  kill "${pids[@]}" 2>/dev/null || true
}
trap stop EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

for ((id = 0; id < processes; id++)); do
  environment=()
  if command -v nvidia-smi >/dev/null; then
    environment=("CUDA_VISIBLE_DEVICES=$id")
  fi
  env "${environment[@]}" "${program[@]}" "$@" \
    --coordinator="127.0.0.1:${PORT:-12355}" --num_processes="$processes" --process_id="$id" &
  pids+=($!)
done

for ((ended = 0; ended < processes; ended++)); do
  wait -n || exit $?
done
