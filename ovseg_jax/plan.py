"""The command that plans a run for another machine: `python -m ovseg_jax.plan --config=FILE.py --topology=v3:4x8`.

The TPU compiler, which runs on any x86-64 Linux machine (`pip install -e '.[tpu]'`), compiles the config's own train
step, sharded over the topology's devices. It reports the memory; FLOPs are counted in the traced program, bytes and
collectives in the compiled one. From those and the chip's published peaks follows the shortest time that a step can
take: a roofline, not a prediction.

For GPUs (`--topology=h100:8`) nothing is compiled, and memory and time are only counted.
"""

import json
import os

import jax
from absl import flags

from ovseg_jax.cli.flags import chosen_config, given_keys, launch
from ovseg_jax.costs.plan import largest_batch, plan, search
from ovseg_jax.costs.roofline import report
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.keys import check_config

_TOPOLOGY = flags.DEFINE_string(
    "topology", "v3:4x8", "<chip>:<shape> of TPUs, or h100:<count>, h200:<count>."
)
_WORDS = flags.DEFINE_integer("words", 10_000, "Size assumed for the vocabulary of the captions.")
_CLASSES = flags.DEFINE_integer(
    "classes", 10_451, "Number of classes assumed for a classification, with names of one to five words."
)
_JSON = flags.DEFINE_bool("json", False, "Print the plans as JSON.")
_SEARCH = flags.DEFINE_bool(
    "search", False, "If it does not fit, try settings that reduce memory until it fits."
)
_LARGEST = flags.DEFINE_bool("largest_batch", False, "Also find the largest batch that fits.")


def main(argv: list[str]) -> int:
    """Runs the command; the exit status is 1 if nothing that was tried fits."""
    if len(argv) > 1:
        raise UserError(f"unexpected arguments {argv[1:]}; settings are written --config.key=value.")
    use_compiler_alone()
    config = chosen_config()
    check_config(config, given_keys())
    words, classes, topology = _WORDS.value, _CLASSES.value, _TOPOLOGY.value
    plans = [("", plan(config, topology, words=words, classes=classes))]
    if not _JSON.value:
        print(report(plans[0][1]), flush=True)
    if _LARGEST.value and (found := largest_batch(config, topology, words=words, classes=classes)):
        plans.append((f"--config.batch_size={found.batch_size}", found))
        if not _JSON.value:
            print(
                f"the largest batch that fits, within an eighth: {found.batch_size}\n{report(found)}",
                flush=True,
            )
    if _SEARCH.value and not plans[0][1].fits:
        for change, found in search(config, topology, words=words, classes=classes):
            plans.append((change, found))
            if not _JSON.value:
                print(f"with {change}\n{report(found)}", flush=True)
    if _JSON.value:
        records = [
            {"change": change, **p._asdict(), "bound": p.bound, "seconds": p.seconds} for change, p in plans
        ]
        print(json.dumps(records, indent=1))
    if not plans[0][1].fits and not _SEARCH.value and not _JSON.value:
        print("--search tries rematerialisation, FSDP and gradient accumulation until it fits.")
    return 0 if any(p.fits for _, p in plans) else 1


def use_compiler_alone() -> None:
    """Lets libtpu compile without a TPU, also in several processes at once."""
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v3-8")  # without it the compiler prints warnings
    jax.config.update("jax_platforms", "cpu")


if __name__ == "__main__":
    launch(main)
