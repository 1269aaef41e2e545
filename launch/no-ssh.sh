#!/usr/bin/env bash
# Several machines by the deepspeed launcher, without ssh: start it on each of them.
#   HEAD=node0 HOSTFILE=hosts NODE_RANK=0 launch/no-ssh.sh train CONFIG [section.field=value ...]
# HOSTFILE has a line `node1 slots=8` per machine, in the order of NODE_RANK, the same on all.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

run deepspeed --no_ssh --hostfile "${HOSTFILE:?a file with a line: node1 slots=8}" \
  --node_rank "${NODE_RANK:?place of this machine in the file, from 0}" \
  --master_addr "${HEAD:?address of machine 0}" --master_port "${PORT:-29500}" \
  --module srepa_ds "$@"
