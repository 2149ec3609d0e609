#!/usr/bin/env bash
# Train on several GPUs of one machine, or of several.
#
#   tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]
#
# For several machines set NNODES, NODE_RANK, MASTER_ADDR and PORT on each.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 CONFIG GPUS [arguments of tools/train.py]" >&2; exit 2; }
config=$1 gpus=$2
shift 2
exec torchrun \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    --nproc_per_node="$gpus" \
    "$(dirname "$0")/train.py" "$config" --launcher pytorch "$@"
