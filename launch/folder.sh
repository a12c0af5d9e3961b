#!/usr/bin/env bash
# A cascade trained on a folder of captioned pictures; every step is echoed before it runs.
#   launch/folder.sh PICTURES RUN_FOLDER [--config.field=value ...]
# The overrides go to every step. With a public T5 at hand, add --config.text.path=T5_FOLDER.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 PICTURES RUN_FOLDER [--config.field=value ...]" >&2; exit 2; }
pictures=$1 run=$2
shift 2
text=$run/text
for override in "$@"; do case $override in --config.text.path=*) text=${override#*=} ;; esac; done
where=(--config.data.path="$pictures" --config.data.embeddings="$run/embeddings"
       --config.text.path="$text" "$@")

source "${BASH_SOURCE[0]%/*}/steps.sh"

step "Index the pictures; list what cannot be used." \
  prepare --config=configs/folder.py:base "${where[@]}"
if [ "$text" = "$run/text" ]; then
  step "Train a vocabulary and a small T5 text encoder on the captions." \
    pretrain_text --config=configs/folder.py:base "${where[@]}" --out="$text"
fi
step "Compute the embedding of every caption, once." \
  embed --config=configs/folder.py:base "${where[@]}"
step "Train the base stage." \
  train --config=configs/folder.py:base "${where[@]}" --workdir="$run/base"
step "Train the super-resolution stage." \
  train --config=configs/folder.py:sr "${where[@]}" --workdir="$run/sr"
step "Export the base stage." export --workdir="$run/base" --out="$run/stages/base"
step "Export the super-resolution stage." export --workdir="$run/sr" --out="$run/stages/sr"
echo
echo "Draw with it:"
echo "  $python -m imagen_jax sample --stages=$run/stages/base,$run/stages/sr --prompt='...' --out=$run/samples"
