#!/bin/bash
# Slurm job that trains with srun and requeues itself until the run is finished. One task per GPU, or one launcher per
# node:
#   sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 --time 24:00:00 launch/slurm/srun.sh trivium train CONFIG
#   sbatch --nodes 2 --ntasks-per-node 1 --gpus-per-node 8 launch/slurm/srun.sh \
#     trivium launch --nproc-per-node 8 train CONFIG
# Slurm signals this script (B:) 300 s before the time limit. The script passes the signal to all ranks, again every
# second, so that ranks that are still starting get it too. They save and exit with 75, and so does srun.
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

trap told=USR1 USR1
trap told=TERM TERM # sent by `scancel`; Slurm signals the ranks itself

# Signals stay blocked in each rank until it has set its handlers, so that none kills it while it starts. When one rank
# has died, --wait=60 ends the others, which may wait for it forever, a minute later.
SLURM_EXIT_ERROR=138 srun --wait=60 env --block-signal=INT,TERM,HUP,USR1 "$@" &
srun=$!
while kill -0 $srun 2>/dev/null; do
  [ "$told" = USR1 ] && kill -USR1 $srun
  sleep 1 &
  wait $!
done
wait $srun
status=$?
# A signal before srun has started its ranks ends srun with another status; nothing is lost then either.
[ "$told" ] && [ $status -ge 128 ] && status=75
{ [ $status -eq 75 ] || [ $status -eq 76 ]; } && [ "$told" != TERM ] && scontrol requeue "$SLURM_JOB_ID"
exit $status
