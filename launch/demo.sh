#!/usr/bin/env bash
# Trains the demo cascade from scratch and samples held-out prompts; echoes every command.
#   launch/demo.sh [RUN_FOLDER [CONFIG [FLAG ...]]]    (about ten minutes on two CPU cores)
# CONFIG is configs/shapes.py or a file with the same names; the flags go to every step, for example
# --config.seed=1.
set -euo pipefail
source "${BASH_SOURCE[0]%/*}/steps.sh"
print_help "$@"
run=${1:-runs/demo} config=${2:-configs/shapes.py}
export TF_CPP_MIN_LOG_LEVEL=3

where=(--config.data.path="$run/data" --config.data.embeddings="$run/embeddings"
       --config.text.path="$run/text" --config.pretrain_text.corpus="$run/data/paraphrases.jsonl"
       "${@:3}")

started=$SECONDS
step "Render the shapes world: 20,000 or more captioned images, as TFDS data sets." \
  prepare --config="$config":base "${where[@]}"
step "Train a vocabulary and a small T5 text encoder on captions and paraphrases." \
  pretrain_text --config="$config":base "${where[@]}" --out="$run/text"
step "Compute the embedding of every caption, once, with the frozen encoder." \
  embed --config="$config":base "${where[@]}"
train_side_by_side "$config":base "$config":sr "$run" "${where[@]}"
step "Generate images for prompts that are held out of training." \
  sample --stages="$run/stages/base,$run/stages/sr" --prompts="$run/data/prompts_held_out.jsonl" \
  --limit=360 --cpu_devices=2 --out="$run/samples"
step "Score the images: which attributes of the prompt are right?" \
  evaluate alignment --samples="$run/samples" --out="$run/alignment.json"
cp "$run/samples/grid.png" "$run/grid.png"
printf '\nDone in %d s. Look at %s and %s.\n' $((SECONDS - started)) "$run/grid.png" "$run/alignment.json"
