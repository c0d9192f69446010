#!/bin/bash
# A training run under Slurm, requeued until it is finished. One task a GPU, or one launcher a node:
#   sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 --time 24:00:00 launch/slurm/srun.sh trivium train CONFIG
#   sbatch --nodes 2 --ntasks-per-node 1 --gpus-per-node 8 launch/slurm/srun.sh \
#     trivium launch --nproc-per-node 8 train CONFIG
# 300 s before the time limit Slurm signals this script (B:), which passes the signal on to all ranks, every second, so
# that it is not lost on those that start only now. They save, end with 75, and so does srun.
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

trap told=USR1 USR1
trap told=TERM TERM # of `scancel`; Slurm tells the ranks itself

# Each rank holds signals back until it can answer them: none kills it as it starts. When one rank has died, the others,
# which may wait for it forever, are ended a minute later.
SLURM_EXIT_ERROR=138 srun --wait=60 env --block-signal=INT,TERM,HUP,USR1 "$@" &
srun=$!
while kill -0 $srun 2>/dev/null; do
  [ "$told" = USR1 ] && kill -USR1 $srun
  sleep 1 &
  wait $!
done
wait $srun
status=$?
# A signal that comes before srun is up ends it with another status; no rank has begun then.
[ "$told" ] && [ $status -ge 128 ] && status=75
[ $status -eq 75 ] && [ "$told" != TERM ] && scontrol requeue "$SLURM_JOB_ID"
exit $status
