#!/bin/bash
# A training run under Slurm by MPICH's mpirun, requeued until it is finished:
#   sbatch --nodes 2 --ntasks-per-node 8 launch/slurm/mpirun.sh trivium train CONFIG
# mpirun is no step of Slurm's: the signal comes to this script (B:), which passes it on; mpirun gives it to its ranks.
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

mpirun -n "$SLURM_NTASKS" "$@" &
mpirun=$!
trap 'kill -USR1 $mpirun' USR1
wait $mpirun
status=$?
while kill -0 $mpirun 2>/dev/null; do # the trap ended that wait
  wait $mpirun
  status=$?
done
[ $status -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit $status
