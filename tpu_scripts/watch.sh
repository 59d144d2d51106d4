#!/usr/bin/env bash
# Follows the log of a worker, the first if none is named: tpu_scripts/watch.sh [WORKER]. --dry-run prints the command.
source "$(dirname "$0")/common.sh"
on_workers "${ARGUMENTS[0]:-0}" 'tail -n 40 -F ~/train.log'
