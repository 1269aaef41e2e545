#!/usr/bin/env bash
# All GPUs of this machine.
#   launch/one-node.sh train CONFIG [section.field=value ...]     GPUS=4 takes four of them
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

run torchrun --standalone --nproc-per-node "${GPUS:-gpu}" -m srepa_ds "$@"
