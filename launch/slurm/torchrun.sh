#!/bin/bash
# A training run under Slurm by torchrun, one on each node, requeued until it is finished:
#   sbatch --nodes 2 --ntasks-per-node 1 --gpus-per-node 8 launch/slurm/torchrun.sh \
#     --nproc-per-node 8 -m pretrain.train CONFIG
# torchrun ends with 1 whatever its ranks end with, so this script notes the signal itself (B:), and passes it on to the
# ranks, by way of a shell on each node, every second, so that it is not lost on those that start only now. torchrun has
# it held back, since it would kill its ranks after 30 s, or itself. Without --shutdown-timeout it kills them that soon
# after SIGTERM too.
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

trap told=USR1 USR1
trap told=TERM TERM # of `scancel`; Slurm tells the ranks itself

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
