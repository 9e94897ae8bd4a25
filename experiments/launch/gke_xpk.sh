#!/usr/bin/env bash
# The 8B run on a GKE cluster of TPUs, as a workload of xpk (gke.md).
#
#   CLUSTER=varedit PROJECT=mine ZONE=us-east5-a IMAGE=us-docker.pkg.dev/mine/varedit/train:1 \
#     experiments/launch/gke_xpk.sh
set -euo pipefail

CLUSTER=${CLUSTER:?name of the cluster}
PROJECT=${PROJECT:?Google Cloud project}
ZONE=${ZONE:?zone of the cluster}
IMAGE=${IMAGE:?container image with this repository in /varedit_jax (gke.md)}
DISK=${DISK:-/disk} # where the shared disk is mounted in the container
TPU=${TPU:-v5p-256} # 128 chips
SLICES=${SLICES:-1}
COPIES=${COPIES:-2} # of the parameters in each slice; 2 on v5p-256, 1 on the others (data of the config's layout)
CONFIG=${CONFIG:-experiments/configs/varedit_8b_512.py:v5p_256}
RUN=${RUN:-varedit-8b-512}

exec xpk workload create --workload="$RUN" --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
  --tpu-type="$TPU" --num-slices="$SLICES" --docker-image="$IMAGE" \
  --max-restarts=1000 --restart-on-user-code-failure --termination-grace-period-seconds=120 \
  --env="JAX_COMPILATION_CACHE_DIR=$DISK/cache" \
  --command="cd /varedit_jax && exec python -m experiments.train --config=$CONFIG --workdir=$DISK/runs/$RUN \
    --config.mesh.data=$((COPIES * SLICES)) --config.mesh.fsdp=-1 \
    --config.tokenizer_weights=$DISK/weights/bsq_14bit --config.text_weights=$DISK/weights/flan_t5_xl \
    --config.init_from=$DISK/weights/infinity_8b --config.data.directory=$DISK/data \
    --config.cadence.save_minutes=15 --config.guard.hang_minutes=30"
