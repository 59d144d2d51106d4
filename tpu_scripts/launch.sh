#!/usr/bin/env bash
# Starts the same command on all workers, in the background: tpu_scripts/launch.sh --config=configs/openseg.py:data=coco,...
# The run lives in $BUCKET/$RUN, so that it goes on from its last checkpoint when it is launched again, on these or on
# other machines. --dry-run prints the command.
source "$(dirname "$0")/common.sh"
need BUCKET RUN
[[ ${#ARGUMENTS[@]} -gt 0 ]] || fail 'say what to run: launch.sh --config=configs/openseg.py:data=coco,data_dir=gs://...'

flags=$(printf '%q ' --distributed --workdir="$BUCKET/$RUN" "${ARGUMENTS[@]}")
on_workers all "cd ovseg_jax && if pgrep -f '[o]vseg_jax.main' >/dev/null; then echo 'error: a run is under way' >&2; exit 3; fi
nohup .venv/bin/python -m ovseg_jax.main ${flags}>> ~/train.log 2>&1 < /dev/null & echo started"
