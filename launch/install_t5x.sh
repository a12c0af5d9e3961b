#!/usr/bin/env bash
# Installs t5x beside imagen_jax, for config.text.encoder=t5x. Not needed to read t5x checkpoints.
#
#     bash launch/install_t5x.sh [PYTHON]     (default: .venv/bin/python)
#
# t5x and two packages it imports are not on PyPI, and what they declare would install a second
# TensorFlow: they come from their repositories, at the commits that were tested, without their
# dependencies; what they truly import follows by name.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}

"$python" -m pip install --no-deps \
  "t5x @ git+https://github.com/google-research/t5x@cc342d419ec3e3e9c4bf1df33c82330cafdc1e16" \
  "airio @ git+https://github.com/google/airio@69897df7d9a427b947a9f7bb4164c7782b43e601" \
  "jestimator @ git+https://github.com/google-research/jestimator@326824a477feef6d92e6f44175000907a72899ca"
"$python" -m pip install -c constraints.txt \
  cached-property==2.0.1 chex==0.1.92 clu==0.0.12 fiddle==0.3.1 gin-config==0.5.0 grain==0.2.18 \
  tensorboard==2.21.0
"$python" -c "import t5x.examples.t5.network; print('t5x is ready: --config.text.encoder=t5x')"
