# shellcheck shell=bash
# Shared by the scripts that run verbs one after the other.

# Outside a checkout (`imagen configs --copy-to=DIR`) the interpreter of the PATH.
python=${PYTHON:-.venv/bin/python}
[ -n "${PYTHON-}" ] || [ -x .venv/bin/python ] || [ -e setup.py ] || python=python

# print_help ARGUMENTS...: with --help or -h, prints the comment at the top of the script and exits.
print_help() {
  case ${1-} in
    --help | -h)
      sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"
      exit 0
      ;;
  esac
}

# say SENTENCE ARGUMENTS...: prints the sentence and the command.
say() {
  printf '\n\033[1m# %s\033[0m\n$ imagen' "$1"
  shift
  printf ' %s' "$@"
  echo
}

# step SENTENCE ARGUMENTS...: prints both and runs the command.
step() {
  say "$@"
  shift
  "$python" -m imagen_jax "$@"
}

# Flags of one stage's training, before those of both; a script may set them.
base_flags=() sr_flags=()

# train_side_by_side BASE SR RUN_FOLDER FLAG...: trains two configurations, FILE:NAME, one core each,
# and exports both to RUN_FOLDER/stages. The stages are independent, and one core each is faster than
# two cores shared.
train_side_by_side() {
  local run=$3
  local to_base=(train --config="$1" ${base_flags[@]+"${base_flags[@]}"} "${@:4}")
  local to_sr=(train --config="$2" ${sr_flags[@]+"${sr_flags[@]}"} "${@:4}")
  to_base+=(--config.mesh.cpu_devices=1 --workdir="$run/base")
  to_sr+=(--config.mesh.cpu_devices=1 --workdir="$run/sr")
  mkdir -p "$run"
  say "Train the base stage, noise and text -> image (log: $run/base.log), and ..." "${to_base[@]}"
  taskset -c 0 "$python" -m imagen_jax "${to_base[@]}" >"$run/base.log" 2>&1 &
  base_process=$!
  trap 'kill $base_process 2>/dev/null || true' EXIT
  say "... at the same time the super-resolution stage: low-resolution image and text -> image." \
    "${to_sr[@]}"
  taskset -c 1 "$python" -m imagen_jax "${to_sr[@]}"
  step "Export it for sampling; the base stage may still be training." \
    export --workdir="$run/sr" --out="$run/stages/sr"
  wait $base_process || { tail -n 3 "$run/base.log" >&2; exit 1; }
  tail -n 1 "$run/base.log"
  step "Export the base stage." export --workdir="$run/base" --out="$run/stages/base"
}

# train_in_turn BASE SR RUN_FOLDER FLAG...: the same, one after the other on all devices.
train_in_turn() {
  local run=$3
  step "Train the base stage." \
    train --config="$1" ${base_flags[@]+"${base_flags[@]}"} "${@:4}" --workdir="$run/base"
  step "Train the super-resolution stage." \
    train --config="$2" ${sr_flags[@]+"${sr_flags[@]}"} "${@:4}" --workdir="$run/sr"
  step "Export the base stage." export --workdir="$run/base" --out="$run/stages/base"
  step "Export the super-resolution stage." export --workdir="$run/sr" --out="$run/stages/sr"
}
