#!/usr/bin/env bash
# Creates the TPU VMs of pod.env; with QUEUED=yes asks for them and waits in the queue. --dry-run prints the commands.
source "$(dirname "$0")/common.sh"
need ACCELERATOR RUNTIME

options=(--accelerator-type="$ACCELERATOR")
[[ $SPOT == yes ]] && options+=(--spot)
if [[ $QUEUED == yes ]]; then
  tpu queued-resources create --node-id="$TPU_NAME" --runtime-version="$RUNTIME" "${options[@]}"
  if [[ $DRY_RUN == no ]]; then
    until [[ $(state) == READY ]]; do
      echo "waiting for $TPU_NAME ..."
      sleep "${POLL_SECONDS:-60}"
    done
  fi
else
  tpu tpu-vm create --version="$RUNTIME" "${options[@]}"
fi
