#!/usr/bin/env bash
# Several machines that share a file system, through DeepSpeed's own launcher (pdsh and password-free ssh).
# Usage: launch/hostfile.sh HOSTFILE CONFIG [KEY=VALUE]...
#
# Without ssh, run the same command on every machine yourself:
#   launch/hostfile.sh HOSTFILE CONFIG   with NO_SSH=1 NODE_RANK=0|1|... MASTER_ADDR=ADDRESS_OF_NODE_0
set -euo pipefail
hostfile=${1:?usage: launch/hostfile.sh HOSTFILE CONFIG [KEY=VALUE]...}
config=${2:?usage: launch/hostfile.sh HOSTFILE CONFIG [KEY=VALUE]...}
shift 2
options=(--hostfile "$hostfile" --no_local_rank --master_port "${MASTER_PORT:-29500}")
if [ "${NO_SSH:-0}" = 1 ]; then
  # DeepSpeed 0.19.8 reaches for ssh to find the master's address unless it is given.
  options+=(--no_ssh --node_rank "${NODE_RANK:?set NODE_RANK}" --master_addr "${MASTER_ADDR:?set MASTER_ADDR}")
fi
exec deepspeed "${options[@]}" --module wan_dist train "$config" "$@"
