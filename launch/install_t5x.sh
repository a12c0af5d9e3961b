#!/usr/bin/env bash
# Installs t5x beside imagen_jax, for config.text.encoder=t5x.
#   launch/install_t5x.sh [--python=.venv/bin/python] [--dry_run]
# Reading t5x checkpoints does not need it. t5x and two packages that it imports are not on PyPI, and
# their declared dependencies would install a second TensorFlow. They are installed from their
# repositories at tested commits, without dependencies; the packages that they import follow.
set -euo pipefail
python=.venv/bin/python
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"
parse "python=" "$@"
[ ${#words[@]} -eq 0 ] || refuse "${words[0]} is not an option; see --help"
cd "$(dirname "$0")/.."

github=git+https://github.com
run "$python" -m pip install --no-deps \
  "t5x @ $github/google-research/t5x@cc342d419ec3e3e9c4bf1df33c82330cafdc1e16" \
  "airio @ $github/google/airio@69897df7d9a427b947a9f7bb4164c7782b43e601" \
  "jestimator @ $github/google-research/jestimator@326824a477feef6d92e6f44175000907a72899ca"
run "$python" -m pip install -c constraints.txt \
  cached-property==2.0.1 chex==0.1.92 clu==0.0.12 fiddle==0.3.1 gin-config==0.5.0 grain==0.2.18 \
  tensorboard==2.21.0
run "$python" -c 'import t5x.examples.t5.network'
