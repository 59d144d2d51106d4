"""The command that trains: `python -m ovseg_jax.main --config=configs/openseg.py [--workdir=DIR] [--mode=train|eval]`.

This module holds the flags, joins processes and sets up the compilation cache; `experiment.run` trains and evaluates.
"""

import os
import re
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags

from ovseg_jax.cli.console import check_addresses, check_reachable, setup_logging, use_compilation_cache
from ovseg_jax.cli.flags import chosen_config, given_keys, launch
from ovseg_jax.errors import UserError

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder or gs:// bucket of the run; by default runs/<config>."
)
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train, or evaluate the last checkpoint.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", None, "Join other processes; by default if JAX_COORDINATOR_ADDRESS is set."
)


def default_workdir(arguments: list[str]) -> str:
    """Returns `runs/` and the command line's settings, so that the same command resumes the same run.

    `--config=configs/openseg.py:data=coco,data_dir=../coco --config.steps=9` gives
    `runs/openseg-data=coco-data_dir=coco-steps=9`.
    """
    parts: list[str] = []
    for argument in arguments:
        name, _, value = argument.lstrip("-").partition("=")
        if name == "config":
            path, _, settings = value.partition(":")
            parts = [Path(path).stem, *filter(None, settings.split(",")), *parts]
        elif name.startswith("config."):
            parts.append(f"{name.removeprefix('config.')}={value}")
    # Only the last part of a path.
    parts = [re.sub(r"=.*/", "=", part.rstrip("/")) for part in parts]
    return "runs/" + re.sub(r"[^A-Za-z0-9_.=-]+", "_", "-".join(parts))


def run(argv: list[str]) -> int:
    """Trains or evaluates as the flags say and returns the exit status."""
    if len(argv) > 1:
        raise UserError(f"unexpected arguments {argv[1:]}; settings are written --config.key=value.")
    config = chosen_config()
    workdir = _WORKDIR.value or default_workdir(sys.argv[1:])
    check_addresses({"--workdir": workdir})
    check_reachable({"--workdir": workdir, "config": config.to_dict()})
    use_all_cores(config.batch_size)
    asked = _DISTRIBUTED.value
    if asked if asked is not None else "JAX_COORDINATOR_ADDRESS" in os.environ:
        join_processes()
    use_compilation_cache()
    if jax.process_index() == 0:
        platform, count = jax.devices()[0].platform, jax.device_count()
        print(f"{_MODE.value} in {workdir} on {count} {platform} device{'s' * (count > 1)}", flush=True)

    from ovseg_jax.experiment.keys import check_config, check_evaluation
    from ovseg_jax.experiment.run import evaluate, train

    check_config(config, given_keys())
    if _MODE.value == "eval":
        check_evaluation(given_keys())
        evaluate(config, workdir)
    else:
        train(config, workdir, finish=_draw)
    return 0


def _draw(workdir: Any, run: Any, outdated: bool) -> None:
    """Draws the pictures of a finished run."""
    from ovseg_jax.inference.pictures import draw_run

    for path in draw_run(run.config, workdir, run.method, run.variables, again=outdated):
        print(f"drew {path}")


def join_processes() -> None:
    """Connects this process to the others of the run.

    JAX finds them by itself on TPU VMs, under SLURM and the like. Elsewhere JAX_COORDINATOR_ADDRESS (host:port of the
    first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID must be set.
    """
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    try:
        said: dict[str, Any] = {
            key: int(os.environ[name]) for key, name in names.items() if name in os.environ
        }
        jax.distributed.initialize(**said)
    except ValueError as error:
        raise UserError(f"this process cannot join the others of the run: {error}") from error


def use_all_cores(batch_size: int) -> None:
    """Makes each CPU core a JAX device of its own, since XLA runs a convolution on a single core.

    Has no effect on accelerators, nor where XLA_FLAGS already sets the number of CPU devices.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = max(n for n in range(1, min(cores, 16) + 1) if batch_size % n == 0)
        jax.config.update("jax_num_cpu_devices", count)


def main() -> None:
    """Runs the command and exits with its status."""
    setup_logging()
    launch(run)


if __name__ == "__main__":
    main()
