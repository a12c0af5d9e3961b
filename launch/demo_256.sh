#!/usr/bin/env bash
# Adds a third stage to launch/demo.sh, trained on crops: images of 256x256.
#   launch/demo_256.sh [RUN_FOLDER]        (after launch/demo.sh with the same folder)
set -euo pipefail
source "${BASH_SOURCE[0]%/*}/steps.sh"
print_help "$@"
run=${1:-runs/demo}
export TF_CPP_MIN_LOG_LEVEL=3
if [ ! -f "$run/samples/samples.jsonl" ]; then
  echo "$run has no samples; run launch/demo.sh $run first" >&2
  exit 1
fi

where=(--config.data.path="$run/data" --config.data.embeddings="$run/embeddings"
       --config.text.path="$run/text")
stages=$run/stages/base,$run/stages/sr,$run/stages/sr2

started=$SECONDS
step "Render a quarter of the shapes world at 256x256. Its captions have embeddings." \
  prepare --config=configs/shapes.py:sr2 "${where[@]}"
step "Train the third stage on crops: 16x16 of the low-resolution image and text -> 64x64." \
  train --config=configs/shapes.py:sr2 "${where[@]}" --workdir="$run/sr2"
step "Export it with a wide EMA; it samples whole images, 64x64 -> 256x256." \
  ema --workdir="$run/sr2" --sigma_rel=0.2 --out="$run/stages/sr2"
step "Generate the same prompts with all three stages." \
  sample --stages="$stages" --prompts="$run/data/prompts_held_out.jsonl" \
  --limit=360 --cpu_devices=2 --out="$run/samples_256"
step "Score the 256x256 images: which attributes of the prompt are right?" \
  evaluate alignment --samples="$run/samples_256" --out="$run/alignment_256.json"
step "Measure the sharpness of edges, and seams at the borders of crops." \
  evaluate edges --samples="$run/samples_256" --lowres="$run/samples" --out="$run/edges.json"
cp "$run/samples_256/grid.png" "$run/grid_256.png"
printf '\nDone in %d s. Look at %s, %s and %s.\n' $((SECONDS - started)) \
  "$run/grid_256.png" "$run/alignment_256.json" "$run/edges.json"
