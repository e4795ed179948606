#!/usr/bin/env bash
# Trains on this node's processes, as one of NNODES nodes. The same line on every node, NODE_RANK apart:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash scripts/launch.sh configs/llava_qwen.yaml key=value …
set -euo pipefail
NNODES="${NNODES:-1}"
NODE_RANK="${NODE_RANK:-0}"
MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"
MASTER_PORT="${MASTER_PORT:-29500}"
NPROC_PER_NODE="${NPROC_PER_NODE:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
if [ $# -lt 1 ]; then
    echo "usage: [NNODES= NODE_RANK= NPROC_PER_NODE= MASTER_ADDR= MASTER_PORT=] $0 CONFIG [key=value …]" >&2
    exit 2
fi
# A static rendezvous and no restarts: when a node dies the others end within seconds, and the same
# command started again goes on from the last checkpoint (docs/log.md has what else was tried).
exec torchrun --nnodes "$NNODES" --node_rank "$NODE_RANK" --nproc_per_node "$NPROC_PER_NODE" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" --max_restarts 0 \
    -m vlm_adapt train "$@"
