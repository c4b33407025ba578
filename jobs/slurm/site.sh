# What your cluster decides, in one place: the job scripts beside this file and jobs/submit.py read it. Plain bash.
# SITE=FILE in the environment names another file instead, such as one that is not in the project.

# Who pays, and where. sbatch itself reads these (`source jobs/slurm/site.sh` before you call it by hand).
# export SBATCH_ACCOUNT=my_account
# export SBATCH_PARTITION=gpu
# export SBATCH_QOS=normal

# A node, and how long a job may take. jobs/submit.py asks for these; a script that is submitted by hand has its own.
GPUS_PER_NODE=8 # 0: ranks compute on CPUs
RANKS_PER_NODE=8
CPUS_PER_NODE=64
MEMORY=0         # 0: all of a node's
GPU=h100-80g     # what jobs/plan.py should reckon with
TIME=24:00:00    # a run that needs longer saves, and queues itself again
SAVE_SECONDS=300 # before the limit, in which it finishes a step and saves; TIME must be three minutes more
JOIN_SECONDS=180 # that nodes wait for each other, at the start and when one is lost

# How a compute node gets to Python: a function that is called once a job, and what stands before every command.
enter() { source .venv/bin/activate; } # made by: source jobs/setup.sh
# enter() { module load python/3.11 cuda/12.8 && source /path/to/venv/bin/activate; }
IN=() # IN=(apptainer exec --nv --bind /data moe-dit.sif)
SRUN=() # further flags of srun, as SRUN=(--container-image=... --container-mounts=...); then Python may be only in there
# export NCCL_SOCKET_IFNAME=ib0 # if NCCL picks a network that does not join the nodes
# export NCCL_DEBUG=INFO        # if the first step hangs

# Where things are, seen alike from every node. Each can be given to a job as a flag instead.
IMAGES=data/imagenet/train
VAE=stabilityai/sd-vae-ft-mse # a hub name, or a local folder where compute nodes have no internet
REFERENCE=data/VIRTUAL_imagenet256_labeled.npz
INCEPTION=download # or the weights' local file where compute nodes have no internet
