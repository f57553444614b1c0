#!/usr/bin/env bash
# Start a run: on one process, all GPUs of a node (NPROC), several nodes (NNODES, NODE_RANK, MASTER_ADDR), or under SLURM.
#   bash recipes/gpt/baseline/pretrain.sh CONFIG OUT [section.key=value ...] [--dry-run]
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd) # recipes/FAMILY/STACK
root=$(cd -- "$here/../../.." && pwd)
stack=${here##*/} family=${here%/*} family=${family##*/}
script=$(basename -- "${BASH_SOURCE[0]}" .sh)

python=$root/.venv/bin/python
[[ -x $python ]] || python=python3
# Modules are imported from the repository, not from the current folder.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
exec "$python" -m common.launch "recipes.$family.$stack.$script" "$@"
