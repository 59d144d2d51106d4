#!/usr/bin/env bash
# Tells the run on all workers to save and end, as a preemption does. --dry-run prints the command.
source "$(dirname "$0")/common.sh"
on_workers all "pkill -TERM -f '[o]vseg_jax.main' || echo 'no run is under way'"
