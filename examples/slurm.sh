#!/bin/bash
# ia3 train on two nodes of eight GPUs each: one launcher a node, which starts a process a GPU.
#   sbatch examples/slurm.sh
# The folder of the run has to be on a disk that all nodes see. Where Slurm ends the job at its limit, SIGTERM saves the
# state, and submitting the same file again goes on.
#SBATCH --job-name=ia3
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
set -euo pipefail

RUN=${RUN:-$SLURM_SUBMIT_DIR/runs/reviews}
WORK=(train google/flan-t5-xl reviews.csv --precision bf16 --batch-size 256 --output "$RUN")
if [ -f "$RUN/state.pt" ]; then
    WORK=(train --resume "$RUN")
fi

FIRST_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node 8 \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$FIRST_NODE:29500" \
    -m ia3 "${WORK[@]}"
