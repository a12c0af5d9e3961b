# shellcheck shell=bash
# Shared by the scripts that run verbs one after the other.

# Outside a checkout (`imagen configs --copy-to=DIR`) the interpreter of the PATH.
python=${PYTHON:-.venv/bin/python}
[ -n "${PYTHON-}" ] || [ -x .venv/bin/python ] || [ -e setup.py ] || python=python

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
