"""Memory and time of a config's train step on devices that are not available, from the TPU compiler or counted."""

import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from ovseg_jax.costs.flops import count_flops
from ovseg_jax.costs.hlo import count_traffic
from ovseg_jax.costs.roofline import CHIPS, Chip, Plan
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


def plan(config: ConfigDict, topology: str, *, words: int = 10_000, classes: int = 10_451) -> Plan:
    """Computes the memory and time of a config's train step: compiled for TPUs, counted for GPUs.

    Args:
      config: the config of a run. Its data is not read; invented words and classes replace those of the data.
      topology: `<chip>:<shape>` of TPUs, such as `v3:4x8` (32 chips, 64 cores), or `h100:<count>`.
      words: the number of words in the caption vocabulary.
      classes: the number of classes of a method that trains on image labels; others get 133, COCO's number.

    Raises:
      UserError: the topology is unknown, the TPU compiler is missing, or the devices do not divide the batch.
    """
    chip, mesh = devices_of(topology, config)
    counts_only = isinstance(mesh, AbstractMesh)
    check_batch_size(config.batch_size, mesh, parts=config.get("accumulate", 1))
    # Outside the mesh's context, in which nothing can be computed, since its devices are absent.
    method, optimizer, state, batch, shardings = _abstract(config, mesh, words, classes)
    with jax.sharding.use_abstract_mesh(mesh) if counts_only else jax.set_mesh(mesh):
        step: Any = make_step(method, optimizer, config.seed, shardings)
        flops = count_flops(step.trace(state, batch).jaxpr.jaxpr, mesh.size) / mesh.size
        counted: dict[str, Any] = dict(
            topology=topology,
            devices=mesh.size,
            batch_size=int(config.batch_size),
            parameters=_bytes_per_device(state.variables),
            optimizer=_bytes_per_device((state.opt_state, state.average)),
            batch=_bytes_per_device(batch),
            activations=_activations(method, state, batch) // mesh.size,
            capacity=chip.memory,
            flops=flops,
            compute_seconds=flops / chip.flops,
        )
        if counts_only:
            # The factor 2 is for the gradients.
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
            return _plan_that_exceeds(error, counted)
    memory = compiled.memory_analysis()
    # Donated inputs share their memory with outputs.
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
    """Returns the chip of a topology, and the config's mesh over its devices.

    Raises:
      UserError: the topology is unknown, or the TPU compiler is missing.
    """
    name, _, shape = topology.partition(":")
    if name not in CHIPS or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise UserError(
            f"--topology={topology} is unknown: give <chip>:<shape>, such as v3:4x8, v4:2x4x4, v5e:4x4, v5p:2x2x4 or "
            "v6e:4x4, or h100:<count> or h200:<count> (counted, not compiled)"
        )
    if name.startswith("h"):
        sizes = mesh_shape(config.get("mesh"), math.prod(map(int, shape.split("x"))))
        return CHIPS[name], AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    from jax.experimental import topologies

    # On v4 a program runs on a whole chip; by default libtpu compiles for each of its two cores.
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
    """Returns the method, its optimiser, the shapes of state and batch, and the shardings of the state."""
    from ovseg_jax.data.fields import batch_fields
    from ovseg_jax.methods import build, method_type, training_rows
    from ovseg_jax.towers.vocabulary import template_words
    from ovseg_jax.vocab.words import WordList

    fields = batch_fields(method_type(config.method), config)
    invented = [f"word{i}" for i in range(words)]
    vocabulary = WordList([*invented, *sorted(template_words(config.data, fields) | _prompt_words(config))])
    labelled = "label" in fields
    if "towers" in config:
        config = ConfigDict(config.to_dict())
        config.towers.update(dict(init="", tokenizer="words"))
    if config.get("text", {}).get("tokenizer"):
        config = ConfigDict(config.to_dict())
        config.text.tokenizer = "words"
    method = build(config, vocabulary, _invented_classes(words, classes if labelled else min(133, words)))
    variables = abstract_variables(method, config.seed)
    optimizer = make_optimizer(config.optimizer, variables["params"], int(config.steps), method.frozen)
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


def _prompt_words(config: ConfigDict) -> set[str]:
    """Returns the words of the templates around the names of classes, for methods that embed these at their start."""
    from ovseg_jax.towers.templates import read_templates
    from ovseg_jax.vocab.templates import PLACE
    from ovseg_jax.vocab.words import split_words

    prompt = config.get("fcclip", {}).get("prompt", ())
    templates: Any = read_templates(prompt if isinstance(prompt, str) else list(prompt)) if prompt else ()
    return {word for template in templates for word in split_words(template.replace(PLACE, " "))}


def _invented_classes(words: int, count: int) -> ClassList:
    """Returns `count` classes whose names have one to five words in turn."""
    names = (" ".join(f"word{(k + i) % words}" for i in range(1 + k % 5)) for k in range(count))
    return ClassList.things(names)


def _bytes_per_device(tree: Any) -> int:
    """Computes the bytes of a tree of sharded shapes on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree)
    )


def _activations(method: Any, state: Any, batch: Any) -> int:
    """Computes the bytes that the forward pass keeps for the backward pass, for the whole batch, without parameters."""

    def residuals(params, rest, batch):
        loss = lambda params: method.loss({"params": params, **rest}, batch, jax.random.key(0))[0]
        return jax.vjp(loss, params)[1]

    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    kept = size(jax.eval_shape(residuals, state.params, state.model_state, batch))
    return max(0, kept - size(state.params))


def _plan_that_exceeds(error: Exception, counted: dict[str, Any]) -> Plan:
    """Parses the compiler's error, such as `(16.51G) exceeds available HBM (15.48G)`, to a plan; raises any other."""
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
    """Returns the plan of the largest batch that fits, to within an eighth; None if none fits.

    Batches are multiples of the number of devices times `accumulate`, and of `loss.group`; arguments as for `plan`.
    """
    mesh = devices_of(topology, config)[1]
    unit = math.lcm(mesh.size * config.get("accumulate", 1), config.get("loss", {}).get("group", 1))

    def attempt(units: int) -> Plan:
        changed = ConfigDict(config.to_dict())
        changed.batch_size = units * unit
        return plan(changed, topology, words=words, classes=classes)

    low, high, best = 0, None, None
    units = max(1, int(config.batch_size) // unit)
    while high is None or high - low > max(1, low // 8):  # Each attempt compiles the step.
        found = attempt(units)
        if found.fits:
            low, best = units, found
        else:
            high = units
        # Memory is nearly linear in the batch. The next attempt closes the interval if that is exact.
        fixed = found.parameters + found.optimizer
        guess = int(units * (found.capacity - fixed) / max(1, found.total - fixed))
        units = max(guess, low + max(1, low // 8))
        if high is not None:
            units = min(units, max(low + 1, high - max(1, high // 9)))
    return best


def _remat(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields the rematerialisation keys of a config with their values."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _remat(value, f"{prefix}{key}.")
        elif key == "remat":
            yield f"{prefix}{key}", value


def search(
    config: ConfigDict, topology: str, *, words: int = 10_000, classes: int = 10_451
) -> Iterator[tuple[str, Plan]]:
    """Tries settings that reduce memory, the fastest first, until the config fits; yields (flags, plan).

    For the arguments see `plan`.
    """
    mesh = devices_of(topology, config)[1]
    flags: dict[str, Any] = {}
    networks = {section: config[section].to_dict() for section in ("model", "towers") if section in config}
    remat = dict(sorted(_remat(networks), key=lambda found: found[0].count(".")))
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
