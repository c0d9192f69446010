#!/bin/bash
# Slurm job that trains with one torchrun per node and requeues itself until the run is finished:
#   sbatch --nodes 2 --ntasks-per-node 1 --gpus-per-node 8 launch/slurm/torchrun.sh \
#     --nproc-per-node 8 -m pretrain.train CONFIG
# Slurm signals this script (B:) 300 s before the time limit. The script remembers the signal, since torchrun exits with
# 1 whatever its ranks' status, and passes it to the ranks through a shell on each node, again every second, so that
# ranks that are still starting get it too. The signal is blocked in torchrun, which would end itself, or kill its ranks
# after 30 s. It does the latter after SIGTERM too, hence --shutdown-timeout.
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

trap told=USR1 USR1
trap told=TERM TERM # sent by `scancel`; Slurm signals the ranks itself

node='
  for signal in USR1 TERM INT; do trap "told=$signal" $signal; done
  env --block-signal=USR1 torchrun "$@" &
  torchrun=$!
  while kill -0 $torchrun 2>/dev/null; do
    [ "$told" ] && pkill -$told --parent $torchrun
    sleep 1 &
    wait $!
  done
  wait $torchrun'
host=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
port=$((20000 + SLURM_JOB_ID % 10000))
srun --wait=60 bash -c "$node" torchrun --nnodes "$SLURM_NNODES" \
  --rdzv-backend c10d --rdzv-endpoint "$host:$port" --rdzv-id "$SLURM_JOB_ID" --shutdown-timeout 300 "$@" &
srun=$!
while kill -0 $srun 2>/dev/null; do
  [ "$told" = USR1 ] && kill -USR1 $srun
  sleep 1 &
  wait $!
done
wait $srun
status=$?
[ "$told" ] && [ $status -ne 0 ] && status=75
[ $status -eq 75 ] && [ "$told" != TERM ] && scontrol requeue "$SLURM_JOB_ID"
exit $status
