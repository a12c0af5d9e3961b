#!/usr/bin/env bash
# Trains a cascade on emoji from nothing, and scores it; echoes every command.
#   launch/emoji.sh [RUN_FOLDER [FLAG ...]]    (35 minutes on two CPU cores)
# The flags go to every step, for example --config.seed=1.
set -euo pipefail
source "${BASH_SOURCE[0]%/*}/steps.sh"
print_help "$@"
run=${1:-runs/emoji}
shift $(($# > 0))
config=configs/emoji.py
export TF_CPP_MIN_LOG_LEVEL=3

where=(--config.data.path="$run/data" --config.data.embeddings="$run/embeddings" "$@")
stages=$run/stages/base,$run/stages/sr

# score PROMPTS LIMIT FIELD [FLAG ...]: samples the prompts of a split and finds the nearest real
# images; FIELD names the right one.
score() {
  step "Generate images for the prompts $1." \
    sample --stages="$stages" --prompts="$run/data/prompts_$1.jsonl" --limit="$2" --cpu_devices=2 \
    --out="$run/samples_$1"
  step "Compare each with every real emoji: is the nearest the right one?" \
    evaluate retrieval --samples="$run/samples_$1" --gallery="$run/data/gallery" --match="$3" \
    --out="$run/retrieval_$1.json" "${@:4}"
}

started=$SECONDS
step "Rasterise OpenMoji, with Unicode's names as captions." \
  prepare --config="$config":base "${where[@]}"
step "Compute the embedding of every caption, once, with the frozen text encoder." \
  embed --config="$config":base "${where[@]}"
train_side_by_side "$config":base "$config":sr "$run" "${where[@]}"
credit=$(sed -n 1,2p "$run/data/gallery/ATTRIBUTION.txt" | paste -sd " ")
score train 300 key --grid="$run/grid_train.png" --credit="$credit"
score combinations_test 0 key --marks=person,tone --grid="$run/grid.png" --credit="$credit"
score names_test 0 untoned --by=kind --grid="$run/grid_names.png" --credit="$credit"
step "Those without and with a word that is in no training caption (False, True)." \
  evaluate retrieval --samples="$run/samples_names_test" --gallery="$run/data/gallery" --match=untoned \
  --by=new_word --out="$run/retrieval_new_words.json"
printf '\nDone in %d s. Look at %s and %s.\n' $((SECONDS - started)) "$run/grid.png" "$run/grid_names.png"
