#!/usr/bin/env bash
# Deletes the machines of pod.env (and their place in the queue); the bucket stays. --dry-run prints the command.
source "$(dirname "$0")/common.sh"
if [[ $QUEUED == yes ]]; then
  tpu queued-resources delete --force --quiet
else
  tpu tpu-vm delete --quiet
fi
