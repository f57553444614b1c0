#!/usr/bin/env bash
# Train one recipe on all its stacks (plain accelerate, DeepSpeed, Megatron Core)
# and compare their loss curves. Needs no GPU.
# bash scripts/quickstart.sh [FAMILY] [--source PATH ...] [--steps N] [--out DIR]
# FAMILY    a folder of recipes/ with configs/quickstart.yaml, whose section
#           `quickstart` names the corpus (default: gpt)
# --source  text files or folders to train on, instead of the texts that the
#           corpus command of the config reads
# --steps   optimizer steps (default: those of the config)
# --out     folder of the runs (default: out/quickstart/FAMILY); the same command
#           again continues them
# NPROC     environment variable: number of processes (default: one per GPU,
#           else 2)
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
here=$PWD

fail() {
  printf 'error: %s\n' "$@" >&2
  exit 2
}

# ---- arguments

family='' out='' steps='' sources=()
while (($#)); do
  case $1 in
    -h | --help)
      sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    --source)
      while (($# > 1)) && [[ $2 != --* ]]; do
        [[ -e $2 ]] || fail "--source $2: no such file or folder"
        sources+=("$(realpath -- "$2")")
        shift
      done
      ((${#sources[@]})) || fail "--source needs a file or folder of text"
      ;;
    --steps)
      [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || fail "--steps ${2:-}: must be a whole number from 1"
      steps=$2
      shift
      ;;
    --out)
      [[ -n ${2:-} && $2 != --* ]] || fail "--out needs a folder"
      [[ $2 == /* ]] && out=$2 || out=$here/$2
      shift
      ;;
    -*) fail "unknown option $1; there is --source, --steps, --out and --help" ;;
    *)
      [[ -z $family ]] || fail "two families, $family and $1; give one (PATHs go behind --source)"
      family=$1
      ;;
  esac
  shift
done
cd -- "$root"
family=${family:-gpt}
config=recipes/$family/configs/quickstart.yaml
if [[ ! -f $config ]]; then
  if [[ $family != *.yaml && (-e $here/$family || $family == */*) ]]; then
    fail "$family is no family; to train on text of your own: bash scripts/quickstart.sh --source $(printf '%q' "$family")"
  fi
  configs=(recipes/*/configs/quickstart.yaml)
  configs=("${configs[@]#recipes/}")
  fail "no $config; FAMILY can be: ${configs[*]%%/*}"
fi
out=${out:-out/quickstart/$family}

# ---- running a stage

stacks=()
for name in baseline deepspeed megatron; do
  if [[ -f recipes/$family/$name/pretrain.sh ]]; then stacks+=("$name"); fi
done
((${#stacks[@]})) || fail "recipes/$family has no stack: no baseline, deepspeed or megatron folder with a pretrain.sh"

total=$((4 + ${#stacks[@]})) stage=0 child='' stopped=''
say() { # WHAT THE STAGE DOES
  stage=$((stage + 1))
  printf '\n[%d/%d %3ds] %s\n' "$stage" "$total" "$SECONDS" "$*" | fold -s -w 80
}

command_line() { # COMMAND...: in lines of 80 columns that can be copied
  local line='$' word
  for word; do
    word=$(printf '%q' "$word")
    if ((${#line} + ${#word} > 77)); then
      printf '%s \\\n' "$line"
      line='   '
    fi
    line+=" $word"
  done
  printf '%s\n' "$line"
}

trap 'stopped=143; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM
trap 'stopped=130; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' INT

thinned() { # LOG: write all lines to the file, and to the screen only every tenth step
  trap '' INT TERM # a run that saves after a signal still writes here
  local line
  while IFS= read -r line; do
    printf '%s\n' "$line" >>"$1"
    if [[ $line =~ ^step\ +([0-9]+)\ +[0-9]+% ]] && ((BASH_REMATCH[1] > 1 && BASH_REMATCH[1] % 10)); then continue; fi
    printf '%s\n' "$line"
  done
}

run() { # LOG COMMAND...: run a command; a signal to this script is passed on to the command, which saves its state
  local log=$1 sink code=0
  shift
  command_line "$@"
  exec 3> >(thinned "$log")
  sink=$!
  "$@" >&3 2>&1 3>&- &
  child=$!
  exec 3>&-
  while :; do
    code=0
    wait "$child" || code=$?
    kill -0 "$child" 2>/dev/null || break # else a signal ended the wait
  done
  child=''
  wait "$sink" || true
  if [[ $stopped ]]; then
    echo "stopped; the same command continues" >&2
    exit "$stopped"
  fi
  return "$code"
}

# ---- 1

say "install: .venv from pyproject.toml and constraints.txt (the first time: gigabytes, minutes)"
bash scripts/setup.sh
python=.venv/bin/python
export PYTHONPATH=$root PYTHONSAFEPATH=1 HF_HUB_OFFLINE=1

gpus=$("$python" -c 'import os; from common.launch.launcher import visible_gpus; print(visible_gpus(os.environ))')
settings=$("$python" - "$config" "$family" <<'PYTHON'
import sys
from common import config
from common.errors import BadInput, exit_cleanly
from common.preflight import task_module

def main():
    path, family = sys.argv[1:]
    cfg = config.load(path, [], task_module(family, {}).Config)
    if cfg.quickstart is None:
        raise BadInput(f"{path}: has no quickstart section; give quickstart.corpus, the command that makes its corpus")
    print(cfg.train.global_batch, cfg.last_step, cfg.quickstart.prompt, *cfg.quickstart.corpus_words, sep="\n")

exit_cleanly(main)
PYTHON
) || exit
mapfile -t settings <<<"$settings"
batch=${settings[0]} last_step=${settings[1]} prompt=${settings[2]} module=${settings[3]} corpus=${settings[4]}
how=("${settings[@]:5}") # the options of the corpus command
if [[ -z ${NPROC:-} ]]; then
  NPROC=$((gpus ? gpus : 2))
  while ((batch % NPROC || NPROC > 1 && NPROC % 2)); do NPROC=$((NPROC - 1)); done # the batch is shared out evenly
fi
[[ $NPROC =~ ^[1-9][0-9]*$ ]] || fail "NPROC=$NPROC: must be a whole number from 1"
layout() { # STACK: overrides of the config's layout, which is for 2 processes
  if ((NPROC == 2)); then return; fi
  local tp=$((NPROC % 2 ? 1 : 2))
  case $1 in
    megatron) echo "megatron.tp=$tp megatron.sequence_parallel=$( ((tp > 1)) && echo true || echo false)" \
      "megatron.micro_batch=$((batch * tp > NPROC ? batch * tp / NPROC : 1))" ;;
    *) echo "$1.micro_batch=$((batch > NPROC ? batch / NPROC : 1))" ;;
  esac
}

# ---- 2

text="by python -m $module" from=() changed=()
if ((${#sources[@]})); then
  id=$(printf '%s\n' "${sources[@]}" "$module" "${how[@]}" | cksum) # another tokenizer makes another corpus
  corpus=corpora/$(basename -- "${sources[0]}" | tr -c '[:alnum:]\n' _)_${id%% *}
  text="${#sources[@]} of your own texts" from=(--source "${sources[@]}") prompt=''
  changed=("data.train=$corpus/train" "data.valid=$corpus/valid")
fi
if [[ $steps ]]; then changed+=("train.steps=$steps"); fi
mkdir -p -- "$out" || fail "$out: cannot be made; choose another folder by --out DIR"

say "corpus: $text, tokenized into $corpus"
run "$out/corpus.log" "$python" -m "$module" "$corpus" "${how[@]}" "${from[@]}" ||
  fail "the corpus could not be made (above); to make it again, remove $corpus"

# ---- a stage for each stack

finished() { # STACK: is the last step exported?
  grep -qs "\"step\": ${steps:-$last_step}," "$out/$1/hf/twinstack.json"
}

pretrain() { # STACK: check the run, which takes a second, then train
  local command code=0 errors
  read -ra command <<<"$(layout "$1")"
  command=(env "NPROC=$NPROC" bash "recipes/$family/$1/pretrain.sh" "$config" "$out/$1" "${changed[@]}" "${command[@]}")
  errors=$("${command[@]}" --dry-run 2>&1 >/dev/null) ||
    fail "${errors#error: }" "$1 was not started; another folder for the runs is chosen by --out DIR"
  if finished "$1"; then
    echo "already there: $out/$1"
    return
  fi
  run "$out/$1.log" "${command[@]}" || code=$?
  if ((code)); then
    echo "error: $1 ended with code $code (above, and whole in $out/$1.log); the same command continues" >&2
    exit "$code"
  fi
}

on="$NPROC process$( ((NPROC > 1)) && echo es || true), $( ((gpus)) && echo "one per GPU" || echo "on the CPU")"
declare -A about=(
  [baseline]="plain data parallelism with accelerate"
  [deepspeed]="DeepSpeed ZeRO"
  [megatron]="Megatron Core, tensor and sequence parallel on an even number of processes"
)
runs=()
for stack in "${stacks[@]}"; do
  say "$stack: ${about[$stack]}, $on"
  pretrain "$stack"
  runs+=("$out/$stack")
done

# ---- the last two

say "sample: each export continues '$prompt' (or fills in what it leaves open) with plain transformers, same seed"
run "$out/samples.txt" "$python" -m scripts.generate "${runs[@]/%//hf}" --prompt "$prompt" --tokens 60
if ((${#runs[@]} > 1)); then
  say "compare: each export evaluated on the held-out text with plain transformers in one process; table and picture"
  "$python" -m scripts.compare "${runs[@]}" --out "$out"
else
  say "compare: there is one stack; its export evaluated on the held-out text with plain transformers, and its curve"
  "$python" -m scripts.heldout "${runs[@]}"
  "$python" -m scripts.plot "${runs[@]}" --out "$out/curves.png"
fi
printf '\n%s\n' "done in $((SECONDS / 60)) min $((SECONDS % 60)) s: $out/curves.png. Next, a run of your own:"
command_line bash "recipes/$family/${stacks[-1]}/pretrain.sh" "recipes/$family/configs/tiny.yaml" out/tiny \
  "data.train=$corpus/train" "data.valid=$corpus/valid"
