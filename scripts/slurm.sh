#!/usr/bin/env bash
# Run a launch script on SLURM, with one task per node; save and requeue before
# the time limit:
#   sbatch scripts/slurm.sh recipes/gpt/megatron/pretrain.sh CONFIG OUT [a.b=c]
# Edit these, or give them to sbatch: sbatch --nodes=4 scripts/slurm.sh ...
#SBATCH --job-name=twinstack
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
##SBATCH --gpus-per-node=8
##SBATCH --cpus-per-task=64
##SBATCH --exclusive
# The signal comes that many seconds before the limit: it must cover a step and a save.
set -uo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  grep '^##\?SBATCH' "${BASH_SOURCE[0]}"
  exit 0
fi
if [[ $# -eq 0 || -z ${SLURM_JOB_ID:-} ]]; then
  echo "error: type: sbatch [--nodes=N] scripts/slurm.sh recipes/FAMILY/STACK/pretrain.sh CONFIG OUT [section.key=value ...]" >&2
  exit 2
fi

signalled=
# shellcheck disable=SC2329 # called by the trap
on_signal() {
  signalled=yes
  echo "slurm: job $SLURM_JOB_ID received the signal to stop; saving"
  scancel --signal=TERM "$SLURM_JOB_ID" # its steps, not this script
}
trap on_signal TERM

# A node that has stopped and saved (143) ends with 0: srun would kill the others, which may still be saving.
# shellcheck disable=SC2016 # expanded in the task
srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
  bash -c 'trap : TERM; bash "$@"; code=$?; exit $((code == 143 ? 0 : code))' launch "$@" &
wait $!
code=$?
while [[ $(jobs -rp) ]]; do # the signal ended the first wait
  wait %1
  code=$?
done

if [[ $signalled ]] && ((SECONDS < 60)); then # requeueing would go round in circles
  echo "error: the signal came in the first minute: give the job more --time, or --signal=B:TERM@SECONDS nearer to its end" >&2
  exit 1
fi
# Only a job that still runs goes back in the queue, where the same command continues it; not one that was cancelled.
if [[ $signalled && $code -eq 0 && $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
  echo "slurm: saved; requeueing job $SLURM_JOB_ID"
  trap - TERM
  scontrol requeue "$SLURM_JOB_ID" && sleep 60 # SLURM ends this script
fi
exit "$code"
