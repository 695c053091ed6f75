#!/usr/bin/env bash
# Runs every_host.sh on all hosts of a Cloud TPU slice, from a machine with gcloud.
#
#   TPU_NAME=my-slice ZONE=us-east5-a CONFIG=configs/llama3.py:8b_v5p WORKDIR=/mnt/shared/8b \
#     experiments/launch/tpu_vm.sh --config.data.train=/mnt/shared/fineweb_edu
#
# CODE is the checkout on every host, with a virtual environment in CODE/.venv.
set -euo pipefail
: "${TPU_NAME:?set TPU_NAME to the name of the TPU VM}"
: "${ZONE:?set ZONE to its zone}"
: "${CONFIG:?set CONFIG to configs/NAME.py[:variant]}"
: "${WORKDIR:?set WORKDIR to a folder that every host has mounted}"
CODE="${CODE:-opt_deus_jax}"

# The number of a host is known on the host only.
number="\$(curl -sf -H Metadata-Flavor:Google \
http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number)"
printf -v settings 'CONFIG=%q WORKDIR=%q EXPAND_PLATFORMS=%q PYTHON=.venv/bin/python HOST="%s"' \
  "$CONFIG" "$WORKDIR" "${EXPAND_PLATFORMS:-cpu}" "$number"
printf -v place '%q' "$CODE"
arguments=""
if (($#)); then
  printf -v arguments ' %q' "$@"
fi
exec gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all \
  --command="cd $place && env $settings bash experiments/launch/every_host.sh$arguments"
