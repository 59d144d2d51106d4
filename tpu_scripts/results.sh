#!/usr/bin/env bash
# Copies the run from the bucket, without its checkpoints unless --all: tpu_scripts/results.sh [FOLDER] [--all]
# --dry-run prints the command.
source "$(dirname "$0")/common.sh"
need BUCKET RUN
folder=runs/$RUN
options=(--recursive --exclude='^checkpoints/')
for argument in "${ARGUMENTS[@]}"; do
  if [[ $argument == --all ]]; then options=(--recursive); else folder=$argument; fi
done
run mkdir -p "$folder"
run gcloud storage rsync "$BUCKET/$RUN" "$folder" "${options[@]}"
