#!/bin/bash
# Train on several hosts under Slurm: sbatch examples/slurm.sh [arguments of the script]
#
# One torchrun agent on each host starts a process for each GPU. A process that dies is started again with all the
# others, up to three times; at the time limit the run saves itself and the job goes back into the queue. Every start is
# the same command line, and resume="auto" goes on from the newest checkpoint, in a folder that all hosts share.
#
#SBATCH --job-name=ununennium
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#
# Signals. B: lets USR1 reach this shell only, 120 s before the time limit, so that it knows to requeue; without B: only
# the agents would get it. The shell passes it to srun, srun to the agents, and each agent, because of
# --signals-to-handle, to its processes. They agree on a step, save, and exit with 143 within the 90 s that an agent
# gives them here (30 s by default). Two usual ways fail: an agent that is not told to handle USR1 dies of it and takes
# its processes along without a word, and SIGTERM sent to srun becomes SIGKILL for all. Slurm's own preemption sends
# SIGTERM to the agents, which pass it on, and requeues by itself because of --requeue.

PROCESSES=${SLURM_GPUS_ON_NODE:-${PROCESSES_PER_NODE:-1}} # on each host
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((10000 + SLURM_JOB_ID % 50000))

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=90

out_of_time=
step=
trap 'out_of_time=yes; [[ -n $step ]] && kill -USR1 "$step"' USR1

srun torchrun \
    --nnodes="$SLURM_NNODES" \
    --nproc_per_node="$PROCESSES" \
    --rdzv_backend=c10d \
    --rdzv_endpoint="$HEAD:$PORT" \
    --rdzv_id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
    --max_restarts=3 \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    examples/train_distributed.py "$@" &
step=$!

wait "$step" # a trapped signal ends this wait, not what is waited for
status=$?
if [[ -n $out_of_time ]]; then
    wait "$step"
    status=$?
    [[ $status -ne 0 ]] && exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
