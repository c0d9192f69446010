#!/bin/bash
# Slurm job that trains with MPICH's mpirun and requeues itself until the run is finished:
#   sbatch --nodes 2 --ntasks-per-node 8 launch/slurm/mpirun.sh trivium train CONFIG
# Slurm signals this script (B:) 300 s before the time limit, since mpirun is not a Slurm step. The script passes the
# signal to mpirun, and mpirun to its ranks, again every second, so that ranks that are still starting get it too.
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

trap told=USR1 USR1
trap told=TERM TERM # sent by `scancel`

# Signals stay blocked in each rank until it has set its handlers, so that none kills it while it starts.
mpirun -n "$SLURM_NTASKS" env --block-signal=INT,TERM,HUP,USR1 "$@" &
mpirun=$!
while kill -0 $mpirun 2>/dev/null; do
  [ "$told" ] && kill -$told $mpirun
  sleep 1 &
  wait $!
done
wait $mpirun
status=$?
# A signal before the ranks block it ends mpirun with another status, and nothing is lost then either: 128 or more, or the
# signal's number, whose bits mpirun joins with those of SIGKILL (9) if it has killed the other ranks.
if [ "$told" ]; then
  number=$(kill -l "$told")
  [ $status -ge 128 ] || [ $status -eq $number ] || [ $status -eq $((number | 9)) ] && status=75
fi
{ [ $status -eq 75 ] || [ $status -eq 76 ]; } && [ "$told" != TERM ] && scontrol requeue "$SLURM_JOB_ID"
exit $status
