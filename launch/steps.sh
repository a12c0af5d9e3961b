# shellcheck shell=bash
# What the scripts that run the verbs one after the other share.

python=${PYTHON:-.venv/bin/python}

# say SENTENCE ARGUMENTS...: what comes next, and the command it is.
say() {
  printf '\n\033[1m# %s\033[0m\n$ imagen' "$1"
  shift
  printf ' %s' "$@"
  echo
}

# step SENTENCE ARGUMENTS...: says it and does it.
step() {
  say "$@"
  shift
  "$python" -m imagen_jax "$@"
}
