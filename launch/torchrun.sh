#!/usr/bin/env bash
# Several machines, without ssh: start it on each of them, at about the same time.
#   HEAD=node0:29500 NODES=2 NODE_RANK=0 launch/torchrun.sh train CONFIG [section.field=value ...]
# HEAD is an address of the machine with NODE_RANK 0, and a free port there. If a process dies, all
# are started again, RESTARTS times at most; training resumes from its last checkpoint.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

run torchrun \
  --nnodes "${NODES:?how many machines}" --node-rank "${NODE_RANK:?0 to NODES - 1}" \
  --nproc-per-node "${GPUS:-gpu}" --max-restarts "${RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-endpoint "${HEAD:?host:port of machine 0}" \
  --rdzv-id "${JOB:-srepa}" -m srepa_ds "$@"
