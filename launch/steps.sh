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
