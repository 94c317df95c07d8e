# shellcheck shell=bash
# What all sbatch files share: settings of the site, and the command of each stage. A file for one
# stage of one model holds what sbatch reads (#SBATCH), sources this one and calls
#   run_import MODEL ARGUMENT...     weights in LLM and VISION to the checkpoint OUTPUT
#   run_training NAME ARGUMENT...    configs/NAME.yaml, in runs/NAME
#   run_export MODEL ARGUMENT...     runs/MODEL_it to exports/MODEL
#   run_eval MODEL ARGUMENT...       exports/MODEL on data/val
# Flags of sbatch win over #SBATCH lines; the arguments go to the command. Page: docs/slurm.md
set -euo pipefail

# Settings of the site; DATTN_... of the environment wins over them.
VENV=${DATTN_VENV:-.venv} # used where no container is named
CONTAINER=${DATTN_CONTAINER:-} # image for enroot/pyxis (.sqsh, docker://) or apptainer (.sif)
CONTAINER_RUNTIME=${DATTN_CONTAINER_RUNTIME:-pyxis} # pyxis | apptainer
CONTAINER_MOUNTS=${DATTN_CONTAINER_MOUNTS:-} # host:container,...; REPO is mounted by itself
ENV_FILE=${DATTN_ENV_FILE:-} # sourced first: modules, network variables of the site
MAX_RESTARTS=${DATTN_MAX_RESTARTS:-100} # a job stopped more often does not requeue itself

# shellcheck source=launch.sh
source "$REPO/examples/slurm/launch.sh"

run_import() {
  local model=$1
  shift
  RUN_DIR=runs/${model}_import # for logs
  launch -m tools.checkpoint_convert hf-to-mcore --llm "$LLM" --vision "$VISION" \
    --config "configs/${model}_aln.yaml" "$@" "$OUTPUT"
}

run_training() {
  CONFIG=configs/$1.yaml
  RUN_DIR=runs/$1
  shift
  launch_training "$@"
}

run_export() {
  local model=$1
  shift
  RUN_DIR=runs/${model}_export # for logs
  launch -m tools.checkpoint_convert mcore-to-hf "$@" "runs/${model}_it" "exports/$model"
}

run_eval() {
  local model=$1
  shift
  RUN_DIR=runs/${model}_eval # answers, scores and logs
  launch -m dattn_mcore.evaluation run --model "exports/$model" --data data/val --out "$RUN_DIR" "$@"
}
