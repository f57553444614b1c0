#!/usr/bin/env bash
# From a fresh clone to one loss curve on three stacks: plain accelerate, DeepSpeed and Megatron Core. No GPU is needed.
#   bash scripts/quickstart.sh [FAMILY] [--source PATH ...] [--steps N] [--out DIR]
# FAMILY    a folder of recipes/ that has configs/quickstart.yaml (default: gpt)
# --source  text files or folders to train on, instead of Python's own library and reference texts
# --steps   optimizer steps (default: the config's)
# --out     where the runs go (default: out/quickstart/FAMILY); the same command again continues them
# NPROC     processes (default: one a GPU, else 2)
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
here=$PWD

fail() {
  printf 'error: %s\n' "$@" >&2
  exit 2
}

# ---- what is asked for

family='' out='' steps='' sources=()
while (($#)); do
  case $1 in
    -h | --help)
      sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
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
  known=(recipes/*/configs/quickstart.yaml)
  known=("${known[@]#recipes/}")
  fail "no $config; FAMILY can be: ${known[*]%%/*}"
fi
out=${out:-out/quickstart/$family}

# ---- how each stage is run

total=7 stage=0 child='' stopped=''
say() { # WHAT THE STAGE DOES
  stage=$((stage + 1))
  printf '\n[%d/%d %3ds] %s\n' "$stage" "$total" "$SECONDS" "$*"
}

trap 'stopped=143; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM
trap 'stopped=130; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' INT

thinned() { # LOG: all lines go to the file; to the screen all but nine of ten steps
  trap '' INT TERM # what saves after a signal still writes here
  local line
  while IFS= read -r line; do
    printf '%s\n' "$line" >>"$1"
    if [[ $line =~ ^step\ +([0-9]+)/ ]] && ((BASH_REMATCH[1] > 1 && BASH_REMATCH[1] % 10)); then continue; fi
    printf '%s\n' "$line"
  done
}

run() { # LOG COMMAND...: a signal to this script is passed on to the command, which saves what it has
  local log=$1 sink code=0
  shift
  printf '$ %s\n' "$*"
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
batch=$("$python" -c 'import sys; from common.config import read_yaml; print(read_yaml(sys.argv[1])["train"]["global_batch"])' "$config")
if [[ -z ${NPROC:-} ]]; then
  NPROC=$((gpus ? gpus : 2))
  while ((batch % NPROC || NPROC > 1 && NPROC % 2)); do NPROC=$((NPROC - 1)); done # the batch is shared out evenly
fi
[[ $NPROC =~ ^[1-9][0-9]*$ ]] || fail "NPROC=$NPROC: must be a whole number from 1"
layout() { # STACK: what of the config's layout, which is for 2 processes, is to be changed
  if ((NPROC == 2)); then return; fi
  local tp=$((NPROC % 2 ? 1 : 2))
  case $1 in
    megatron) echo "megatron.tp=$tp megatron.sequence_parallel=$( ((tp > 1)) && echo true || echo false)" \
      "megatron.micro_batch=$((batch * tp > NPROC ? batch * tp / NPROC : 1))" ;;
    *) echo "$1.micro_batch=$((batch > NPROC ? batch / NPROC : 1))" ;;
  esac
}

# ---- 2

how=()
case $family in # MODULE of data/ and how it is told, FOLDER under corpora/, and what the exports continue or fill in
  gpt) module=python_docs corpus=corpora/python prompt='def __init__(self' ;;
  bert)
    module=python_docs corpus=corpora/python_sentences how=(--sentences --tokenizer-type wordpiece)
    prompt='def __init__ ( [MASK], value ) : [MASK]. value = value'
    ;;
  t5)
    module=python_docs corpus=corpora/python_sentencepiece how=(--tokenizer-type sentencepiece)
    prompt='def __init__(<extra_id_0>, value): <extra_id_1>.value = value'
    ;;
  *) fail "$family: its corpus is not known to this script (scripts/quickstart.sh, stage 2)" ;;
esac
text="Python's own library and reference texts" from=() changed=()
if ((${#sources[@]})); then
  id=$(printf '%s\n' "${sources[@]}" | cksum)
  [[ $family == gpt ]] || id=${id%% *}_$family
  corpus=corpora/$(basename -- "${sources[0]}" | tr -c '[:alnum:]\n' _)_${id%% *}
  text="${#sources[@]} of your own" from=(--source "${sources[@]}") prompt=''
  changed=("data.train=$corpus/train" "data.valid=$corpus/valid")
fi
if [[ $steps ]]; then changed+=("train.steps=$steps"); fi
mkdir -p -- "$out" || fail "$out: cannot be made; choose another folder by --out DIR"

say "corpus: $text, tokenized into $corpus"
run "$out/corpus.log" "$python" -m "data.$module" "$corpus" "${how[@]}" "${from[@]}" ||
  fail "the corpus could not be made (above); to make it anew, remove $corpus"

# ---- 3, 4, 5

finished() { # STACK: is the last step exported?
  local last
  last=$("$python" -c 'import sys; from common.config import read_yaml; print(read_yaml(sys.argv[1])["train"]["steps"])' "$config")
  grep -qs "\"step\": ${steps:-$last}," "$out/$1/hf/twinstack.json"
}

pretrain() { # STACK: validated first, in a second, then trained
  local command code=0 told
  read -ra command <<<"$(layout "$1")"
  command=(env "NPROC=$NPROC" bash "recipes/$family/$1/pretrain.sh" "$config" "$out/$1" "${changed[@]}" "${command[@]}")
  told=$("${command[@]}" --dry-run 2>&1 >/dev/null) ||
    fail "${told#error: }" "$1 was not started; another folder for the runs is chosen by --out DIR"
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

on="$NPROC process$( ((NPROC > 1)) && echo es || true), $( ((gpus)) && echo "one a GPU" || echo "on the CPU")"
say "baseline: plain data parallelism with accelerate, $on"
pretrain baseline
say "deepspeed: the same weights and samples with DeepSpeed ZeRO-1, $on"
pretrain deepspeed
say "megatron: the same with Megatron Core, tensor and sequence parallel on an even number of processes, $on"
pretrain megatron

# ---- 6, 7

runs=("$out/baseline" "$out/deepspeed" "$out/megatron")
say "sample: each export goes on from '$prompt' (or fills it in) with plain transformers, same seed"
run "$out/samples.txt" "$python" -m scripts.generate "${runs[@]/%//hf}" --prompt "$prompt" --tokens 60
say "compare: each export evaluated on the held-out text with plain transformers in one process; table and picture"
"$python" -m scripts.compare "${runs[@]}" --out "$out"
printf '\n%s\n' "done in $((SECONDS / 60)) min $((SECONDS % 60)) s. Next: README.md, or $out/curves.png"
