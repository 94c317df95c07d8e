#!/usr/bin/env bash
# Submits the stages of a model, each to start when the one before has ended well:
#   bash examples/slurm/submit.sh gemma [aln pt it] [-- FLAGS OF SBATCH]
# A model is one that has files MODEL_STAGE.sbatch here. Stages: import aln pt it export eval; without
# names the three stages of training.
# If a stage fails, those after it are taken out of the queue. DATTN_DRY_RUN=1 submits dry runs.
set -euo pipefail

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

folder=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
models=("$folder"/*_pt.sbatch)
models=("${models[@]##*/}")
models=("${models[@]%_pt.sbatch}")
model=${1:-}
[[ " ${models[*]} " == *" $model "* && $model != *" "* ]] ||
  fail "model '$model' is unknown; use one of: ${models[*]}"
shift
stages=()
while (($#)) && [[ $1 != -- ]]; do
  [[ -f $folder/${model}_$1.sbatch ]] ||
    fail "stage '$1' of $model is unknown; use import, aln, pt, it, export or eval"
  stages+=("$1")
  shift
done
(($# == 0)) || shift # the two dashes
((${#stages[@]})) || stages=(aln pt it)

cd "$folder/../.." # the batch scripts find the repository as the folder they were submitted from
dependency=()
for stage in "${stages[@]}"; do
  job=$(sbatch --parsable "${dependency[@]}" "$@" "$folder/${model}_$stage.sbatch")
  job=${job%%;*} # a federation adds the cluster's name
  printf '%s  %s%s\n' "$job" "${model}_$stage" "${dependency[0]:+  after $previous}"
  dependency=("--dependency=afterok:$job" --kill-on-invalid-dep=yes)
  previous=$job
done
