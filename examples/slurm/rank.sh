#!/usr/bin/env bash
# Becomes one rank: tells the command its place in PyTorch's words and runs it. srun starts this
# once per rank, inside the container where there is one.
set -euo pipefail
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
exec "$@"
