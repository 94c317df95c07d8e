# shellcheck shell=bash
# How a job runs: settings come from the file that sources this one (stages.sh), which calls
#   launch_training ARGUMENT...    pretrain_dattn.py on every rank; done when the trainer says so
#   launch COMMAND...              a Python command on every rank; done when it exits with 0
# A job that was stopped before it was done (time limit, preemption), that failed after it had saved
# a checkpoint, or that found a faulty machine when it started, puts itself back into the queue and
# goes on from there. Before the first step of training the doctor looks at every node; what it finds
# missing ends the job. With --dry-run as an argument, or DATTN_DRY_RUN=1, the command is printed and
# the trainer checks configuration and layout; that needs neither Slurm nor a GPU.
# Page: docs/slurm.md

# What the trainer says of a machine or network that fails at the start: no reason to give up.
FAULTS='^fault: |^hung: .*health\.start_timeout_seconds='

say() { printf '%s  %s\n' "$(date '+%F %T')" "$*"; }

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# The value of a flag in the #SBATCH lines of the file that was started, for a dry run outside of
# a job.
directive() { sed -n "s/^#SBATCH.* --$1=\([^ ]*\).*/\1/p" "$0"; }

prepare() {
  cd "$REPO" || exit
  REPO=$PWD
  if [[ -n $ENV_FILE ]]; then
    # shellcheck source=/dev/null
    source "$ENV_FILE"
  fi
  [[ -z ${DATTN_DRY_RUN:-} ]] || dry_run=1
  if [[ -n ${SLURM_JOB_ID:-} ]]; then
    nodes=$SLURM_JOB_NUM_NODES
    per_node=${SLURM_NTASKS_PER_NODE:-}
    [[ -n $per_node ]] || fail "the job has no --ntasks-per-node; give sbatch one rank per GPU"
  elif ((dry_run)); then
    nodes=$(directive nodes)
    per_node=$(directive ntasks-per-node)
  else
    fail "this is a batch script: sbatch $0, or bash $0 --dry-run"
  fi
  ranks=$((nodes * per_node))
  choose_python
}

# python: the interpreter; container: what srun and the runtime need to start it in a container.
choose_python() {
  local mounts="$REPO:$REPO${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
  python=(python3)
  srun_container=()
  runtime=()
  alone=() # starts one process outside of the step, for a dry run
  if [[ -z $CONTAINER ]]; then
    python=("$VENV/bin/python")
    [[ -x ${python[0]} ]] ||
      fail "VENV=$VENV has no bin/python; make it (make .venv/installed) or set DATTN_VENV"
  elif [[ $CONTAINER_RUNTIME == pyxis ]]; then
    srun_container=("--container-image=$CONTAINER" "--container-mounts=$mounts")
    srun_container+=("--container-workdir=$REPO")
    alone=(srun --nodes=1 --ntasks=1 "${srun_container[@]}")
    ((dry_run == 0)) || [[ -n ${SLURM_JOB_ID:-} ]] ||
      fail "pyxis starts containers in jobs only: sbatch $0 --dry-run, or unset DATTN_CONTAINER"
  elif [[ $CONTAINER_RUNTIME == apptainer ]]; then
    runtime=(apptainer exec --nv --bind "$mounts" --pwd "$REPO" "$CONTAINER")
  else
    fail "CONTAINER_RUNTIME=$CONTAINER_RUNTIME is unknown; use pyxis or apptainer"
  fi
}

launch_training() {
  local argument arguments=()
  dry_run=0
  for argument in "$@"; do
    case $argument in
      --dry-run) dry_run=1 ;;
      log.run_dir=*) RUN_DIR=${argument#*=} ;;
      *) arguments+=("$argument") ;;
    esac
  done
  prepare
  done_file=$RUN_DIR/finished.json # the trainer writes it after its last step
  local command=(pretrain_dattn.py --config "$CONFIG" "log.run_dir=$RUN_DIR")
  command+=("${arguments[@]}")
  if ((dry_run)); then
    print_srun "${command[@]}"
    export RANK=0 WORLD_SIZE=$ranks
    exec "${alone[@]}" "${runtime[@]}" "${python[@]}" "${command[@]}" --dry-run
  fi
  rm -f "$done_file"
  doctor=(-m dattn_mcore.doctor "${command[@]:1}")
  [[ ${DATTN_DOCTOR:-1} != 0 ]] || doctor=()
  run_and_finish "${command[@]}"
}

launch() {
  local argument command=()
  dry_run=0
  for argument in "$@"; do
    if [[ $argument == --dry-run ]]; then dry_run=1; else command+=("$argument"); fi
  done
  prepare
  done_file=
  doctor=() # it knows what training needs
  if ((dry_run)); then
    print_srun "${command[@]}"
    exit 0
  fi
  run_and_finish "${command[@]}"
}

# doctor_command: one task per node, one log per node; all nodes speak, whatever one finds.
compose_doctor() {
  doctor_command=(
    srun "--nodes=$nodes" "--ntasks=$nodes" --ntasks-per-node=1 --kill-on-bad-exit=0
    --mpi=none "--output=$logs/doctor-%N-%n.log" "${srun_container[@]}"
    "${runtime[@]}" "${python[@]}" "${doctor[@]}"
  )
}

# srun_command: one task per rank, one log per rank; a rank that fails ends the others.
compose() {
  srun_command=(
    srun "--nodes=$nodes" "--ntasks=$ranks" "--ntasks-per-node=$per_node" --kill-on-bad-exit=1
    --mpi=none "--output=$logs/rank-%4t.log" "${srun_container[@]}"
    "${runtime[@]}" bash "$REPO/examples/slurm/rank.sh" "${python[@]}" "$@"
  )
}

print_srun() {
  logs=$RUN_DIR/logs/${SLURM_JOB_ID:-JOB}.${SLURM_RESTART_COUNT:-0}
  compose "$@"
  printf '%q ' "${srun_command[@]}"
  printf '\n%s\n' "ranks: $nodes nodes x $per_node = $ranks"
}

# Where rank 0 listens: the first node's address as Slurm knows it, a port of the job's own below
# the range that Linux gives to outgoing connections.
rendezvous() {
  local hosts node
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  node=$(scontrol --oneliner show node "${hosts[0]}")
  [[ $node =~ NodeAddr=([^ ]+) ]] || fail "scontrol knows no address of node ${hosts[0]}"
  export MASTER_ADDR=${MASTER_ADDR:-${BASH_REMATCH[1]}}
  export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 12000))}
}

run_and_finish() {
  local restart=${SLURM_RESTART_COUNT:-0} status
  logs=$RUN_DIR/logs/$SLURM_JOB_ID.$restart
  mkdir -p "$logs"
  rendezvous
  export WORLD_SIZE=$ranks LOCAL_WORLD_SIZE=$per_node OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  # srun does not take over --cpus-per-task of the job by itself.
  [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  compose "$@"
  first_checkpoint=$(newest_checkpoint)
  say "start $restart on $SLURM_JOB_NODELIST: $ranks ranks, rendezvous $MASTER_ADDR:$MASTER_PORT"
  say "logs $logs/rank-*.log"
  stop_signal=
  ((${#doctor[@]} == 0)) || examine
  speakers=$logs/rank
  run_step "${srun_command[@]}"
  finish "$status"
}

# status: how a step of the job ended. Signals to the job reach it, and end no wait.
run_step() {
  local interrupted=1
  "$@" &
  step=$!
  trap 'interrupted=1; forward USR1' USR1
  trap 'interrupted=1; forward TERM' TERM
  while ((interrupted)); do # a trapped signal ends wait before the step ends
    interrupted=0
    status=0
    wait "$step" || status=$?
  done
}

# What the doctor says of the first node, and its verdict on all.
examine() {
  local reports
  speakers=$logs/doctor
  compose_doctor
  run_step "${doctor_command[@]}"
  reports=("$speakers"-*.log)
  [[ ! -e ${reports[0]} ]] || grep -vE '^(error|fault): ' "${reports[0]}" || true
  if ((status)) || [[ -n $stop_signal ]]; then finish "$status"; fi
}

# Finished checkpoints sort by step; folders with other names are not the trainer's.
newest_checkpoint() {
  local folders=("$RUN_DIR"/checkpoints/step_[0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9])
  printf '%s' "${folders[-1]}"
}

# The trainer saves and exits on SIGUSR1. srun passes that on to all ranks; SIGTERM it would turn
# into the end of the step.
forward() {
  stop_signal=$1
  say "SIG$1: asking all ranks to save and stop"
  kill -USR1 "$step" 2>/dev/null || true
}

# Whether any log of the step has a line like that; shows the first ones.
ranks_said() {
  local lines
  lines=$(grep -hE "$1" "$speakers"-*.log | sort -u) || return
  head -n 5 <<<"$lines" >&2
}

# Whether the doctor found a mistake on some nodes only: those are ill, and others may do.
some_nodes_are_ill() {
  local ill=()
  [[ $speakers == */doctor ]] || return
  mapfile -t ill < <(grep -lE '^error: ' "$speakers"-*.log)
  ((${#ill[@]} > 0 && ${#ill[@]} < nodes)) || return
  ill=("${ill[@]##*/doctor-}")
  say "of $nodes nodes ${ill[*]%-*.log} alone"
}

finish() {
  local status=$1 job
  if ((status == 0)) && [[ -z $done_file || -e $done_file ]]; then
    say "finished"
    exit 0
  fi
  job=$(scontrol --oneliner show job "$SLURM_JOB_ID")
  if [[ $job != *" JobState=RUNNING "* ]]; then
    say "stopped; Slurm has cancelled or requeued the job itself"
    exit 1
  fi
  # Preemption may signal the ranks alone and leave this script out.
  [[ $job != *" PreemptTime="[0-9]* ]] || stop_signal=preemption
  if ((status)) && [[ -z $stop_signal ]]; then
    say "failed with status $status; see $logs"
    if ranks_said '^error: '; then
      # A mistake in settings, data or checkpoints: the same again next time.
      some_nodes_are_ill || exit "$status"
      say "such a machine is taken for ill: tried again"
    elif ranks_said "$FAULTS"; then
      say "a machine or the network failed while the run started: tried again"
    elif [[ $(newest_checkpoint) == "$first_checkpoint" ]]; then
      say "no checkpoint since the start, so it is not tried again"
      exit "$status"
    fi
  fi
  if ((${SLURM_RESTART_COUNT:-0} >= MAX_RESTARTS)); then
    fail "stopped before it was done, ${SLURM_RESTART_COUNT} restarts are enough (MAX_RESTARTS)"
  fi
  say "stopped before it was done: back into the queue"
  scontrol requeue "$SLURM_JOB_ID" ||
    fail "job $SLURM_JOB_ID could not be requeued; submit it again to go on"
  exit 0
}
