#!/usr/bin/env bash
# Several machines by ssh: start it on one of them, which must reach the others without a password.
#   HOSTFILE=hosts launch/hostfile.sh train CONFIG [section.field=value ...]
# HOSTFILE has a line `node1 slots=8` per machine. LAUNCHER=pdsh takes pdsh instead of ssh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

run deepspeed --hostfile "${HOSTFILE:?a file with a line: node1 slots=8}" \
  --launcher "${LAUNCHER:-ssh}" --master_port "${PORT:-29500}" --module srepa_ds "$@"
