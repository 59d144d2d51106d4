# Sourced by the scripts beside it: the settings, --dry-run and the calls they share.
# shellcheck shell=bash
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=pod.env
source "${POD:-$HERE/pod.env}"

DRY_RUN=no
ARGUMENTS=()
for argument in "$@"; do
  case $argument in
    --dry-run) DRY_RUN=yes ;;
    -h | --help)
      sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    *) ARGUMENTS+=("$argument") ;;
  esac
done

fail() {
  echo "error: $*" >&2
  exit 2
}

need() {
  local name
  for name in "$@"; do
    [[ -n ${!name} ]] || fail "$name is not set: see ${POD:-tpu_scripts/pod.env}"
  done
}

# Runs a command, or prints it so that it can be pasted.
run() {
  if [[ $DRY_RUN == yes ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

tpu() {
  run gcloud compute tpus "$1" "$2" "$TPU_NAME" --project="$PROJECT" --zone="$ZONE" "${@:3}"
}

# One command on all workers, or on those of --worker=.
on_workers() {
  tpu tpu-vm ssh --worker="$1" --command="$2"
}

# READY, PREEMPTED, ...; ABSENT where there is no such machine.
state() {
  gcloud compute tpus tpu-vm describe "$TPU_NAME" --project="$PROJECT" --zone="$ZONE" --format='value(state)' 2>/dev/null ||
    echo ABSENT
}

need PROJECT ZONE TPU_NAME
