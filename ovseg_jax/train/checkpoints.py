"""Checkpoints: variables and optimiser state, asynchronous, atomic (Orbax).

    WORKDIR/config.json                     the resolved config
    WORKDIR/checkpoints/<step>/variables    {"params": ..., other collections}: all that inference reads
    WORKDIR/checkpoints/<step>/optimizer    optax's state
    WORKDIR/checkpoints/<step>/average      averaged parameters, where the run keeps them

The position in the data is the step (see `data.pipeline`), so that a checkpoint restores on any mesh and with any
number of processes.

A folder named otherwise was being written when the run died; it is never read.
"""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import preservation_policy, save_decision_policy

from ovseg_jax import config as config_lib
from ovseg_jax.errors import UserError
from ovseg_jax.parallel.sharding import DEFAULT_RULES, leaf_sharding, path_name
from ovseg_jax.towers.prompt_file import FILE as PROMPT_FILE
from ovseg_jax.train.state import TrainState

CONFIG_FILE = "config.json"
TEXT_TOWER = "text_tower"  # the folder of a run in which `FrozenText.save` leaves a frozen tower
# What a checkpoint takes beside its arrays, at most.
METADATA_BYTES = 1 << 20
# An array that all devices hold is written by them in slices, and each shape's slice is a program that is compiled for
# each device: not for less than this.
SLICE_BYTES = 1 << 20
ocp.type_handlers.register_type_handler(
    jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SLICE_BYTES), override=True
)


class Checkpoints:
    """The checkpoints of one run. Saving returns at once; errors of writing surface at the next call.

    Args:
      workdir: where the run lives.
      every: save at multiples of this many steps; 0 = only where the loop forces it.
      keep: how many of the latest to keep.
    """

    def __init__(self, workdir: epath.PathLike, *, every: int, keep: int):
        self.directory = epath.Path(workdir).absolute() / "checkpoints"
        policies: list[Any] = [save_decision_policy.PreemptionCheckpointingPolicy()]
        if every > 0:
            policies.append(save_decision_policy.FixedIntervalPolicy(every))
        with self._writing():
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    save_decision_policy=save_decision_policy.AnySavePolicy(policies),
                    preservation_policy=preservation_policy.LatestN(max(keep, 1)),
                    cleanup_tmp_directories=True,
                ),
            )

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def should_save(self, step: int) -> bool:
        """Whether `step` is due (and, with several processes, whether preemption is announced)."""
        return self._manager.should_save(step)

    def reached_preemption(self, step: int) -> bool:
        """Whether all processes have agreed to stop at this step, after one of them was told to."""
        return self._manager.reached_preemption(step)

    def save(self, step: int, state: TrainState) -> None:
        """Saves the state after `step` steps."""
        with self._writing():
            self._check_space(state)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    variables=ocp.args.StandardSave(state.variables),
                    optimizer=ocp.args.StandardSave(state.opt_state),
                    **({} if state.average is None else {"average": ocp.args.StandardSave(state.average)}),
                ),
                force=True,
            )

    def restore(self, target: TrainState, step: int | None = None) -> TrainState:
        """Restores the latest (or the given) checkpoint.

        Args:
          target: shapes and shardings of the state (`abstract_state`): where they are, the result will be.
          step: which checkpoint.

        Raises:
          UserError: where names or shapes in the checkpoint differ from those of `target`, listing both.
        """
        step = self._manager.latest_step() if step is None else step
        if step is None:
            raise UserError(f"{self.directory} holds no checkpoint.")
        _check_same(self.directory / str(step) / "variables", target.variables)
        _check_same(self.directory / str(step) / "optimizer", target.opt_state)
        average = {}
        if target.average is not None:
            _check_same(self.directory / str(step) / "average", target.average)
            average["average"] = ocp.args.StandardRestore(target.average)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                variables=ocp.args.StandardRestore(target.variables),
                optimizer=ocp.args.StandardRestore(target.opt_state),
                **average,
            ),
        )
        variables = dict(restored["variables"])
        return TrainState(
            step=jax.device_put(jnp.asarray(step, jnp.int32), target.step.sharding),
            params=variables.pop("params"),
            model_state=variables,
            opt_state=restored["optimizer"],
            average=restored["average"] if average else None,
        )

    def wait(self) -> None:
        """Blocks until what was saved is on disk."""
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Finishes the last save and stops the background threads."""
        with self._writing():
            self._manager.close()

    def _check_space(self, state: TrainState) -> None:
        """Refuses before writing what will not fit; only a local disk can be asked."""
        if "://" in str(self.directory):
            return
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) // jax.process_count() + METADATA_BYTES
        if shutil.disk_usage(self.directory).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if is_disk_full(error):
                raise UserError(disk_full_message(self.directory)) from error
            raise


def load_variables(
    workdir: epath.PathLike,
    step: int | None = None,
    *,
    mesh: Mesh | None = None,
    rules: Iterable[Sequence[str]] = DEFAULT_RULES,
    averaged: bool = True,
) -> tuple[ConfigDict, dict[str, Any], int]:
    """Reads what inference needs from a run: its config and its variables, without the optimiser's state.

    Args:
      workdir: the run's folder or bucket.
      step: which checkpoint; the latest where nothing is said.
      mesh: where to put the variables; as numpy arrays where nothing is said.
      rules: the sharding rules on that mesh.
      averaged: take the averaged parameters of a run that keeps them.

    Returns:
      (config, variables, step); of a run that left its frozen text tower beside it, the config names that one, and its
      prompt.

    Raises:
      UserError: where the folder holds no run, or not that step.
    """
    workdir = epath.Path(workdir)
    config = read_config(workdir)
    if config is None:
        raise UserError(f"{workdir} holds no run: {CONFIG_FILE} is missing.")
    config = config_lib.resolved(config, workdir)
    directory = workdir.absolute() / "checkpoints"
    if not directory.exists():
        raise UserError(f"{workdir} holds no checkpoint yet: there is no folder {directory}.")
    steps = sorted(ocp.utils.checkpoint_steps(directory))
    if not steps:
        raise UserError(f"{workdir} holds no complete checkpoint yet.")
    if step is not None and step not in steps:
        raise UserError(f"{workdir} has no checkpoint of step {step}; it has {steps}.")
    step = steps[-1] if step is None else step

    def target(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        sharding: jax.sharding.Sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        if mesh is not None:
            sharding = leaf_sharding(path_name(path[1:]), leaf.shape, mesh, rules)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def restore(item: epath.Path, prefix: tuple[Any, ...] = ()) -> dict[str, Any]:
        with ocp.StandardCheckpointer() as checkpointer:
            shapes = jax.tree.map_with_path(
                lambda path, leaf: target((*prefix, *path), leaf), _saved_arrays(item)
            )
            return checkpointer.restore(item, shapes)

    variables = restore(directory / str(step) / "variables")
    average = directory / str(step) / "average"
    if averaged and average.exists():
        variables["params"] = restore(average, (jax.tree_util.DictKey("params"),))
    return with_own_text(config, workdir), jax.device_get(variables) if mesh is None else variables, step


def with_own_text(config: ConfigDict, workdir: epath.PathLike) -> ConfigDict:
    """The config with the frozen text tower and prompt that the run has kept, in place of where they came from."""
    folder = epath.Path(workdir) / TEXT_TOWER
    if not (folder / CONFIG_FILE).exists():
        return config
    config = ConfigDict(config.to_dict())
    config.text.init = str(folder)
    if config.text.get("prompt", ""):
        config.text.prompt = str(folder / PROMPT_FILE)
    return config


def read_config(workdir: epath.PathLike) -> ConfigDict | None:
    """The resolved config of the run in `workdir`, or None where there is none."""
    path = epath.Path(workdir) / CONFIG_FILE
    if not path.exists():
        return None
    try:
        return config_lib.from_json(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}).") from error


def write_config(workdir: epath.PathLike, config: ConfigDict) -> None:
    """Writes `config.json` into `workdir`, whole or not at all."""
    path = epath.Path(workdir) / CONFIG_FILE
    temporary = path.parent / (CONFIG_FILE + ".tmp")
    temporary.write_text(config_lib.to_json(config))
    temporary.replace(path)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an exception, or one that caused it, says that there is no space left.

    The array writer is C++, whose errors carry the system's text but no errno.
    """
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def disk_full_message(directory: epath.PathLike) -> str:
    """The sentence for a user whose disk is full."""
    return (
        f"the disk is full while writing to {directory}; complete checkpoints are kept: free some space and "
        "run the same command to continue from the last one."
    )


def _saved_arrays(item: epath.Path) -> Any:
    """Shapes and dtypes of one item of a checkpoint, in nested dicts and lists."""
    try:
        # A checkpointer would warn that an item has no metadata of a checkpoint.
        saved: Any = ocp.StandardCheckpointHandler().metadata(item)
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{item} cannot be read as part of a checkpoint ({error}).") from error
    if saved is None:
        raise UserError(f"{item} cannot be read as part of a checkpoint.")
    return saved.tree


def _check_same(item: epath.Path, target: Any) -> None:
    saved, wanted = _shapes(_saved_arrays(item)), _shapes(target)
    missing = sorted(wanted.keys() - saved.keys())
    extra = sorted(saved.keys() - wanted.keys())
    other = sorted(name for name in wanted.keys() & saved.keys() if wanted[name] != saved[name])
    if not (missing or extra or other):
        return
    parts = []
    if missing:
        parts.append(f"it lacks {_listing(missing)}")
    if extra:
        parts.append(f"it has {_listing(extra)}, which this config has not")
    if other:
        parts.append("shapes differ: " + _listing([f"{n} {saved[n]} there, {wanted[n]} here" for n in other]))
    raise UserError(f"{item} belongs to another config: {'; '.join(parts)}.")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}


def _listing(names: Sequence[str], limit: int = 8) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
