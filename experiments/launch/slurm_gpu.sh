#!/usr/bin/env bash
# Grows, tokenises and trains on GPU nodes under SLURM, a process a GPU.
#
#   CONFIG=configs/llama3.py:8b_gpu WORKDIR=/shared/8b sbatch --nodes=2 \
#     experiments/launch/slurm_gpu.sh --config.data.train=/shared/fineweb_edu
#
# Submit from the checkout, which every node sees as it sees WORKDIR. Two minutes before the time is
# up, and when the job is preempted, training saves a checkpoint; the job is then queued again.
#SBATCH --job-name=opt_deus
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
: "${CONFIG:?set CONFIG to configs/NAME.py[:variant]}"
: "${WORKDIR:?set WORKDIR to a folder that every node sees}"
PYTHON="${PYTHON:-.venv/bin/python}"
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"

# srun does not take this over from sbatch.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

flags=("--config=$CONFIG" "--workdir=$WORKDIR" "$@")
# All tasks share the gaps and files, on their CPUs unless EXPAND_PLATFORMS says cuda.
JAX_PLATFORMS="${EXPAND_PLATFORMS:-cpu}" srun "$PYTHON" -m experiments.expand "${flags[@]}" \
  --coordinator=auto
JAX_PLATFORMS=cpu srun --nodes=1 --ntasks=1 "$PYTHON" -m experiments.prepare_data "${flags[@]}"
status=0
srun "$PYTHON" -m experiments.train "${flags[@]}" --coordinator=auto || status=$?
# 143: stopped by SIGTERM with a checkpoint saved.
if ((status == 143)); then
  scontrol requeue "${SLURM_JOB_ID:?}"
fi
exit "$status"
