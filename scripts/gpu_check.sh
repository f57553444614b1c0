#!/usr/bin/env bash
# Check everything that only a GPU can show, in under 10 minutes per family on one H100 or H200, without network:
#   bash scripts/gpu_check.sh OUT [--family F ...] [--only corpus|parity|tests|speed|simulate ...] [--configs C ...]
# Parity of the stacks on the GPU, speed and memory of two large sizes per family beside those that scripts/simulate.py predicts,
# the tests marked gpu. OUT/gpu_check.md has a table, OUT/gpu_check.json all figures. Exit 0: all passed; 1: a part failed or was left out; 2: no GPU, or bad input.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[[ -x $python ]] || python=python3
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
exec "$python" -m scripts.gpu_check "$@"
