#!/usr/bin/env bash
# Runs N processes of one run on this machine.
#
# Needs: an environment with guided_distill (make venv; source .venv/bin/activate), and devices that N processes can
# share out: on a machine with GPUs every process takes one.
# Type:  launch/local.sh N --config=configs/digits.py [--workdir=DIR] [...]
#
# The same command again goes on where the run was interrupted. PORT is where process 0 listens (12355), PROGRAM what is
# run in place of `python -m guided_distill.main`. SIGTERM and Ctrl-C make the processes save and end, and the script with
# them: with 75, after which the same command goes on. When one fails the others are stopped, and its code is the script's.
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
  kill -TERM "${pids[@]}" 2>/dev/null || true
  for ((tenths = 0; tenths < 100; tenths++)); do
    kill -0 "${pids[@]}" 2>/dev/null || break
    sleep 0.1
  done
  kill -KILL "${pids[@]}" 2>/dev/null || true
}
told=
trap 'told=yes; kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT

for ((id = 0; id < processes; id++)); do
  environment=()
  if command -v nvidia-smi >/dev/null; then
    environment=("CUDA_VISIBLE_DEVICES=$id")
  fi
  env "${environment[@]}" "${program[@]}" "$@" \
    --coordinator="127.0.0.1:${PORT:-12355}" --num_processes="$processes" --process_id="$id" &
  pids+=($!)
done

result=0
for ((ended = 0; ended < processes; ended++)); do
  code=0
  wait -n || code=$?
  while [[ -n $told ]]; do # a signal interrupted the wait, and none may have ended
    told=
    code=0
    wait -n || code=$?
  done
  case $code in
    0 | 127) ;; # 127: none is left
    75) result=75 ;;
    *)
      stop
      exit "$code"
      ;;
  esac
done
exit "$result"
