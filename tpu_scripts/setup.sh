#!/usr/bin/env bash
# Puts this checkout on all workers (what git tracks) and installs it there. --dry-run prints the commands.
source "$(dirname "$0")/common.sh"

archive=$(mktemp -t ovseg_jax.XXXXXX.tar.gz)
trap 'rm -f "$archive"' EXIT
git -C "$HERE/.." ls-files -z | tar -C "$HERE/.." --null -T - -czf "$archive"
run gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:ovseg_jax.tar.gz" --project="$PROJECT" --zone="$ZONE" --worker=all
# The machines' own Python is older than 3.11.
on_workers all 'set -e
mkdir -p ovseg_jax && tar -xzf ovseg_jax.tar.gz -C ovseg_jax && cd ovseg_jax
command -v ~/.local/bin/uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
~/.local/bin/uv venv --quiet --allow-existing --python 3.12 .venv
~/.local/bin/uv pip install --quiet --python .venv -e ".[tpu,pretrained]"
.venv/bin/python -c "import ovseg_jax; print(\"installed\", ovseg_jax.__version__)"'
