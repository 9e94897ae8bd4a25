#!/usr/bin/env bash
# The 8B run on a GKE cluster of TPUs, as a workload of xpk (gke.md).
#
#   CLUSTER=varedit PROJECT=mine ZONE=us-east5-a IMAGE=us-docker.pkg.dev/mine/varedit/train:1 \
#     BUCKET=gs://my-varedit experiments/launch/gke_xpk.sh
set -euo pipefail

CLUSTER=${CLUSTER:?name of the cluster}
PROJECT=${PROJECT:?Google Cloud project}
ZONE=${ZONE:?zone of the cluster}
IMAGE=${IMAGE:?container image with this repository in /varedit_jax (gke.md)}
BUCKET=${BUCKET:?bucket of weights, data and runs, as in gs://my-varedit}
CACHE=${CACHE:-/tmp/varedit_data} # on a disk of each pod, for a copy of the data
TPU=${TPU:-v5p-256} # 128 chips
SLICES=${SLICES:-1}
COPIES=${COPIES:-2} # of the parameters per slice; 2 on v5p-256, 1 on the others (data of the config's layout)
CONFIG=${CONFIG:-experiments/configs/varedit_8b_512.py:v5p_256}
RUN=${RUN:-varedit-8b-512}
RESTARTS=${RESTARTS:-100} # at most; xpk adds 42 and 127 to 255 to the exit codes that are restarted

exec xpk workload create --workload="$RUN" --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
  --tpu-type="$TPU" --num-slices="$SLICES" --docker-image="$IMAGE" \
  --max-restarts="$RESTARTS" --restart-on-exit-codes=75 --termination-grace-period-seconds=120 \
  --env="JAX_COMPILATION_CACHE_DIR=$BUCKET/cache" \
  --command="cd /varedit_jax && exec python -m experiments.train --config=$CONFIG --workdir=$BUCKET/runs/$RUN \
    --config.mesh.data=$((COPIES * SLICES)) --config.mesh.fsdp=-1 \
    --config.tokenizer_weights=$BUCKET/weights/bsq_14bit --config.text_weights=$BUCKET/weights/flan_t5_xl \
    --config.init_from=$BUCKET/weights/infinity_8b --config.data.directory=$BUCKET/data \
    --config.data.cache_directory=$CACHE \
    --config.cadence.save_minutes=15"
