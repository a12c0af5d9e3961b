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

# train_side_by_side CONFIG RUN_FOLDER ARGUMENTS...: trains CONFIG:base and CONFIG:sr, one core each,
# and exports both to RUN_FOLDER/stages. The stages are independent, and one core each is faster than
# two cores shared.
train_side_by_side() {
  local config=$1 run=$2
  shift 2
  local one_core=(--config.mesh.cpu_devices=1)
  say "Train the base stage, noise and text -> image (log: $run/base.log), and ..." \
    train --config="$config":base "$@" "${one_core[@]}" --workdir="$run/base"
  taskset -c 0 "$python" -m imagen_jax train --config="$config":base "$@" "${one_core[@]}" \
    --workdir="$run/base" >"$run/base.log" 2>&1 &
  base=$!
  trap 'kill $base 2>/dev/null || true' EXIT
  say "... at the same time the super-resolution stage: low-resolution image and text -> image." \
    train --config="$config":sr "$@" "${one_core[@]}" --workdir="$run/sr"
  taskset -c 1 "$python" -m imagen_jax train --config="$config":sr "$@" "${one_core[@]}" \
    --workdir="$run/sr"
  step "Export it for sampling; the base stage may still be training." \
    export --workdir="$run/sr" --out="$run/stages/sr"
  wait $base || { tail -n 3 "$run/base.log" >&2; exit 1; }
  tail -n 1 "$run/base.log"
  step "Export the base stage." export --workdir="$run/base" --out="$run/stages/base"
}
