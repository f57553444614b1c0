#!/usr/bin/env bash
# One process, all GPUs of a node (NPROC), several nodes (NNODES NODE_RANK MASTER_ADDR MASTER_PORT), or scripts/slurm.sh:
#   bash recipes/gpt/megatron/finetune.sh CONFIG OUT [section.key=value ...] [--dry-run]
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd) # recipes/FAMILY/STACK
root=$(cd -- "$here/../../.." && pwd)
stack=${here##*/} family=${here%/*} family=${family##*/}
script=$(basename -- "${BASH_SOURCE[0]}" .sh)

python=$root/.venv/bin/python
[[ -x $python ]] || python=python3
# Modules come from the repository, whatever lies in the folder that this is started from.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
exec "$python" -m common.launch "recipes.$family.$stack.$script" "$@"
