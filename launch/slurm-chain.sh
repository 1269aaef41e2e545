#!/usr/bin/env bash
# The whole way on Slurm, each job after the one before has succeeded:
#   launch/slurm-chain.sh PREPARE CONFIG [section.field=value ...]
# Prepares, trains (queued again at its limit), exports, samples and evaluates; prints the jobs.
# From the environment: NODES and GPUS (of each) to train on, TASKS of the arrays, SBATCH_OPTIONS,
# and Slurm's own SBATCH_ACCOUNT, SBATCH_PARTITION, ... GPUS=0 RANKS=2 trains on CPUs.
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export SREPA_LAUNCH=$launch
prepare=${1:?the configuration of \`prepare\`} config=${2:?the configuration of the experiment}
settings=("${@:3}") array=0-$((${TASKS:-16} - 1)) GPUS=${GPUS:-8}
read -ra options <<< "${SBATCH_OPTIONS:-}"
job=

submit() {
  local command=(sbatch --parsable "${options[@]}" ${job:+--dependency="afterok:$job"} "${@:2}")
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "${command[@]}" && echo
    job=$1
  else
    job=$("${command[@]}")
    echo "$1: job $job"
  fi
}

one=(--nodes=1 --ntasks-per-node=1 --gpus-per-node="$((GPUS > 0))")
each=(--array="$array" --gpus-per-node="$((GPUS > 0))")
submit prepare "${each[@]}" "$launch/slurm-array.sbatch" prepare "$prepare"
submit train --nodes="${NODES:-1}" --ntasks-per-node="${RANKS:-$GPUS}" --gpus-per-node="$GPUS" \
  "$launch/slurm.sbatch" train "$config" "${settings[@]}"
submit export "${one[@]}" "$launch/slurm.sbatch" export "$config" "${settings[@]}"
submit sample "${each[@]}" "$launch/slurm-array.sbatch" sample "$config" "${settings[@]}"
submit evaluate "${one[@]}" "$launch/slurm.sbatch" evaluate "$config" "${settings[@]}"
