#!/usr/bin/env bash
# Several machines under Slurm, one task each, which starts a rank for every GPU that it sees.
#   sbatch --nodes=2 scripts/launch_slurm.sh train CFG [--nproc N] [key=value ...]
# output_dir lies on a disk that all machines share. The same command again goes on from the last checkpoint.
#SBATCH --job-name=erniekit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=TERM@300
# The last line: 300 seconds before the time is up all ranks are asked to save and stop.
set -euo pipefail
: "${1:?usage: sbatch --nodes=N scripts/launch_slurm.sh train CFG [key=value ...]}"

read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export NNODES=$SLURM_JOB_NUM_NODES
export MASTER_ADDR=${MASTER_ADDR:-$first}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))} # two jobs may share a machine
# shellcheck disable=SC2016 # every task reads its own number
exec srun --ntasks-per-node=1 bash -c 'NODE_RANK=$SLURM_NODEID exec erniekit "$@"' erniekit "$@"
