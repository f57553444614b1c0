#!/usr/bin/env bash
# Create or update .venv: `bash scripts/setup.sh [test|dev|fast|wandb]`. Returns
# at once if nothing has changed. Uses $PYTHON, or else the first Python 3.12 or
# newer that it finds.
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

find_python() {
  local candidate
  if [[ -n ${PYTHON:-} ]]; then
    new_enough "$PYTHON" && echo "$PYTHON"
    return
  fi
  # Tested versions first. The commands that pyenv puts into PATH fail for versions that are not active; those in its folder work.
  for candidate in python3.12 python3.13 python3 python3.14 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python3; do
    if command -v "$candidate" >/dev/null && new_enough "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

requirements() { # PYTHON PYPROJECT EXTRA: one requirement per line
  "$1" - "$2" "$3" <<'PYTHON'
import re, sys, tomllib

project = tomllib.load(open(sys.argv[1], "rb"))["project"]
wanted = list(project["dependencies"])
todo = [sys.argv[2]] if sys.argv[2] else []
while todo:
    for line in project["optional-dependencies"][todo.pop()]:
        own = re.fullmatch(project["name"] + r"\[(\w+)\]", line)
        todo.append(own[1]) if own else wanted.append(line)
print("\n".join(wanted))
PYTHON
}

extra=${1:-}
case $extra in
  -h | --help)
    sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac
case $extra in "" | test | dev | fast | wandb) ;; *) fail "unknown extra $extra; the extras are test, dev, fast and wandb" ;; esac
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
python=$venv/bin/python

wanted=$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)
stamp=$venv/.installed-${extra:-plain}
if [[ -x $python && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
  echo "setup: already installed"
  exit 0
fi

quiet=(--quiet)
if [[ ! -e $venv ]]; then
  quiet=() # minutes of downloads: show them
  base_python=$(find_python) ||
    fail "no Python 3.12 or newer found; install one, or give its path: PYTHON=/path/to/python3.12 bash scripts/setup.sh"
  echo "setup: creating .venv with $base_python"
  "$base_python" -m venv "$venv" ||
    fail "$base_python cannot create a virtual environment (Debian, Ubuntu: apt install python3-venv); remove .venv and try again"
fi
new_enough "$python" || fail ".venv has no working Python 3.12 or newer; move it away and run this again"

echo "setup: installing into .venv"
mapfile -t packages < <(requirements "$python" "$root/pyproject.toml" "$extra")
"$python" -m pip install "${quiet[@]}" --disable-pip-version-check -c "$root/constraints.txt" "${packages[@]}" ||
  fail "pip could not install the packages (see above); correct that and run this again"
echo "$wanted" >"$stamp"
if [[ -n $extra ]]; then echo "$wanted" >"$venv/.installed-plain"; fi
echo "setup: .venv is ready"
