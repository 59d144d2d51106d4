#!/usr/bin/env bash
# Goes on after a preemption: where the machines are gone, creates and sets them up again, then launches the command.
# With --watch stays, looks every POLL_SECONDS (300) and does so whenever it is needed, until the run has its summary.
# tpu_scripts/resume.sh [--watch] --config=... ; --dry-run prints the commands of one round.
source "$(dirname "$0")/common.sh"
need BUCKET RUN
stay=no
command=()
for argument in "${ARGUMENTS[@]}"; do
  if [[ $argument == --watch ]]; then stay=yes; else command+=("$argument"); fi
done
[[ ${#command[@]} -gt 0 ]] || fail 'say what to run: resume.sh --config=...'
dry=()
[[ $DRY_RUN == yes ]] && dry=(--dry-run)

once() {
  local found
  found=$(state)
  echo "$TPU_NAME is $found"
  if [[ $found != READY ]]; then
    # Chained, since `set -e` does not hold in what `||` follows.
    { [[ $found == ABSENT ]] || "$HERE/delete.sh" "${dry[@]}"; } &&
      "$HERE/create.sh" "${dry[@]}" &&
      "$HERE/setup.sh" "${dry[@]}" &&
      "$HERE/launch.sh" "${dry[@]}" "${command[@]}"
  else
    # 3: it is running already.
    "$HERE/launch.sh" "${dry[@]}" "${command[@]}" || [[ $? == 3 ]]
  fi
}

finished() {
  gcloud storage ls "$BUCKET/$RUN/summary.json" >/dev/null 2>&1
}

if [[ $stay == no || $DRY_RUN == yes ]]; then
  once
  exit
fi
until finished; do
  once || echo "will try again"
  sleep "${POLL_SECONDS:-300}"
done
echo "finished: $BUCKET/$RUN/summary.json"
