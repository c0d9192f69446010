#!/bin/bash
# A training run under Slurm by torchrun, one on each node, requeued until it is finished:
#   sbatch --nodes 2 --ntasks-per-node 1 --gpus-per-node 8 launch/slurm/torchrun.sh \
#     --nproc-per-node 8 -m pretrain.train CONFIG
# torchrun ends with 1 whatever its ranks end with, so this script notes the signal itself (B:) and passes it on to the
# ranks. Without --signals-to-handle, SIGUSR1 would kill torchrun; without --shutdown-timeout, it would kill its ranks
# after 30 s.
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

host=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
port=$((20000 + SLURM_JOB_ID % 10000))
srun --wait=60 torchrun --nnodes "$SLURM_NNODES" \
  --rdzv-backend c10d --rdzv-endpoint "$host:$port" --rdzv-id "$SLURM_JOB_ID" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 300 "$@" &
srun=$!
trap 'told=yes; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
wait $srun
status=$?
while kill -0 $srun 2>/dev/null; do # the trap ended that wait
  wait $srun
  status=$?
done
[ "$told" ] && [ $status -ne 0 ] && scontrol requeue "$SLURM_JOB_ID"
exit $status
