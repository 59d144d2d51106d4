"""Checkpoints of variables and optimiser state, asynchronous and atomic (Orbax).

    WORKDIR/config.json                     the resolved config
    WORKDIR/checkpoints/<step>/variables    {"params": ..., other collections}, which inference reads
    WORKDIR/checkpoints/<step>/optimizer    optax's state
    WORKDIR/checkpoints/<step>/average      averaged parameters, if the run keeps them
    WORKDIR/checkpoints/<step>/log          sums of the metrics since the last record, for the next record
    WORKDIR/checkpoints/frozen              the variables that never change, saved once
    WORKDIR/checkpoints/<step>/checksums.json   size and CRC-32 of each file, written before the folder gets its name

The position in the data is the step (see `data.pipeline`), so a checkpoint can be restored on any mesh and with any
number of processes.

Folders with other names are never read. If the newest checkpoint is damaged (truncated, altered, partly copied), the
newest undamaged one is used, with a warning; a resumed run renames the damaged one to <step>.damaged.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import preservation_policy, save_decision_policy

from ovseg_jax import config as config_lib
from ovseg_jax.errors import UserError
from ovseg_jax.files import SUMS_FILE, checksum, is_recorded, read_recorded, write_recorded
from ovseg_jax.parallel.sharding import DEFAULT_RULES, leaf_sharding, path_name
from ovseg_jax.reading import DAMAGE, read_bytes, reading, reason
from ovseg_jax.towers.frozen_text import TEXT_TOWER
from ovseg_jax.towers.prompt_file import FILE as PROMPT_FILE
from ovseg_jax.train.metrics import Sums
from ovseg_jax.train.state import TrainState
from ovseg_jax.vocab.tokenizers import TOKENIZER

CONFIG_FILE = "config.json"
# Upper limit of a checkpoint's bytes beside its arrays.
METADATA_BYTES = 1 << 20
# Arrays that all devices hold are written in slices, one per device. Each shape compiles a slicing program per device,
# so smaller arrays are not sliced.
SLICE_BYTES = 1 << 20
ITEMS = ("variables", "optimizer", "average")
FROZEN, LOG, LOG_FILE = "frozen", "log", "sums.json"
_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run; saving is asynchronous, and its errors are raised by the next call.

    Args:
      workdir: the folder of the run.
      every: save at multiples of this many steps; 0 = only when `save` is called.
      keep: the number of latest checkpoints to keep.
      frozen: path of a variable -> whether it never changes, see `optimizer.freezer`.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        every: int,
        keep: int,
        frozen: Callable[[str], bool] = lambda path: False,
    ):
        self.directory = epath.Path(workdir).absolute() / "checkpoints"
        policies: list[Any] = [save_decision_policy.PreemptionCheckpointingPolicy()]
        if every > 0:
            policies.append(save_decision_policy.FixedIntervalPolicy(every))
        self._frozen, self._frozen_saved, self._saving = frozen, False, ""
        with self._writing():
            _set_aside(self.directory)
            self._manager = ocp.CheckpointManager(
                self.directory,
                item_handlers={item: _handler() for item in ITEMS}
                | {LOG: ocp.JsonCheckpointHandler(LOG_FILE)},
                options=ocp.CheckpointManagerOptions(
                    save_decision_policy=save_decision_policy.AnySavePolicy(policies),
                    preservation_policy=preservation_policy.LatestN(max(keep, 1)),
                    cleanup_tmp_directories=True,
                    # Called after all files are written and before the folder gets its final name.
                    async_options=ocp.AsyncOptions(post_finalization_callback=self._write_sums),
                ),
            )

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def should_save(self, step: int) -> bool:
        """Tells whether to save at `step` (also if preemption is announced, with several processes)."""
        return self._manager.should_save(step)

    def reached_preemption(self, step: int) -> bool:
        """Tells whether all processes have agreed to stop at this step, after one got a signal."""
        return self._manager.reached_preemption(step)

    def save(self, step: int, state: TrainState, sums: Sums | None = None) -> None:
        """Saves the state after `step` steps, and the sums of the metrics since the last record."""
        with self._writing():
            self._check_space(state)
            self._manager.wait_until_finished()
            variables, kept = split(state.variables, self._frozen)
            if kept and not self._frozen_saved:
                self._save_frozen(kept)
            self._saving = str(step)
            items = {"variables": variables, "optimizer": state.opt_state}
            if state.average is not None:
                items["average"] = split({"params": state.average}, self._frozen)[0].get("params", {})
            args = {item: ocp.args.PyTreeSave(tree) for item, tree in items.items()}
            log = ocp.args.JsonSave({name: list(pair) for name, pair in (sums or {}).items()})
            self._manager.save(step, args=ocp.args.Composite(**args, **{LOG: log}), force=True)

    def _save_frozen(self, kept: Any) -> None:
        self._saving = FROZEN
        options = ocp.AsyncOptions(post_finalization_callback=self._write_sums)
        with contextlib.closing(ocp.AsyncCheckpointer(_handler(), async_options=options)) as checkpointer:
            checkpointer.save(self.directory / FROZEN, args=ocp.args.PyTreeSave(kept), force=True)
            checkpointer.wait_until_finished()
        self._frozen_saved = True

    def read_sums(self, step: int) -> Sums:
        """Reads the sums that were saved with a step; {} if there are none."""
        path = self.directory / str(step) / LOG / LOG_FILE
        if not path.exists():
            return {}
        with reading(path):
            return {
                name: (float(total), float(count))
                for name, (total, count) in json.loads(path.read_text()).items()
            }

    def restore(self, target: TrainState, step: int | None = None) -> TrainState:
        """Restores the latest (or the given) checkpoint.

        Args:
          target: shapes and shardings of the state (`abstract_state`), which the result gets.
          step: the step of the checkpoint; by default the latest.

        Raises:
          UserError: names or shapes in the checkpoint differ from those of `target`; the message lists both.
        """
        step = self._manager.latest_step() if step is None else step
        if step is None:
            raise UserError(f"{self.directory} holds no checkpoint.")
        folder = self.directory / str(step)
        own, kept = split(target.variables, self._frozen)
        variables = _restore(folder / "variables", own)
        if kept:
            variables = merged(variables, _restore(self.directory / FROZEN, kept))
            self._frozen_saved = True
        average = None
        if target.average is not None:
            own = split({"params": target.average}, self._frozen)[0]
            average = {"params": _restore(folder / "average", own["params"])}
            average = merged({"params": variables["params"]}, average)["params"]
        opt_state = _restore(folder / "optimizer", target.opt_state)
        return TrainState(
            step=jax.device_put(jnp.asarray(step, jnp.int32), target.step.sharding),
            params=variables.pop("params"),
            model_state=variables,
            opt_state=opt_state,
            average=average,
        )

    def wait(self) -> None:
        """Waits until saved data is on disk."""
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Finishes the last save and stops the background threads."""
        with self._writing():
            self._manager.close()

    def _check_space(self, state: TrainState) -> None:
        """Raises an error before writing if a local disk has too little space."""
        if "://" in str(self.directory):
            return
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) // jax.process_count() + METADATA_BYTES
        if shutil.disk_usage(self.directory).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _write_sums(self) -> None:
        """Writes `checksums.json` into the checkpoint that is about to be complete."""
        if "://" in str(self.directory):  # Buckets keep checksums themselves.
            return
        for folder in Path(self.directory).glob(f"{self._saving}.orbax-checkpoint-tmp*"):
            # Orbax still writes its own metadata after this call.
            files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "_CHECKPOINT_METADATA")
            sums = {path.relative_to(folder).as_posix(): checksum(path) for path in files}
            if self._frozen_saved and self._saving != FROZEN:
                sums[FROZEN] = checksum(self.directory / FROZEN / SUMS_FILE)
            (folder / SUMS_FILE).write_text(json.dumps(sums, indent=1))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if is_disk_full(error):
                raise UserError(disk_full_message(self.directory)) from error
            raise


def read_run(workdir: epath.PathLike) -> ConfigDict:
    """Reads the config of a run, with the paths of its stages and of its own copies of text tower and tokeniser.

    Raises:
      UserError: the folder holds no run.
    """
    config = read_config(workdir)
    if config is None:
        folder = epath.Path(workdir)
        why = f"{CONFIG_FILE} is missing" if folder.is_dir() else "it is a file"
        raise UserError(f"{workdir} holds no run: {why if folder.exists() else 'it does not exist'}.")
    return with_own_text(config_lib.resolved(config, workdir), workdir)


def load_variables(
    workdir: epath.PathLike,
    step: int | None = None,
    *,
    mesh: Mesh | None = None,
    rules: Iterable[Sequence[str]] = DEFAULT_RULES,
    averaged: bool = True,
) -> tuple[dict[str, Any], int]:
    """Reads the variables of a run, without the optimiser's state.

    Args:
      workdir: the run's folder or bucket.
      step: the step of the checkpoint; by default the newest undamaged one.
      mesh: the mesh for the variables; None returns NumPy arrays.
      rules: the sharding rules on that mesh.
      averaged: take the averaged parameters of a run that keeps them.

    Returns:
      (variables, step).

    Raises:
      UserError: there is no checkpoint, or none of that step.
    """
    directory = epath.Path(workdir).absolute() / "checkpoints"
    items = ("variables", "average") if averaged else ("variables",)
    step = find_step(directory, step, items)

    def restore(item: epath.Path, prefix: tuple[Any, ...] = ()) -> Any:
        def target(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
            sharding: jax.sharding.Sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            if mesh is not None:
                sharding = leaf_sharding(path_name((*prefix, *path)[1:]), leaf.shape, mesh, rules)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return _restore(item, jax.tree.map_with_path(target, _saved_arrays(item)))

    variables = restore(directory / str(step) / "variables")
    if (directory / FROZEN).exists():
        variables = merged(variables, restore(directory / FROZEN))
    average = directory / str(step) / "average"
    if averaged and average.exists():
        params = restore(average, (jax.tree_util.DictKey("params"),))
        variables = merged(variables, {"params": params})
    return jax.device_get(variables) if mesh is None else variables, step


def with_own_text(config: ConfigDict, workdir: epath.PathLike) -> ConfigDict:
    """Returns the config with the paths of the run's own copies of tokeniser, frozen text tower and prompt."""
    tower, tokenizer = epath.Path(workdir) / TEXT_TOWER, epath.Path(workdir) / TOKENIZER
    config = ConfigDict(config.to_dict())
    if (tower / CONFIG_FILE).exists():
        config.text.init = str(tower)
        if (tower / PROMPT_FILE).exists():
            config.text.prompt = str(tower / PROMPT_FILE)
    if tokenizer.exists():
        # Without the key, the first two read the tokeniser beside their weights.
        for section in ("towers", "groupvit", "text"):
            if section in config and (section != "text" or "tokenizer" in config.text):
                config[section].tokenizer = str(tokenizer)
    return config


def split(
    variables: Mapping[str, Any], frozen: Callable[[str], bool]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a tree of variables into trained and frozen ones."""
    flat = flatten_dict(dict(variables), keep_empty_nodes=True)
    kept = {
        path: leaf
        for path, leaf in flat.items()
        if frozen("/".join(path[1:] if path[0] == "params" else path))
    }
    own = {path: leaf for path, leaf in flat.items() if path not in kept}
    return unflatten_dict(own), unflatten_dict(kept)


def merged(variables: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Merges two trees of variables; leaves of the second replace those of the first."""
    flat = [flatten_dict(dict(tree), keep_empty_nodes=True) for tree in (variables, others)]
    return unflatten_dict(flat[0] | flat[1])


def find_step(directory: epath.Path, step: int | None = None, items: Sequence[str] = ITEMS) -> int:
    """Returns the step of the newest undamaged checkpoint, or checks that of `step`.

    Args:
      directory: the folder `checkpoints` of a run.
      step: the requested step, or None.
      items: the parts that must be undamaged.

    Raises:
      UserError: there is none, or that of `step` is missing or damaged.
    """
    steps = checkpoint_steps(directory)
    if not steps:
        raise UserError(f"{directory.parent} holds no complete checkpoint yet.")
    if step is not None:
        if step not in steps:
            raise UserError(f"{directory.parent} has no checkpoint of step {step}; it has {steps}.")
        if problem := find_damage(directory / str(step), items):
            raise UserError(f"the checkpoint {directory / str(step)} is damaged: {problem}.")
        return step
    damaged: list[str] = []
    for step in reversed(steps):
        if (problem := find_damage(directory / str(step), items)) is None:
            for line in damaged:
                _log.warning("%s; step %d is used instead", line, step)
            return step
        damaged.append(f"the checkpoint {directory / str(step)} is damaged: {problem}")
    raise UserError(f"{directory.parent} holds no undamaged checkpoint: {'; '.join(damaged)}.")


def checkpoint_steps(directory: epath.Path) -> list[int]:
    """Lists the steps of a run's checkpoints, damaged or not, in order; other files and folders are ignored."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if _is_number(path.name) and _is_ours(path))


def find_damage(folder: epath.Path, items: Sequence[str] = ITEMS) -> str | None:
    """Describes the damage of a checkpoint's files; None if there is none. Optional parts may be absent."""
    if "://" in str(folder):
        return None
    try:
        sums = json.loads(read_bytes(folder / SUMS_FILE))
        files = {name: tuple(known) for name, known in sums.items() if name.split("/")[0] in items}
        if not any(name.startswith("variables/") for name in files):
            raise ValueError("it lists no file of the variables")
        if problem := _find_altered(folder, files):
            return problem
        if FROZEN in sums:
            frozen = folder.parent / FROZEN
            problem = _find_altered(frozen, {SUMS_FILE: tuple(sums[FROZEN])})
            problem = problem or _find_altered(frozen, json.loads(read_bytes(frozen / SUMS_FILE)))
            return problem and f"of {FROZEN}, {problem}"
    except DAMAGE as error:
        return f"{SUMS_FILE} cannot be read ({reason(error)})"
    return None


def _find_altered(folder: epath.Path, files: Mapping[str, Any]) -> str | None:
    for name, known in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (found := checksum(folder / name)) != list(known):
            return f"{name} is " + (
                "altered" if found[0] == known[0] else f"{found[0]} bytes, not {known[0]}"
            )
    return None


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal() and name == str(int(name))


def _is_ours(path: epath.Path) -> bool:
    return path.is_dir() and any((path / name).exists() for name in (SUMS_FILE, *ITEMS))


def _set_aside(directory: epath.Path) -> None:
    """Renames damaged checkpoints, and foreign folders with a checkpoint's name, newer than the newest undamaged one.

    Orbax would take them for checkpoints, and could not write one with the same step. The first process renames them.

    Raises:
      UserError: all checkpoints are damaged.
    """
    problem = ""
    if jax.process_index() == 0 and directory.is_dir() and "://" not in str(directory):
        try:
            newest = find_step(directory) if checkpoint_steps(directory) else -1
            for path in list(directory.iterdir()):
                if _is_number(path.name) and (int(path.name) > newest or not _is_ours(path)):
                    path.rename(directory / f"{path.name}.{'damaged' if _is_ours(path) else 'foreign'}")
        except UserError as error:
            problem = str(error)
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(bool(problem)):
        problem = problem or "the first process found no undamaged checkpoint"
    if problem:
        raise UserError(f"{problem.rstrip('.')}; to start from scratch, delete {directory}.")


def read_config(workdir: epath.PathLike) -> ConfigDict | None:
    """Reads the config of the run in `workdir`; None if there is no run.

    Raises:
      UserError: the file is damaged, or is not a config.
    """
    path = epath.Path(workdir) / CONFIG_FILE
    if not path.exists():
        return None
    text = read_recorded(path)
    try:
        config = config_lib.from_json(text)
    except DAMAGE as error:
        raise UserError(f"{path} is not the config of a run ({reason(error)}).") from error
    if not isinstance(config.get("method"), str):
        raise UserError(f"{path} is not the config of a run (it names no method).")
    return config


def write_config(workdir: epath.PathLike, config: ConfigDict) -> None:
    """Writes `config.json` into `workdir` atomically."""
    path, text = epath.Path(workdir) / CONFIG_FILE, config_lib.to_json(config)
    if not path.exists() or read_bytes(path) != text.encode() or not is_recorded(path):
        write_recorded(path, text)


def is_disk_full(error: BaseException | None) -> bool:
    """Tells whether an exception, or one of its causes, reports that no disk space is left.

    Errors of the array writer, which is C++, carry the system's message but no errno.
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
    """Returns the error message for a full disk."""
    return (
        f"the disk is full while writing to {directory}; complete checkpoints are kept: free some space and "
        "run the same command to continue from the last one."
    )


def _handler() -> ocp.PyTreeCheckpointHandler:
    """Returns an Orbax handler with a type registry of its own, so that the global one is not changed."""
    types = ocp.type_handlers
    arrays = types.ArrayHandler(min_slice_bytes_for_replica_parallel=SLICE_BYTES)
    pairs = ((jax.Array, arrays), (np.ndarray, types.NumpyHandler()))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=types.create_type_handler_registry(*pairs))


def _restore(item: epath.Path, target: Any) -> Any:
    """Reads one item of a checkpoint as the arrays that `target` describes."""
    _check_same(item, target)
    args = ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))
    try:
        return _handler().restore(item, args=args)
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{item} cannot be read as part of a checkpoint ({_first_line(error)}).") from error


def _saved_arrays(item: epath.Path) -> Any:
    """Returns the shapes and dtypes of one item of a checkpoint, in nested dicts and lists."""
    try:
        # A checkpointer would warn that a single item lacks a checkpoint's metadata.
        saved: Any = _handler().metadata(item)
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{item} cannot be read as part of a checkpoint ({_first_line(error)}).") from error
    if saved is None:
        raise UserError(f"{item} cannot be read as part of a checkpoint.")
    return saved.tree


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


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
        parts.append(f"it has {_listing(extra)}, which this config lacks")
    if other:
        parts.append("shapes differ: " + _listing([f"{n} {saved[n]} there, {wanted[n]} here" for n in other]))
    raise UserError(f"{item} belongs to another config: {'; '.join(parts)}.")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}


def _listing(names: Sequence[str], limit: int = 8) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
