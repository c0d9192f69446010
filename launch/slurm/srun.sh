#!/bin/bash
# A training run under Slurm, requeued until it is finished. One task a GPU, or one launcher a node:
#   sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 --time 24:00:00 launch/slurm/srun.sh trivium train CONFIG
#   sbatch --nodes 2 --ntasks-per-node 1 --gpus-per-node 8 launch/slurm/srun.sh \
#     trivium launch --nproc-per-node 8 train CONFIG
# 300 s before the time limit Slurm sends SIGUSR1 to all ranks. They save, end with 75, and so does srun.
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

# When one rank has died, the others, which may wait for it forever, are ended a minute later.
srun --wait=60 "$@"
status=$?
[ $status -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit $status
