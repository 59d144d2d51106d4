"""The device mesh and the sharding of arrays; the one file that names the axes of the mesh.

A mesh has two axes. Both split the batch; `fsdp` also splits parameters and optimiser state. `{data: 8, fsdp: 1}` is
data parallelism, `{data: 1, fsdp: 8}` is FSDP, and values between combine both.
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
AnyMesh = Mesh | AbstractMesh  # abstract for the planner, which has no devices


def make_mesh(
    shape: ConfigDict | Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Creates a mesh `{data: n, fsdp: m}` over the devices; one of the two may be -1, "all that are left".

    The axes are Auto: under JAX's default, Explicit, Flax Linen's logical constraints fail.

    Args:
      shape: sizes of the axes; by default `{data: -1, fsdp: 1}`.
      devices: the devices; by default all devices of all processes.

    Raises:
      UserError: an axis is unknown, or the product of the sizes is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_shape(shape, len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_shape(shape: ConfigDict | Mapping[str, int] | None, count: int) -> tuple[int, ...]:
    """Returns the sizes of the axes for `count` devices, see `make_mesh`."""
    asked = {DATA: -1, FSDP: 1} | dict(shape or {})
    if unknown := sorted(set(asked) - set(AXES)):
        raise UserError(f"config.mesh has unknown axes {unknown}; the axes are {list(AXES)}.")
    sizes = [int(asked[axis]) for axis in AXES]
    if sizes.count(-1) == 1:
        rest = int(np.prod([size for size in sizes if size != -1]))
        sizes[sizes.index(-1)] = count // max(rest, 1)
    if min(sizes) < 1 or int(np.prod(sizes)) != count:
        raise UserError(
            f"config.mesh={asked} does not fit {count} devices: data x fsdp must be their number."
        )
    return tuple(sizes)


def on_cpu(mesh: AnyMesh) -> bool:
    """Tells whether the devices of `mesh` are CPUs; False for an abstract mesh, as the planner uses."""
    return isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu"


def replicated(mesh: AnyMesh) -> NamedSharding:
    """Returns the sharding that puts the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """Returns the sharding that splits the leading dimension over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def check_batch_size(batch_size: int, mesh: AnyMesh, key: str = "batch_size", parts: int = 1) -> None:
    """Raises a UserError that names `key` if a global batch cannot be split evenly over mesh and parts."""
    if parts < 1:
        raise UserError(f"accumulate={parts} is less than 1.")
    if batch_size < 1 or batch_size % (mesh.size * parts):
        times = f" times accumulate={parts}" if parts > 1 else ""
        raise UserError(f"{key}={batch_size} must be a positive multiple of the {mesh.size} devices{times}.")


def split_parts(batch: Any, parts: int) -> Any:
    """Reshapes [B ...] to [parts, B / parts ...]; each device splits its own share, so no data moves."""
    axes = active_batch_axes()

    def split(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)
        return jax.lax.with_sharding_constraint(x, PartitionSpec(None, axes)) if axes else x

    return jax.tree.map(split, batch)


def join_parts(rows: Any) -> Any:
    """Reshapes [parts, B / parts ...] back to [B ...]: the inverse of `split_parts`."""
    axes = active_batch_axes()

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])
        return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x

    return jax.tree.map(join, rows)


def on_host(tree: Any) -> Any:
    """Gathers a tree of arrays as whole NumPy arrays on every process; all processes must call it."""

    def whole(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            x = multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(whole, tree)


def put_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Joins the processes' NumPy batches, [B / processes ...], into global arrays [B ...] on the mesh."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(value))
        for name, value in batch.items()
    }


def rule_spec(rule: str, shape: Sequence[int], mesh: AnyMesh) -> PartitionSpec:
    """Returns the PartitionSpec that a sharding rule gives an array of this shape.

    `replicate`: the whole array is on every device. `fsdp`: the largest dimension that is a multiple of the fsdp axis
    is split over it; an array without such a dimension is replicated.
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
    """Returns the sharding of one parameter: the first (regex, rule) whose regex matches in its path decides."""
    for pattern, rule in rules:
        if re.search(pattern, path):
            return NamedSharding(mesh, rule_spec(rule, shape, mesh))
    return replicated(mesh)


def path_name(path: Sequence[Any]) -> str:
    """Formats a key path of `jax.tree_util` as `encoder/conv/kernel`, the form that regexes of configs match."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def tree_paths(tree: Any) -> Any:
    """Returns a tree of the same structure whose leaves are their own paths."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path), tree)


def active_batch_axes() -> tuple[str, ...]:
    """Returns the axes that split the batch under `jax.set_mesh`; () without a mesh or on one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return AXES if set(AXES) <= set(mesh.axis_names) and mesh.size > 1 else ()


def split_batch(x: jax.Array) -> jax.Array:
    """Has the compiler split the leading dimension over all devices, where it can be split evenly."""
    axes = active_batch_axes()
    even = axes and x.shape[0] % jax.sharding.get_abstract_mesh().size == 0
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if even else x


def whole(x: jax.Array) -> jax.Array:
    """Has the compiler gather an array on every device, as FSDP does with the weights of a layer."""
    return jax.lax.with_sharding_constraint(x, PartitionSpec()) if active_batch_axes() else x
