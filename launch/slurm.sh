#!/usr/bin/env bash
# One run on a Slurm cluster, one process per GPU:
#
#     sbatch --nodes=4 launch/slurm.sh --config=configs/xlxxl.py --workdir=/shared/runs/xlxxl
#
# or one process per node, which leaves more memory to the host:
#
#     sbatch --nodes=4 --ntasks-per-node=1 --cpus-per-task=96 launch/slurm.sh ...
#
# The same command resumes. A run that is preempted, reaches its time limit, loses a node or hangs
# goes back into the queue by itself, RESTARTS times at most; one that ends with an error does not.
#
#SBATCH --job-name=gigatok
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Two minutes before the time limit all processes are told to save and end.
#SBATCH --signal=TERM@120
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?start it with sbatch}"
# shellcheck source=launch/xla_flags.sh
source launch/xla_flags.sh "${HARDWARE:-gpu}"
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-}" # srun does not take it from sbatch
trap : TERM # is for the processes; this script has to outlive them

status=0
srun --label --kill-on-bad-exit=1 "${PYTHON:-python}" main.py "$@" || status=$?

# 143 a signal, with the state saved; 75 hung, or another process is gone; 134, 137 killed by jax or
# Slurm since another process ended.
case $status in
75 | 134 | 137 | 143)
  if ((${SLURM_RESTART_COUNT:-0} < ${RESTARTS:-50})); then
    echo "status $status: back into the queue, where it resumes"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  ;;
esac
exit "$status"
