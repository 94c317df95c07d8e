#!/usr/bin/env bash
# Submits the stages of a model, each to start when the one before has ended well:
#   bash examples/slurm/submit.sh gemma [aln pt it] [-- FLAGS OF SBATCH]
# Stages: import aln pt it export eval; without names the three stages of training.
# If a stage fails, those after it are taken out of the queue. DATTN_DRY_RUN=1 submits dry runs.
set -euo pipefail

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

folder=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
model=${1:-}
[[ $model == mistral || $model == gemma ]] ||
  fail "model '$model' is unknown; bash $0 mistral|gemma [stage ...] [-- flags of sbatch]"
shift
stages=()
while (($#)) && [[ $1 != -- ]]; do
  [[ -f $folder/${model}_$1.sbatch ]] ||
    fail "stage '$1' is unknown; use import, aln, pt, it, export or eval"
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
