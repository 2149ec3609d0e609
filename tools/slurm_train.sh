#!/usr/bin/env bash
# Train under SLURM, with one task per GPU.
#
#   [GPUS=8] [GPUS_PER_NODE=8] [CPUS_PER_TASK=5] [SRUN_ARGS=...] \
#       tools/slurm_train.sh PARTITION JOB_NAME CONFIG [arguments of tools/train.py]
#
# Without GPUs, GRES=none starts GPUS tasks on CPUs, which talk over gloo. MASTER_PORT
# moves the rendezvous, which two jobs on one machine need.
set -euo pipefail
usage() {
    echo "usage: $0 PARTITION JOB_NAME CONFIG [arguments of tools/train.py]" >&2
    [ $# -eq 0 ] || echo "error: $1" >&2
    exit 2
}
[ $# -ge 3 ] || usage
partition=$1 job_name=$2 config=$3
shift 3
gpus=${GPUS:-8} cpus=${CPUS_PER_TASK:-5}
[[ $gpus =~ ^[1-9][0-9]*$ ]] || usage "GPUS must be a number of tasks, got '$gpus'"
per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
[[ $per_node =~ ^[1-9][0-9]*$ && $per_node -le $gpus ]] ||
    usage "GPUS_PER_NODE must be from 1 to GPUS = $gpus, got '$per_node'"
[[ $((gpus % per_node)) -eq 0 ]] ||
    usage "GPUS = $gpus is not a multiple of GPUS_PER_NODE = $per_node"
[[ $cpus =~ ^[1-9][0-9]*$ ]] || usage "CPUS_PER_TASK must be a number, got '$cpus'"
command -v srun >/dev/null ||
    usage "srun was not found: this is not a SLURM machine, see tools/dist_train.sh"
read -ra srun_args <<<"${SRUN_ARGS:-}"
# One task that fails ends all of them.
exec srun --partition="$partition" --job-name="$job_name" \
    --gres="${GRES:-gpu:$per_node}" \
    --ntasks="$gpus" --ntasks-per-node="$per_node" --cpus-per-task="$cpus" \
    --kill-on-bad-exit=1 ${srun_args[@]+"${srun_args[@]}"} \
    python -u "$(dirname "$0")/train.py" "$config" --launcher slurm "$@"
