#!/usr/bin/env bash
# One machine, all its GPUs. Usage: launch/local.sh CONFIG [KEY=VALUE]...
set -euo pipefail
config=${1:?usage: launch/local.sh CONFIG [KEY=VALUE]...}
shift
exec wan-dist launch "$config" "$@"
