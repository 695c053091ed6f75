#!/usr/bin/env bash
# Grows, tokenises and trains on one machine, over all its devices. Run it again to go on.
#
#   CONFIG=configs/llama3.py:8b_gpu WORKDIR=runs/8b experiments/launch/single_box.sh \
#     --config.data.train=/data/fineweb_edu
#
# Arguments are given to every launcher.
set -euo pipefail
: "${CONFIG:?set CONFIG to configs/NAME.py[:variant]}"
: "${WORKDIR:?set WORKDIR to the folder of the experiment}"
PYTHON="${PYTHON:-python3}"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

flags=("--config=$CONFIG" "--workdir=$WORKDIR" "$@")
# On the CPU unless EXPAND_PLATFORMS says cuda: then on all GPUs, a gap each at a time.
JAX_PLATFORMS="${EXPAND_PLATFORMS:-cpu}" "$PYTHON" -m experiments.expand "${flags[@]}"
JAX_PLATFORMS=cpu "$PYTHON" -m experiments.prepare_data "${flags[@]}"
exec "$PYTHON" -m experiments.train "${flags[@]}"
