#!/usr/bin/env bash
# The 8B run on TPU VMs (tpu_vm.md): creates the machine, sets it up and trains, repeatedly until the run is finished.
#
#   NAME=varedit ZONE=us-east5-a BUCKET=gs://my-varedit experiments/launch/tpu_vm.sh
set -euo pipefail

NAME=${NAME:?name of the TPU, and of the request for it}
ZONE=${ZONE:?zone, as in us-east5-a}
BUCKET=${BUCKET:?bucket of weights, data and runs, as in gs://my-varedit}
CACHE=${CACHE:-/tmp/varedit_data} # on a disk of each host, for a copy of the data
ACCELERATOR=${ACCELERATOR:-v5p-256} # 128 chips
RUNTIME=${RUNTIME:-v2-alpha-tpuv5}
CONFIG=${CONFIG:-experiments/configs/varedit_8b_512.py:v5p_256}
RUN=${RUN:-varedit_8b_512}
SPOT=${SPOT---spot} # empty: not a spot machine

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [[ ! -f $here/setup.cfg ]]; then
  echo "$here is no checkout of the repository, which this script copies to the hosts; run that of a checkout" >&2
  exit 1
fi

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

state() {
  gcloud compute tpus tpu-vm describe "$NAME" --zone="$ZONE" --format='value(state)' 2>/dev/null || true
}

make_machine() {
  gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --quiet --force 2>/dev/null || true
  gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
    --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" ${SPOT:+"$SPOT"}
  until [[ $(state) == READY ]]; do sleep 60; done
}

set_up() {
  # The machine's own Python is 3.10.
  on_all_hosts "sudo add-apt-repository -y ppa:deadsnakes/ppa >/dev/null && \
    sudo apt-get install -qq -y python3.11-venv && rm -rf varedit_jax"
  gcloud compute tpus tpu-vm scp --recurse "$here" "$NAME":varedit_jax --zone="$ZONE" --worker=all
  on_all_hosts "cd varedit_jax && python3.11 -m venv ../venv && \
    ../venv/bin/pip install -q -c constraints.txt -e '.[tpu,gcs]'"
}

train() {
  on_all_hosts "cd varedit_jax && JAX_COMPILATION_CACHE_DIR=$BUCKET/cache ../venv/bin/python -m experiments.train \
    --config=$CONFIG --workdir=$BUCKET/runs/$RUN \
    --config.tokenizer_weights=$BUCKET/weights/bsq_14bit --config.text_weights=$BUCKET/weights/flan_t5_xl \
    --config.init_from=$BUCKET/weights/infinity_8b --config.data.directory=$BUCKET/data \
    --config.data.cache_directory=$CACHE \
    --config.cadence.save_minutes=15 --config.guard.hang_minutes=30"
}

# A machine that is gone is created again. If training fails three times in a row within ten minutes each, a restart does
# not help.
quick=0
while true; do
  if [[ $(state) != READY ]]; then
    make_machine
    set_up
  fi
  start=$SECONDS
  if train; then break; fi
  if ((SECONDS - start < 600)); then quick=$((quick + 1)); else quick=0; fi
  if ((quick == 3)); then
    echo "the run fails at once; see the last lines above" >&2
    exit 1
  fi
  echo "the run ended before it was finished, and resumes from its newest checkpoint" >&2
  sleep 100  # the lease on a bucket outlives a process that was killed by 90 s
done
