#!/usr/bin/env bash
# Runs one command on all workers of a Cloud TPU slice that exists already.
#
# Needs: gcloud, logged in; a TPU VM slice; on it the sources and what they need, which `setup` brings; a workdir and a
#        data_dir in a bucket that the slice may read and write, as every worker has disks of its own.
# Type:  export TPU_NAME=my-slice ZONE=us-west4-a
#        launch/tpu_pod.sh setup
#        launch/tpu_pod.sh --config=configs/imagenet64.py --workdir=gs://bucket/run --config.data.data_dir=gs://bucket/data
#
# To make a slice of v5e:16x16:
#        gcloud compute tpus tpu-vm create my-slice --zone=us-west4-a --accelerator-type=v5litepod-256 --version=v2-alpha-tpuv5-lite
# The same command again goes on where the run was interrupted, on this slice or on another: at once after exit code 75,
# with which it ends when it was told to stop and has saved, and when the cause is mended after 1 (the machine) or 2 (a
# mistake in the command).
set -euo pipefail

if [[ $# -eq 0 ]]; then
  echo "usage: launch/tpu_pod.sh setup | launch/tpu_pod.sh --config=FILE --workdir=gs://... [...]" >&2
  exit 2
fi
if [[ -z ${TPU_NAME:-} || -z ${ZONE:-} ]]; then
  echo "which slice? export TPU_NAME=its-name ZONE=its-zone" >&2
  exit 2
fi
on_all_workers() {
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all --command="$1"
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
case $1 in
  setup)
    archive=$(mktemp -d)
    trap 'rm -rf "$archive"' EXIT
    git archive --format=tar.gz --output="$archive/guided_distill.tar.gz" HEAD
    gcloud compute tpus tpu-vm scp "$archive/guided_distill.tar.gz" "$TPU_NAME:guided_distill.tar.gz" \
      --zone="$ZONE" --worker=all
    on_all_workers "mkdir -p guided_distill && tar xzf guided_distill.tar.gz -C guided_distill && cd guided_distill &&
      sudo apt-get -qq install -y python3.11-venv && python3.11 -m venv .venv &&
      .venv/bin/pip install -q -e '.[tpu]' gcsfs -c constraints.txt"
    ;;
  *)
    # What an interrupted connection left running holds the chips: it is told to save and stop first.
    printf -v arguments '%q ' "$@"
    on_all_workers "cd guided_distill || { echo 'no sources here: launch/tpu_pod.sh setup brings them' >&2; exit 2; }
      if [ -f run.pid ]; then
        kill -TERM -\"\$(cat run.pid)\" 2>/dev/null && timeout 120 tail --pid=\"\$(cat run.pid)\" -f /dev/null
        kill -KILL -\"\$(cat run.pid)\" 2>/dev/null
      fi
      setsid .venv/bin/python -m guided_distill.main --coordinator=auto $arguments & echo \$! > run.pid; wait \$!"
    ;;
esac
