#!/usr/bin/env bash
# Trains a cascade on a folder of captioned images; echoes every command.
#   launch/folder.sh IMAGES RUN_FOLDER [--config.field=value ...] [--allow_changes=FIELD,...]
# The overrides go to every step. For a public T5, add --config.text.path=T5_FOLDER.
# The same command again goes on with the run. Where images or captions changed since, it says what
# changed and stops; --allow_changes=data.fingerprint goes on with the changed data.
set -euo pipefail
source "${BASH_SOURCE[0]%/*}/steps.sh"
print_help "$@"
[ $# -ge 2 ] || { echo "usage: $0 IMAGES RUN_FOLDER [--config.field=value ...]" >&2; exit 2; }
images=$1 run=$2
shift 2
text=$run/text previous='' overrides=() changes=()
for word in "$@"; do
  case $word in
    --config.text.path=*) text=${word#*=} ;;
    --allow[_-]changes=*) changes=("$word"); continue ;;
  esac
  [ "$previous" != --config.text.path ] || text=$word
  previous=$word
  overrides+=("$word")
done
where=(--config.data.path="$images" --config.data.embeddings="$run/embeddings"
       --config.text.path="$text" ${overrides[@]+"${overrides[@]}"})

step "Index the images; list what cannot be used." \
  prepare --config=configs/folder.py:base "${where[@]}"
if [ "$text" = "$run/text" ] && [ -e "$text/pretrain.json" ]; then
  # Another encoder would change every embedding, and a trained stage could not go on with them.
  printf '\nThe text encoder in %s is kept; remove it to train another.\n' "$text"
elif [ "$text" = "$run/text" ]; then
  step "Train a vocabulary and a small T5 text encoder on the captions." \
    pretrain_text --config=configs/folder.py:base "${where[@]}" --out="$text"
fi
step "Compute the embedding of every caption, once." \
  embed --config=configs/folder.py:base "${where[@]}"
step "Train the base stage." \
  train --config=configs/folder.py:base "${where[@]}" ${changes[@]+"${changes[@]}"} --workdir="$run/base"
step "Train the super-resolution stage." \
  train --config=configs/folder.py:sr "${where[@]}" ${changes[@]+"${changes[@]}"} --workdir="$run/sr"
step "Export the base stage." export --workdir="$run/base" --out="$run/stages/base"
step "Export the super-resolution stage." export --workdir="$run/sr" --out="$run/stages/sr"
echo
echo "Generate images with it:"
echo "  $python -m imagen_jax sample --stages=$run/stages/base,$run/stages/sr --prompt='...' --out=$run/samples"
