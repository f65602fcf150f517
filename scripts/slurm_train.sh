#!/usr/bin/env bash
# One run on the nodes that Slurm gives:  sbatch --nodes 2 --gpus-per-node 8 scripts/slurm_train.sh --recipe NAME [section.key=value ...]
# Options of your cluster (account, partition, time) go on sbatch's command line.
#SBATCH --job-name=glora-llm
#SBATCH --exclusive
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@120
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch, from the repository}"

gpus="${SLURM_GPUS_ON_NODE:?say how many GPUs a node has: sbatch --gpus-per-node N}"
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"

# A folder that all processes of this launch have in common: an error that all of them find is printed once.
GLORA_LAUNCH="$(mktemp -d "$PWD/.launch-$SLURM_JOB_ID-XXXXXX")"
export GLORA_LAUNCH
trap 'rm -rf "$GLORA_LAUNCH"' EXIT

# Slurm itself starts the processes, so its signals reach them with no launcher between. One that fails ends the others;
# one that was told to end leaves only when the checkpoint is there.
code=0
srun --ntasks=$((SLURM_NNODES * gpus)) --ntasks-per-node="$gpus" --cpus-per-task=$((SLURM_CPUS_ON_NODE / gpus)) \
  --kill-on-bad-exit=1 bash -c 'export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    exec python -u train.py "$@"' train "$@" || code=$?

# Told to end, by the time limit or a preemption: the job goes on from its checkpoint. One that was cancelled runs no more.
if [ -e "$GLORA_LAUNCH/told-to-end" ]; then
  code=75
  [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" != RUNNING ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
