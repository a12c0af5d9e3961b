#!/usr/bin/env bash
# From nothing to pictures: every step is one command, echoed before it runs.
#   launch/demo.sh [RUN_FOLDER [CONFIG [FLAG ...]]]    (about ten minutes on two CPU cores)
# CONFIG is configs/shapes.py or one like it; the flags are for every step, as --config.seed=1.
set -euo pipefail
run=${1:-runs/demo} config=${2:-configs/shapes.py}
export TF_CPP_MIN_LOG_LEVEL=3

where=(--config.data.path="$run/data" --config.data.embeddings="$run/embeddings"
       --config.text.path="$run/text" --config.pretrain_text.corpus="$run/data/paraphrases.jsonl"
       "${@:3}")

source "${BASH_SOURCE[0]%/*}/steps.sh"

started=$SECONDS
step "Draw the shapes world: captioned pictures (20,000 of them, or more), as TFDS data sets." \
  prepare --config="$config":base "${where[@]}"
step "Train a vocabulary and a small T5 text encoder on captions and paraphrases, text alone." \
  pretrain_text --config="$config":base "${where[@]}" --out="$run/text"
step "Freeze the encoder and compute the embedding of every caption, once." \
  embed --config="$config":base "${where[@]}"
# The stages do not need each other to learn: one core each, which wastes less than sharing both.
one_core=(--config.mesh.cpu_devices=1)
say "Train the base stage, noise and text -> 16x16 (its lines go to $run/base.log), and ..." \
  train --config="$config":base "${where[@]}" "${one_core[@]}" --workdir="$run/base"
taskset -c 0 "$python" -m imagen_jax train --config="$config":base "${where[@]}" \
  "${one_core[@]}" --workdir="$run/base" >"$run/base.log" 2>&1 &
base=$!
trap 'kill $base 2>/dev/null || true' EXIT
say "... beside it the super-resolution stage: 16x16 and text -> 64x64." \
  train --config="$config":sr "${where[@]}" "${one_core[@]}" --workdir="$run/sr"
taskset -c 1 "$python" -m imagen_jax train --config="$config":sr "${where[@]}" \
  "${one_core[@]}" --workdir="$run/sr"
step "Export it for sampling, while the base stage may still learn." \
  export --workdir="$run/sr" --out="$run/stages/sr"
wait $base || { tail -n 3 "$run/base.log" >&2; exit 1; }
tail -n 1 "$run/base.log"
step "Export the base stage, too." export --workdir="$run/base" --out="$run/stages/base"
step "Draw prompts that no training picture showed." \
  sample --stages="$run/stages/base,$run/stages/sr" --prompts="$run/data/prompts_held_out.jsonl" \
  --limit=360 --cpu_devices=2 --out="$run/samples"
step "Read the pictures: is what was asked for there?" \
  evaluate alignment --samples="$run/samples" --out="$run/alignment.json"
cp "$run/samples/grid.png" "$run/grid.png"
printf '\nDone in %d s. Look at %s and %s.\n' $((SECONDS - started)) "$run/grid.png" "$run/alignment.json"
