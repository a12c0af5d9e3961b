#!/usr/bin/env bash
# Distils a trained cascade to fewer steps; echoes every command.
#   launch/distill.sh CONFIG STAGES OUT [FLAG ...]
# CONFIG is the file whose `base` and `sr` trained the stage folders STAGES/base and STAGES/sr. Every
# student is exported to OUT/NAME_STEPS, and is the teacher of the next. The flags go to every training.
# Variables: BASE_STEPS ("guidance 16 8 4"), SR_STEPS ("8 4 2"), TRAIN_STEPS (2000, of each student),
# SR_TRAIN_STEPS (the same, of each super-resolution student).
# The same command again goes on.
set -euo pipefail
source "${BASH_SOURCE[0]%/*}/steps.sh"
print_help "$@"
[ $# -ge 3 ] || { echo "usage: $0 CONFIG STAGES OUT [FLAG ...]" >&2; exit 2; }
config=$1 stages=$2 out=$3
shift 3
train_steps=${TRAIN_STEPS:-2000}
flags=(--config.optimizer.learning_rate=0.0003 --config.checkpoint.every=500 "$@")

# distil NAME STEPS...: one student after the other; STEPS is guidance, or a number.
distil() {
  local name=$1 teacher=$stages/$1 steps what
  shift
  for steps in "$@"; do
    what=(--config.distill.teacher="$teacher")
    [ "$steps" = guidance ] || what+=(--config.distill.steps="$steps")
    teacher=$out/${name}_$steps
    [ -e "$teacher/config.json" ] && continue
    step "Train $name to sample as its teacher does: $steps$([ "$steps" = guidance ] || echo " steps")." \
      train --config="$config:$name" "${what[@]}" --config.train.steps="$train_steps" "${flags[@]}" \
      --workdir="$out/runs/${name}_$steps"
    step "Export it." export --workdir="$out/runs/${name}_$steps" --out="$teacher"
  done
  last=$teacher
}

read -ra base_steps <<<"${BASE_STEPS:-guidance 16 8 4}"
read -ra sr_steps <<<"${SR_STEPS:-8 4 2}"
distil base "${base_steps[@]}"
base=$last
train_steps=${SR_TRAIN_STEPS:-$train_steps}
distil sr "${sr_steps[@]}"
printf '\nGenerate with\n  %s -m imagen_jax sample --stages=%s,%s --prompt=... --out=%s\n' \
  "$python" "$base" "$last" "$out/samples"
