# shellcheck shell=bash
# Shared by the launch scripts: options, one-line errors, --dry_run, the train command, background
# commands. A script sets one variable for each of its options (the default, or ''), sources this
# file and calls `parse`. Needs bash 4.4.

program=${0##*/}
dry_run=''
overrides=() # --config.a.b=value, passed to `imagen train`
words=()     # arguments that are not options

# One line on stderr and exit status 2: wrong usage, as in every imagen command.
refuse() {
  printf '%s: %s\n' "$program" "$1" >&2
  exit 2
}

# Prints the comment at the top of the script.
usage() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"; }

# parse "NAME= FLAG ..." ARGUMENTS...: sets $NAME for --NAME=VALUE and FLAG=1 for --FLAG.
# --config.a.b=VALUE and --config.a.b VALUE go to `overrides`. With "..." among the names the first
# word starts a command with options of its own; with "*" an unknown option is kept in `words`
# instead of being rejected.
parse() {
  local known=" ${1//$'\n'/ } dry_run help " option
  shift
  while [ $# -gt 0 ]; do
    [[ $1 != *$'\n'* ]] || refuse "${1%%$'\n'*}... has more than one line"
    option=${1%%=*} option=${option#--}
    case $1 in
      --help | -h)
        usage
        exit 0
        ;;
      --config.*=*) overrides+=("$1") ;;
      --config.*)
        [[ $# -gt 1 && $2 != --* ]] || refuse "$1 needs a value: $1=VALUE or $1 VALUE"
        [[ $2 != *$'\n'* ]] || refuse "$1=${2%%$'\n'*}... has more than one line"
        overrides+=("$1=$2")
        shift
        ;;
      --*)
        if [[ ! $option =~ ^[a-z_]+$ || $known != *" $option"[\ =]* ]]; then
          [[ $known == *' * '* ]] || refuse "$1 is not an option; there are$(option_names "$known")"
          words+=("$1")
        elif [[ $known == *" $option= "* ]]; then
          [[ $1 == *=* ]] || refuse "--$option needs a value: --$option=VALUE"
          declare -g "$option=${1#*=}"
        else
          [[ $1 != *=* ]] || refuse "--$option takes no value"
          declare -g "$option=1"
        fi
        ;;
      *)
        words+=("$1")
        if [[ $known == *' ... '* ]]; then
          words+=("${@:2}")
          return
        fi
        ;;
    esac
    shift
  done
}

option_names() {
  local name
  set -f # "*" is a marker here, not the files of the folder
  for name in $1; do [[ $name == [a-z]* ]] && printf ' --%s' "${name%=}"; done
  set +f
}

# need NAME EXAMPLE: the option is required.
need() { [ -n "${!1}" ] || refuse "--$1 is missing; e.g. --$1=$2"; }

# need_number NAME EXAMPLE [LEAST]
need_number() {
  need "$@"
  if [[ ! ${!1} =~ ^(0|[1-9][0-9]{0,8})$ || ${!1} -lt ${3-1} ]]; then
    refuse "--$1=${!1} must be a whole number from ${3-1} on; e.g. --$1=$2"
  fi
}

# Google Cloud and Kubernetes derive host names from it, with suffixes.
need_name() {
  need name "$1"
  local LC_ALL=C # elsewhere a-z may hold capitals
  [[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    refuse "--name=$name must be a letter, then a-z, 0-9 and -, at most 40; e.g. --name=$1"
}

# The interpreter: $PYTHON; .venv's; outside a checkout (`imagen configs --copy-to=DIR`) the PATH's.
default_python() {
  if [ -n "${PYTHON-}" ]; then
    printf '%s' "$PYTHON"
  elif [ -x .venv/bin/python ] || [ -e setup.py ]; then
    printf '.venv/bin/python'
  else
    printf 'python'
  fi
}

# take_step: sets `step` to the word before the options: prepare, embed or train, the default.
take_step() {
  step=${words[0]-train}
  case $step in
    prepare | embed | train) ;;
    *) refuse "$step is not a step; there are prepare, embed and train, the default" ;;
  esac
  [ ${#words[@]} -le 1 ] || refuse "one step at a time, not also ${words[1]}"
}

# step_line PYTHON STEP: sets `line` to the command of a step, which the scripts run.
# shellcheck disable=SC2154 # the scripts set --config and --workdir
step_line() {
  need config configs/shapes.py:base
  line=("$1" -m imagen_jax "$2" "--config=$config")
  if [ "$2" = train ]; then
    need workdir gs://my-bucket/base
    line+=("--workdir=$workdir")
  fi
  line+=("${overrides[@]}")
}

# The command of every launcher's training. train_line PYTHON: sets `train`.
train_line() {
  step_line "$1" train
  # shellcheck disable=SC2034 # the scripts that train read it
  train=("${line[@]}")
}

# The arguments as one line, quoted for a shell.
quote() {
  local word line=() escaped="'\\''"
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//"'"/"$escaped"}'"
    line+=("$word")
  done
  printf '%s' "${line[*]}"
}

# Prints a command and runs it; with --dry_run only prints it.
run() {
  if [ -n "$dry_run" ]; then
    printf '%s\n' "$(quote "$@")"
  else
    printf '$ %s\n' "$(quote "$@")" >&2
    "$@"
  fi
}

# restartable STATUS: 75 (preempted and saved, hung, or another process of the run is lost), or ended
# by a signal: JAX aborts when the coordinator is lost, and the kernel kills what exceeds memory.
restartable() { [ "$1" -eq 75 ] || [ "$1" -gt 128 ]; }

# Passes SIGTERM and SIGINT on to every background command from here on; sets `signalled` on a signal.
forward_signals() {
  # shellcheck disable=SC2034 # read by the scripts
  signalled=''
  trap 'signalled=1; signal_all TERM' TERM
  trap 'signalled=1; signal_all INT' INT
}

signal_all() {
  local pid
  for pid in $(jobs -p); do kill -s "$1" "$pid" 2>/dev/null || true; done
}

# Starts a command in the background, in a process group of its own. In the script's group it would
# ignore SIGINT, as background commands of scripts do, and receive a terminal's Ctrl-C twice.
start() {
  set -m
  "$@" </dev/null &
  set +m
}

# each_end CALL PID...: calls CALL INDEX STATUS for each background command as it ends.
each_end() {
  local call=$1 at result
  shift
  local -a left=("$@")
  while [ ${#left[@]} -gt 0 ]; do
    # Until a command ends or a signal comes; or a second, as `wait` misses what ends before it.
    sleep 1 >/dev/null 2>&1 &
    wait -n 2>/dev/null || true
    for at in "${!left[@]}"; do
      kill -0 "${left[at]}" 2>/dev/null && continue
      wait "${left[at]}" 2>/dev/null && result=0 || result=$?
      unset "left[at]"
      "$call" "$at" "$result"
    done
  done
}
