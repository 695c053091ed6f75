#!/usr/bin/env bash
# Submits every_host.sh as a workload to a GKE cluster made by XPK.
#
#   CLUSTER=my-cluster PROJECT=my-project ZONE=us-east5-a WORKLOAD=grow-8b TPU_TYPE=v5p-64 \
#     IMAGE=REGISTRY/opt_deus_jax STORAGE=my-filestore CONFIG=configs/llama3.py:8b_v5p \
#     WORKDIR=/shared/8b experiments/launch/xpk.sh --config.data.train=/shared/fineweb_edu
#
# IMAGE holds the checkout as its working directory, with opt_deus_jax[tpu] installed. STORAGE is a
# storage of the cluster (xpk storage attach) that is mounted where WORKDIR lies.
set -euo pipefail
: "${CLUSTER:?set CLUSTER to the XPK cluster}"
: "${PROJECT:?set PROJECT to its Google Cloud project}"
: "${ZONE:?set ZONE to its zone}"
: "${WORKLOAD:?set WORKLOAD to a new name}"
: "${TPU_TYPE:?set TPU_TYPE to the slice, such as v5p-64 (cores) or v5litepod-16 (chips)}"
: "${IMAGE:?set IMAGE to the container image}"
: "${STORAGE:?set STORAGE to a storage that is attached to the cluster}"
: "${CONFIG:?set CONFIG to configs/NAME.py[:variant]}"
: "${WORKDIR:?set WORKDIR to a folder on that storage}"

# GKE numbers the hosts of a slice in TPU_WORKER_ID.
printf -v settings 'CONFIG=%q WORKDIR=%q EXPAND_PLATFORMS=%q HOST="%s"' \
  "$CONFIG" "$WORKDIR" "${EXPAND_PLATFORMS:-cpu}" "\$TPU_WORKER_ID"
arguments=""
if (($#)); then
  printf -v arguments ' %q' "$@"
fi
exec xpk workload create \
  --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
  --workload="$WORKLOAD" --tpu-type="$TPU_TYPE" --num-slices=1 \
  --docker-image="$IMAGE" --storage="$STORAGE" --max-restarts="${MAX_RESTARTS:-10}" \
  --command="env $settings bash experiments/launch/every_host.sh$arguments"
