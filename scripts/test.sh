#!/usr/bin/env bash
# Run all checks of a change: ruff, mypy, shellcheck, and the tests that need
# neither a GPU nor a cluster.
#   bash scripts/test.sh [--source DIR] [--record-layouts] [pytest arguments ...]
# --source (or SOURCE): a folder of texts and datasets that some tests use.
# --record-layouts: write tests/layouts.json again.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
source_dir=${SOURCE:-}
arguments=()
while (($#)); do
  case $1 in
    --source)
      source_dir=${2:?--source needs a folder}
      shift
      ;;
    --source=*) source_dir=${1#*=} ;;
    -h | --help)
      sed -n '2,6s/^# //p' "$0"
      exit 0
      ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
if [[ -n $source_dir ]]; then
  [[ -d $source_dir ]] || {
    echo "error: --source $source_dir: no such folder" >&2
    exit 2
  }
  arguments+=("--source=$(cd -- "$source_dir" && pwd)") # one word: pytest would take a second one for a test file
fi

bash "$root/scripts/setup.sh" test
cd -- "$root"
export PATH=$root/.venv/bin:$PATH

ruff check .
ruff format --check .
mypy
find . -name '*.sh' -not -path './.venv/*' -not -path './out/*' -print0 | xargs -0 shellcheck .ci/run
# A file per worker and core: the tests of a file share their runs, and a run of two ranks leaves cores idle while it waits
cores=$(nproc)
workers=(-n "$((cores < 8 ? cores : 8))" --dist loadfile --no-loadscope-reorder)
pytest -c pyproject.toml --rootdir=. -q "${workers[@]}" -m "not slow and not gpu and not slurm" --durations 40 "${arguments[@]}"
