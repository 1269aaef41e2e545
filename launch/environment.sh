# shellcheck shell=bash
# Sourced by the scripts beside it: what the processes of a job find in their environment. What is
# set already keeps its value. DRY_RUN=1 prints the final command instead of running it.
default() { export "$1=${!1:-$2}"; }

# Processes, not threads, share the cores of a node.
default OMP_NUM_THREADS 8
# Before torch 2.12, a group that torchrun restarts would meet the store of the failed one.
default TORCH_DISABLE_SHARE_RDZV_TCP_STORE 1
# One line per NCCL problem, not one per connection; INFO shows which network it takes.
default NCCL_DEBUG WARN
# Memory of the GPU grows in segments, so that it does not run out in pieces.
default PYTORCH_CUDA_ALLOC_CONF expandable_segments:True

# The network between nodes. NCCL finds InfiniBand by itself; set these where it takes another one:
#   InfiniBand:     NCCL_IB_HCA=mlx5              which adapters (`ibstat -l`)
#   RoCE:           NCCL_IB_GID_INDEX=3           the RoCE v2 entry (`show_gids`)
#   Ethernet alone: NCCL_IB_DISABLE=1 NCCL_SOCKET_IFNAME=eth0
#   AWS EFA:        FI_PROVIDER=efa FI_EFA_USE_DEVICE_RDMA=1, and the plugin aws-ofi-nccl
# Processes find each other over NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME: name one network for
# both if a node has several, never docker0 or lo.

run() {
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "$@" && echo
  else
    exec "$@"
  fi
}
