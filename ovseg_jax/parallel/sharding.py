"""Where arrays live: the one file that names the axes of the device mesh.

A mesh has two axes. Both split the batch; `fsdp` also splits parameters and optimiser state, so that
`{data: 8, fsdp: 1}` is data parallelism, `{data: 1, fsdp: 8}` is FSDP, and anything between is both.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError

DATA, FSDP = "data", "fsdp"
AXES = (DATA, FSDP)
DEFAULT_RULES = ((".*", "fsdp"),)
AnyMesh = Mesh | AbstractMesh  # the planner counts on devices that are not there


def make_mesh(
    shape: ConfigDict | Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Lays the devices out as `{data: n, fsdp: m}`; one of the two may be -1, "all that are left".

    The axes are Auto: under JAX's default, Explicit, Flax Linen's logical constraints fail.

    Args:
      shape: sizes of the axes; `{data: -1, fsdp: 1}` where nothing is said.
      devices: all devices of all processes where nothing is said.

    Raises:
      UserError: for an unknown axis, or sizes that do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_shape(shape, len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_shape(shape: ConfigDict | Mapping[str, int] | None, count: int) -> tuple[int, ...]:
    """Sizes of the axes for so many devices, see `make_mesh`."""
    asked = {DATA: -1, FSDP: 1} | dict(shape or {})
    if unknown := sorted(set(asked) - set(AXES)):
        raise UserError(f"mesh has unknown axes {unknown}; the axes are {list(AXES)}.")
    sizes = [int(asked[axis]) for axis in AXES]
    if sizes.count(-1) == 1:
        rest = int(np.prod([size for size in sizes if size != -1]))
        sizes[sizes.index(-1)] = count // max(rest, 1)
    if min(sizes) < 1 or int(np.prod(sizes)) != count:
        raise UserError(f"mesh {asked} does not fit {count} devices: data x fsdp must be their number.")
    return tuple(sizes)


def on_cpu(mesh: AnyMesh) -> bool:
    """Returns whether the devices of `mesh` are CPUs; the planner's devices that are not there are not."""
    return isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu"


def replicated(mesh: AnyMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """The leading dimension over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def check_batch_size(batch_size: int, mesh: AnyMesh, key: str = "batch_size", parts: int = 1) -> None:
    """Raises a UserError that names `key` when a global batch cannot be split evenly over the mesh, in parts."""
    if parts < 1:
        raise UserError(f"accumulate={parts}: a batch has at least one part.")
    if batch_size < 1 or batch_size % (mesh.size * parts):
        times = f" times accumulate={parts}" if parts > 1 else ""
        raise UserError(f"{key}={batch_size} must be a positive multiple of the {mesh.size} devices{times}.")


def split_parts(batch: Any, parts: int) -> Any:
    """[B ...] to [parts, B / parts ...]: every device cuts its own share, and no example moves."""
    axes = active_batch_axes()

    def split(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)
        return jax.lax.with_sharding_constraint(x, PartitionSpec(None, axes)) if axes else x

    return jax.tree.map(split, batch)


def join_parts(rows: Any) -> Any:
    """The inverse of `split_parts`."""
    axes = active_batch_axes()

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])
        return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x

    return jax.tree.map(join, rows)


def on_host(tree: Any) -> Any:
    """A tree of arrays as NumPy arrays, whole on every process. All processes call this."""

    def whole(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            x = multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(whole, tree)


def put_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Joins the processes' numpy batches, [B / processes ...], into global arrays [B ...] on the mesh."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(value))
        for name, value in batch.items()
    }


def rule_spec(rule: str, shape: Sequence[int], mesh: AnyMesh) -> PartitionSpec:
    """What a rule means for an array of this shape.

    `replicate`: whole on every device. `fsdp`: the largest dimension that the fsdp axis divides is split over
    it; an array with no such dimension is replicated.
    """
    if rule == "replicate":
        return PartitionSpec()
    if rule != "fsdp":
        raise UserError(f'unknown sharding rule "{rule}"; the rules are "replicate" and "fsdp".')
    size = mesh.shape[FSDP]
    fitting = [axis for axis, length in enumerate(shape) if length >= size and length % size == 0]
    if size == 1 or not fitting:
        return PartitionSpec()
    widest = max(fitting, key=lambda axis: shape[axis])
    return PartitionSpec(*(FSDP if axis == widest else None for axis in range(widest + 1)))


def leaf_sharding(
    path: str, shape: Sequence[int], mesh: AnyMesh, rules: Iterable[Sequence[str]] = DEFAULT_RULES
) -> NamedSharding:
    """The sharding of one parameter: the first (regex, rule) whose regex is found in its path decides."""
    for pattern, rule in rules:
        if re.search(pattern, path):
            return NamedSharding(mesh, rule_spec(rule, shape, mesh))
    return replicated(mesh)


def path_name(path: Sequence[Any]) -> str:
    """A key path of `jax.tree_util` as `encoder/conv/kernel`, the spelling that a config's regexes meet."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def tree_paths(tree: Any) -> Any:
    """A tree of the same structure whose leaves are their own paths."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path), tree)


def active_batch_axes() -> tuple[str, ...]:
    """The axes that split the batch under the mesh of `jax.set_mesh`; () without a mesh or on one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return AXES if set(AXES) <= set(mesh.axis_names) and mesh.size > 1 else ()
