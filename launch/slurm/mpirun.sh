#!/bin/bash
# A training run under Slurm by MPICH's mpirun, requeued until it is finished:
#   sbatch --nodes 2 --ntasks-per-node 8 launch/slurm/mpirun.sh trivium train CONFIG
# mpirun is no step of Slurm's: the signal comes to this script (B:), which passes it on, every second, so that it is
# not lost on ranks that start only now; mpirun gives it to its ranks.
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

trap told=USR1 USR1
trap told=TERM TERM # of `scancel`

# Each rank holds signals back until it can answer them: none kills it as it starts.
mpirun -n "$SLURM_NTASKS" env --block-signal=INT,TERM,HUP,USR1 "$@" &
mpirun=$!
while kill -0 $mpirun 2>/dev/null; do
  [ "$told" ] && kill -$told $mpirun
  sleep 1 &
  wait $!
done
wait $mpirun
status=$?
# A signal that comes before mpirun is up ends it with another status; no rank has begun then.
[ "$told" ] && [ $status -ge 128 ] && status=75
[ $status -eq 75 ] && [ "$told" != TERM ] && scontrol requeue "$SLURM_JOB_ID"
exit $status
