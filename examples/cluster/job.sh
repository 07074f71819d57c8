#!/bin/bash
# A SLURM job that is requeued before its time is over, and goes on: sbatch job.sh ddp.yaml
# For FSDP2: sbatch job.sh fsdp2.yaml --trainer.strategy.init_args.data_parallel_size 8
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=SIGUSR1@120
#SBATCH --open-mode=append

srun python train.py --config "$@" --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE"
