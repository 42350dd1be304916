#!/bin/bash
# One run on two machines, by hand. The same command on both, with the first machine's name:
#
#   deploy/two_nodes.sh first-machine gpt2-124m-fineweb-edu --data.source edu --out runs/edu
#
# Rank 0 writes the run directory, on one of them; each machine prepares the text for itself unless it finds it prepared.
# For elastic training say --nnodes=1:2 and --max-restarts=10: the run then goes on with whoever is there. The global
# batch stays the same, so it must divide by either number of ranks.
set -euo pipefail
first=$1
shift
exec .venv/bin/torchrun \
    --nnodes="${NNODES:-2}" --nproc-per-node="${NPROC:-8}" --max-restarts="${MAX_RESTARTS:-0}" \
    --rdzv-backend=c10d --rdzv-endpoint="$first:29500" --rdzv-id="${RUN_ID:-regpt}" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1 \
    -m regpt train "$@"
