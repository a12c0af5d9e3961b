#!/usr/bin/env bash
# Who is where: the demo's two stages trained longer, on more pictures of two objects.
#   launch/demo_roles.sh [RUN_FOLDER] [SEED]        (after launch/demo.sh with the same folder)
set -euo pipefail
run=${1:-runs/demo}
seed=${2:-0}
export TF_CPP_MIN_LOG_LEVEL=3
if [ ! -f "$run/text/spiece.model" ]; then
  echo "$run has no text encoder; run launch/demo.sh $run first" >&2
  exit 1
fi

out=$run/roles_$seed
where=(--config.data.path="$run/data" --config.data.name=shapes_roles
       --config.data.embeddings="$run/embeddings_roles" --config.text.path="$run/text")
# Both cores for one stage after the other, each with half of every batch.
base=(--config=configs/shapes.py:base "${where[@]}" --config.seed="$seed"
      --config.data.batch_size=32 --config.train.steps=11_000 --config.optimizer.learning_rate=3e-3)
sr=(--config=configs/shapes.py:sr "${where[@]}" --config.seed="$seed" --config.train.steps=4_000)

source "${BASH_SOURCE[0]%/*}/steps.sh"

step "Draw 20,000 pictures of which a third show two objects." \
  prepare --config=configs/shapes.py:base "${where[@]}"
step "Compute the embeddings of their captions, by the demo's text encoder." \
  embed --config=configs/shapes.py:base "${where[@]}"
started=$SECONDS
step "Train the base stage, for four times as many pictures as the demo's." \
  train "${base[@]}" --workdir="$out/base"
step "Train the super-resolution stage." train "${sr[@]}" --workdir="$out/sr"
trained=$((SECONDS - started))
step "Export both stages for sampling." export --workdir="$out/base" --out="$out/stages/base"
step "(the second)" export --workdir="$out/sr" --out="$out/stages/sr"
step "Draw prompts that no training picture showed." \
  sample --stages="$out/stages/base,$out/stages/sr" --prompts="$run/data/prompts_held_out.jsonl" \
  --limit=360 --cpu_devices=2 --out="$out/samples"
step "Read the pictures: is what was asked for there?" \
  evaluate alignment --samples="$out/samples" --out="$out/alignment.json"
printf '\nTrained for %d s, after the demo'"'"'s text encoder. Look at %s and %s.\n' \
  "$trained" "$out/samples/grid.png" "$out/alignment.json"
