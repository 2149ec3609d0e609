#!/usr/bin/env bash
# Evaluate with one process per GPU on one machine, or on several. Without a GPU the
# processes share the CPU and talk over gloo.
#
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of tools/test.py]
#
# GPUS counts the processes of this machine. PORT=29601 moves the rendezvous, which two
# jobs on one machine need. For several machines run it on each, with
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=<address of the first machine>
set -euo pipefail
usage() {
    echo "usage: $0 CONFIG CHECKPOINT GPUS [arguments of tools/test.py]" >&2
    [ $# -eq 0 ] || echo "error: $1" >&2
    exit 2
}
[ $# -ge 3 ] || usage
config=$1 checkpoint=$2 gpus=$3
shift 3
nodes=${NNODES:-1} rank=${NODE_RANK:-0} port=${PORT:-29501}
[[ $gpus =~ ^[1-9][0-9]*$ ]] || usage "GPUS must be a number of processes, got '$gpus'"
[[ $nodes =~ ^[1-9][0-9]*$ ]] || usage "NNODES must be a number of machines, got '$nodes'"
[[ $rank =~ ^(0|[1-9][0-9]*)$ && $rank -lt $nodes ]] ||
    usage "NODE_RANK must be from 0 to NNODES - 1 = $((nodes - 1)), got '$rank'"
[[ $port =~ ^[1-9][0-9]*$ ]] || usage "PORT must be a free port, got '$port'"
[[ $nodes -eq 1 || -n ${MASTER_ADDR:-} ]] ||
    usage "NNODES=$nodes needs MASTER_ADDR, the address of the first machine"
command -v torchrun >/dev/null ||
    usage "torchrun was not found: activate the environment, which has it"
. "$(dirname "$0")/cpu_environment.sh" "$gpus"
exec torchrun \
    --nnodes="$nodes" --node_rank="$rank" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="$port" \
    --nproc_per_node="$gpus" \
    "$(dirname "$0")/test.py" "$config" "$checkpoint" --launcher pytorch "$@"
