"""What a config would take of a TPU that is not there: `python -m ovseg_jax.plan --config=FILE.py --topology=v3:4x8`.

The config's own train step, sharded over the topology's devices, is compiled ahead of time by the TPU's compiler,
which runs on any x86-64 Linux machine (`pip install -e '.[tpu]'`). Memory is its figure; FLOPs are counted in the
program, bytes and collectives in what it is compiled to, with loops as often as they run. From those and the chip's
published peaks follows the least time that a step can take: a roofline, not a prediction.

For GPUs, for which nothing can be compiled here, memory and time are counts alone (`--topology=h100:8`).
"""

import json
import math
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

# The compiler is asked for, not a TPU, so that several may run at once; to be said before JAX is imported.
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v3-8")  # or the compiler complains

import jax
import numpy as np
from absl import flags
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from ovseg_jax.cli.flags import chosen_config, launch
from ovseg_jax.costs.flops import count_flops
from ovseg_jax.costs.hlo import count_traffic
from ovseg_jax.errors import UserError
from ovseg_jax.models.remat import POLICIES
from ovseg_jax.parallel.sharding import (
    AXES,
    DEFAULT_RULES,
    batch_sharding,
    check_batch_size,
    make_mesh,
    mesh_shape,
)
from ovseg_jax.train.optimizer import make_optimizer
from ovseg_jax.train.state import abstract_state, abstract_variables, state_shardings
from ovseg_jax.train.step import make_step
from ovseg_jax.vocab.classes import ClassList

_TOPOLOGY = flags.DEFINE_string(
    "topology", "v3:4x8", "<chip>:<shape> of TPUs, or h100:<count>, h200:<count>."
)
_WORDS = flags.DEFINE_integer("words", 10_000, "Size of the vocabulary that stands for that of the captions.")
_CLASSES = flags.DEFINE_integer(
    "classes", 10_451, "How many classes stand for those of a classification: names of one to five words."
)
_JSON = flags.DEFINE_bool("json", False, "Print the plans as JSON.")
_SEARCH = flags.DEFINE_bool("search", False, "Where it does not fit, try what may make it fit.")
_LARGEST = flags.DEFINE_bool("largest_batch", False, "Also find the largest batch that fits.")

GIB = 2**30


class Chip(NamedTuple):
    """Published peaks of one device as JAX counts devices (of v3 a core, of the others a chip).

    Attributes:
      memory: HBM in bytes.
      flops: bfloat16 multiply-adds count two, a second.
      bandwidth: of HBM, bytes a second.
      network: bytes a second that a device sends over one axis of the interconnect, both directions together.
    """

    memory: int
    flops: float
    bandwidth: float
    network: float


# cloud.google.com/tpu/docs (system architecture), the JAX scaling book's table of TPU specs, NVIDIA's data sheets.
CHIPS = {
    "v3": Chip(16 * GIB, 61.5e12, 450e9, 100e9),
    "v4": Chip(32 * GIB, 275e12, 1228e9, 90e9),
    "v5e": Chip(16 * GIB, 197e12, 819e9, 90e9),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 180e9),
    "v6e": Chip(32 * GIB, 918e12, 1638e9, 180e9),
    "h100": Chip(80 * GIB, 989e12, 3350e9, 450e9),
    "h200": Chip(141 * GIB, 989e12, 4800e9, 450e9),
}


class Plan(NamedTuple):
    """What one step takes of one device, in bytes unless said otherwise.

    Attributes:
      topology: as asked for.
      devices: how many share the batch.
      batch_size: of all devices.
      parameters: with the other collections, such as `batch_stats`.
      optimizer: what the optimiser keeps.
      batch: the examples.
      activations: what the forward pass hands to the backward pass, before the compiler fuses any of it away.
      temporary: everything that lives during a step, activations included; the compiler's figure, None by count.
      total: the most that is alive at once; by count, the sum of the others.
      capacity: of the device.
      fits: total <= capacity; what the compiler says.
      over: how much is missing.
      flops: of matrix products and convolutions.
      accessed: read and written in HBM; None by count.
      collectives: kind -> (count, bytes that a device receives). None by count.
      compute_seconds: flops at the peak rate.
      memory_seconds: accessed at the peak rate; None by count.
      network_seconds: collectives at the peak rate of one axis; None by count.
    """

    topology: str
    devices: int
    batch_size: int
    parameters: int
    optimizer: int
    batch: int
    activations: int
    temporary: int | None
    total: int
    capacity: int
    fits: bool
    over: int
    flops: float
    accessed: float | None
    collectives: dict[str, tuple[int, int]] | None
    compute_seconds: float
    memory_seconds: float | None
    network_seconds: float | None

    @property
    def bound(self) -> str:
        """What the roofline says is slowest."""
        times = {
            "compute": self.compute_seconds,
            "memory": self.memory_seconds or 0.0,
            "network": self.network_seconds or 0.0,
        }
        return max(times, key=lambda name: times[name])

    @property
    def seconds(self) -> float:
        """The least time of a step."""
        return max(self.compute_seconds, self.memory_seconds or 0.0, self.network_seconds or 0.0)


def plan(config: ConfigDict, topology: str, *, words: int = 10_000, classes: int = 10_451) -> Plan:
    """Compiles, or counts, the train step of a config.

    Args:
      config: as `main` takes it. Its data is not read: a vocabulary of `words` words stands for that of the
        captions, and 133 classes, COCO's number, for the classes; of a classification `classes`.
      topology: `<chip>:<shape>` of TPUs, such as `v3:4x8` (32 chips, 64 cores), or `h100:<count>`.
      words: size of the vocabulary.
      classes: see above.

    Raises:
      UserError: an unknown topology, a missing TPU compiler, a batch that the devices cannot share.
    """
    chip, mesh = devices_of(topology, config)
    counts_only = isinstance(mesh, AbstractMesh)
    check_batch_size(config.batch_size, mesh, parts=config.get("accumulate", 1))
    # Before the mesh is in use: nothing can be computed on devices that are not there.
    method, optimizer, state, batch, shardings = _abstract(config, mesh, words, classes)
    with jax.sharding.use_abstract_mesh(mesh) if counts_only else jax.set_mesh(mesh):
        step: Any = make_step(method, optimizer, config.seed, shardings)
        flops = count_flops(jax.make_jaxpr(step)(state, batch).jaxpr, mesh.size) / mesh.size
        counted: dict[str, Any] = dict(
            topology=topology,
            devices=mesh.size,
            batch_size=int(config.batch_size),
            parameters=_share(state.variables),
            optimizer=_share((state.opt_state, state.average)),
            batch=_share(batch),
            activations=_activations(method, state, batch) // mesh.size,
            capacity=chip.memory,
            flops=flops,
            compute_seconds=flops / chip.flops,
        )
        if counts_only:
            # The gradients are as large as the parameters.
            total = 2 * counted["parameters"] + sum(counted[k] for k in ("optimizer", "batch", "activations"))
            return Plan(
                **counted,
                temporary=None,
                total=total,
                fits=total <= chip.memory,
                over=max(0, total - chip.memory),
                accessed=None,
                collectives=None,
                memory_seconds=None,
                network_seconds=None,
            )
        try:
            compiled = step.lower(state, batch).compile()
        except jax.errors.JaxRuntimeError as error:
            return _too_large(error, counted)
    memory = compiled.memory_analysis()
    # Inputs that come back as outputs are aliases of them.
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    total += memory.temp_size_in_bytes
    traffic = count_traffic(compiled.as_text())
    return Plan(
        **counted,
        temporary=memory.temp_size_in_bytes,
        total=total,
        fits=True,
        over=0,
        accessed=traffic.accessed,
        collectives=traffic.collectives,
        memory_seconds=traffic.accessed / chip.bandwidth,
        network_seconds=sum(size for _, size in traffic.collectives.values()) / chip.network,
    )


def devices_of(topology: str, config: ConfigDict) -> tuple[Chip, Any]:
    """The chip of a topology, and the config's mesh over its devices.

    Raises:
      UserError: an unknown topology, or no TPU compiler.
    """
    name, _, shape = topology.partition(":")
    if name not in CHIPS or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise UserError(
            f"--topology={topology} is none of v3:4x8, v4:2x4x4, v5e:4x4, v5p:2x2x4, v6e:4x4 and the like, or h100:8, "
            "h200:8 (counted, not compiled)"
        )
    if name.startswith("h"):
        sizes = mesh_shape(config.get("mesh"), math.prod(map(int, shape.split("x"))))
        return CHIPS[name], AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    from jax.experimental import topologies

    # On v4 a program runs on a whole chip; libtpu's default is one on each of its two cores.
    options = {"chip_config_name": "megacore"} if name == "v4" else {}
    try:
        devices = topologies.get_topology_desc(topology_name=topology, platform="tpu", **options).devices
    except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"--topology={topology} cannot be compiled for: {first} "
            "(the TPU compiler comes with pip install -e '.[tpu]')"
        ) from error
    return CHIPS[name], make_mesh(config.get("mesh"), devices)


def _abstract(config: ConfigDict, mesh: Any, words: int, classes: int) -> tuple[Any, Any, Any, dict, Any]:
    """Method, optimiser, and the shapes of state and batch, all that `make_step` and `lower` take."""
    from ovseg_jax.data.fields import batch_fields
    from ovseg_jax.methods import build, method_class, training_rows
    from ovseg_jax.vocab.words import WordList

    vocabulary = WordList([f"word{i}" for i in range(words)])
    labelled = "label" in batch_fields(method_class(config), config)
    if "towers" in config:
        config = ConfigDict(config.to_dict())
        config.towers.update(dict(init="", tokenizer="words"))
    method = build(config, vocabulary, _stand_ins(words, classes if labelled else min(133, words)))
    variables = abstract_variables(method, config.seed)
    optimizer = make_optimizer(config.optimizer, variables["params"], int(config.steps))
    shardings = state_shardings(optimizer, variables, mesh, config.get("sharding", DEFAULT_RULES))
    state = abstract_state(method, optimizer, config.seed, shardings)
    size = int(config.data.image_size)
    example = {
        "image": np.zeros((size, size, 3), np.uint8),
        "segments": np.ones((size, size), np.int32),
        "class_ids": np.zeros(1, np.int32),
        "iscrowd": np.zeros(1, bool),
        "isthing": np.ones(1, bool),
        "boxes": np.array([[0, 0, size, size]], np.float32),
        "captions": ["word1"],
        "tags": ["word1"],
        "region_captions": [["word1"]],
        "region_tags": [["word1"]],
        "label": 0,
    }
    if config.data.get("cache_features", 0):
        example["feature"] = np.zeros((1, method.clip.dim), np.float32)
    row = training_rows(config, method, vocabulary)(0, example)
    rows = batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct((config.batch_size, *np.shape(x)), np.asarray(x).dtype, sharding=rows)
        for name, x in row.items()
    }
    return method, optimizer, state, batch, shardings


def _stand_ins(words: int, count: int) -> ClassList:
    """So many classes, of one to five words each as often as another: with [EOT] 4 tokens in the mean."""
    names = ((" ".join(f"word{(k + i) % words}" for i in range(1 + k % 5)),) for k in range(count))
    return ClassList(tuple(names), tuple(range(count)), (True,) * count)


def _share(tree: Any) -> int:
    """Bytes of a tree of shapes on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree)
    )


def _activations(method: Any, state: Any, batch: Any) -> int:
    """Bytes that the forward pass of the whole batch keeps for the backward pass, parameters not counted."""

    def residuals(params, rest, batch):
        loss = lambda params: method.loss({"params": params, **rest}, batch, jax.random.key(0))[0]
        return jax.vjp(loss, params)[1]

    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    kept = size(jax.eval_shape(residuals, state.params, state.model_state, batch))
    return max(0, kept - size(state.params))


def _too_large(error: Exception, counted: dict[str, Any]) -> Plan:
    """The compiler's refusal, `(16.51G) exceeds available HBM (15.48G)` or `Used 20.5G of 15.7G hbm`, as a plan."""
    size = r"([\d.]+)([KMG])"
    found = re.search(rf"\({size}\) exceeds available HBM \({size}\)|Used {size} of {size} hbm", str(error))
    if not found:
        raise error
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}
    number, of_unit, capacity, of_capacity = [group for group in found.groups() if group]
    used, of = float(number) * unit[of_unit], float(capacity) * unit[of_capacity]
    return Plan(
        **{**counted, "capacity": int(of)},
        temporary=None,
        total=int(used),
        fits=False,
        over=int(used - of),
        accessed=None,
        collectives=None,
        memory_seconds=None,
        network_seconds=None,
    )


def largest_batch(
    config: ConfigDict, topology: str, *, words: int = 10_000, classes: int = 10_451
) -> Plan | None:
    """The plan of the largest batch that fits, in steps of what devices, parts and groups allow; None if none does."""
    mesh = devices_of(topology, config)[1]
    unit = math.lcm(mesh.size * config.get("accumulate", 1), config.get("loss", {}).get("group", 1))

    def attempt(units: int) -> Plan:
        changed = ConfigDict(config.to_dict())
        changed.batch_size = units * unit
        return plan(changed, topology, words=words, classes=classes)

    low, best = 0, None
    high = max(1, int(config.batch_size) // unit)
    while (found := attempt(high)).fits:
        low, best, high = high, found, 2 * high
    while high - low > max(1, low // 8):  # To an eighth: every attempt is a compilation.
        middle = (low + high) // 2
        found = attempt(middle)
        low, high, best = (middle, high, found) if found.fits else (low, middle, best)
    return best


def search(
    config: ConfigDict, topology: str, *, words: int = 10_000, classes: int = 10_451
) -> Iterator[tuple[str, Plan]]:
    """Tries what may make a config fit, cheapest first, until one does: (the flags that do it, its plan)."""
    mesh = devices_of(topology, config)[1]
    flags: dict[str, Any] = {}
    remat = {"model.remat": config.model.get("remat", "none")}
    if "remat" in config.model.backbone:
        remat["model.backbone.remat"] = config.model.backbone.remat
    stronger = lambda policy, than: POLICIES.index(policy) > POLICIES.index(than)
    changes: list[dict[str, Any]] = [
        {key: policy} for policy in POLICIES for key, now in remat.items() if stronger(policy, now)
    ]
    before = config.get("accumulate", 1)
    parts = [before * p for p in (2, 4, 8, 16) if config.batch_size // mesh.size % (before * p) == 0]
    for change in [*changes, {"mesh.data": 1, "mesh.fsdp": -1}, *({"accumulate": p} for p in parts)]:
        flags |= change
        changed = ConfigDict(config.to_dict())
        changed.update_from_flattened_dict(flags)
        found = plan(changed, topology, words=words, classes=classes)
        yield " ".join(f"--config.{key}={value}" for key, value in flags.items()), found
        if found.fits:
            return


def report(p: Plan) -> str:
    """A plan for a person."""
    gib = lambda n: f"{n / GIB:8.2f} GiB"
    ms = lambda s: "" if s is None else f"{1e3 * s:.1f} ms"
    lines = [
        f"{p.topology}: {p.devices} devices, a batch of {p.batch_size}, {p.batch_size / p.devices:g} a device",
        f"  parameters  {gib(p.parameters)}",
        f"  optimiser   {gib(p.optimizer)}",
        f"  batch       {gib(p.batch)}",
        f"  activations {gib(p.activations)}  handed to the backward pass, before fusion",
    ]
    if p.temporary is not None:
        lines.append(f"  temporary   {gib(p.temporary)}  with the activations, as compiled")
    how = ", by count" if p.topology.startswith("h") else ""
    verdict = "fits" if p.fits else f"DOES NOT FIT: {p.over / GIB:.2f} GiB too much"
    lines.append(f"  total       {gib(p.total)}  of {p.capacity / GIB:.2f}{how}: {verdict}")
    lines.append(
        f"  {p.flops / 1e12:.2f} TFLOP a step and device"
        + ("" if p.accessed is None else f", {p.accessed / 1e9:.1f} GB accessed")
    )
    for kind, (number, size) in sorted((p.collectives or {}).items()):
        lines.append(f"  {kind:20} x {number:<4} {size / 2**20:10.1f} MiB")
    parts = {"compute": p.compute_seconds, "memory": p.memory_seconds, "network": p.network_seconds}
    times = ", ".join(f"{name} {ms(seconds)}" for name, seconds in parts.items() if seconds is not None)
    rate = p.batch_size / p.seconds
    lines.append(
        f"  roofline: {ms(p.seconds)} a step at least, {rate:,.0f} images/s at most, bound by {p.bound} ({times})"
    )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """The command; its exit status is 1 where nothing that was tried fits."""
    if len(argv) > 1:
        raise UserError(f"unexpected arguments {argv[1:]}; a setting is --config.key=value.")
    config = chosen_config()
    words, classes, topology = _WORDS.value, _CLASSES.value, _TOPOLOGY.value
    plans = [("", plan(config, topology, words=words, classes=classes))]
    if not _JSON.value:
        print(report(plans[0][1]), flush=True)
    if _LARGEST.value and (found := largest_batch(config, topology, words=words, classes=classes)):
        plans.append((f"--config.batch_size={found.batch_size}", found))
        if not _JSON.value:
            print(
                f"the largest batch that fits, to an eighth: {found.batch_size}\n{report(found)}", flush=True
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
        print("--search tries rematerialisation, FSDP and accumulation in parts until it fits.")
    return 0 if any(p.fits for _, p in plans) else 1


if __name__ == "__main__":
    launch(main)
