#!/usr/bin/env bash
# What each host of a pod runs: all grow, host 0 tokenises while the others wait, then all train.
#
#   CONFIG=... WORKDIR=/shared/8b HOST=0 experiments/launch/every_host.sh [--config.FIELD=VALUE ...]
#
# WORKDIR is one folder that every host sees. HOST is this host's number.
set -euo pipefail
: "${CONFIG:?set CONFIG to configs/NAME.py[:variant]}"
: "${WORKDIR:?set WORKDIR to a folder that every host sees}"
: "${HOST:?set HOST to the number of this host, from 0}"
PYTHON="${PYTHON:-python3}"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

flags=("--config=$CONFIG" "--workdir=$WORKDIR" "$@")
# All hosts share the gaps and files, on their CPUs unless EXPAND_PLATFORMS says tpu.
JAX_PLATFORMS="${EXPAND_PLATFORMS:-cpu}" "$PYTHON" -m experiments.expand "${flags[@]}" \
  --coordinator=auto
# prepare_data writes its last file when all is complete.
if [[ "$HOST" == 0 ]]; then
  # A TPU host that is alone waits for the others as soon as it touches its chips.
  JAX_PLATFORMS=cpu "$PYTHON" -m experiments.prepare_data "${flags[@]}"
else
  waited=0
  until [[ -f "$WORKDIR/records/records.json" ]]; do
    sleep 10
    waited=$((waited + 10))
    if ((waited > ${WAIT_SECONDS:-14400})); then
      echo "error: host 0 did not finish $WORKDIR/records" >&2
      exit 1
    fi
  done
fi
exec "$PYTHON" -m experiments.train "${flags[@]}" --coordinator=auto
