"""Stages of a run, which run before it, each in a folder of its own, WORKDIR/<name>.

`config.stages` is a list of dict(name, kind, config). A stage that refers to another one, as "stage:NAME" or
"stage:NAME/FILE", runs after it; a stage may have stages of its own. `stage.json` in its folder marks it as
finished and holds its config.

    train         a run, see `experiment.run`
    pseudo_label  writes a teacher's masks for the images of a source, see `inference.pseudo_masks.label_stage`
    pseudo_label_maps  writes label maps for them, see `inference.pseudo_label_maps.label_map_stage`
    cluster       writes masks of their clusters, without a teacher, see `inference.cluster_masks.cluster_stage`
    annotate      annotates them by other models, see `annotation.stage.annotate_stage`
"""

import hashlib
import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from ovseg_jax import config as config_lib
from ovseg_jax.config import needed, stages_of
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.changes import config_differences, may_change
from ovseg_jax.files import read_recorded, write_recorded
from ovseg_jax.reading import DAMAGE, reason

MARKER = "stage.json"
# Stages that packages above this one implement, called as (folder, **resolved config); for the result see `Runner`.
_ELSEWHERE = {
    "pseudo_label": "ovseg_jax.inference.pseudo_masks:label_stage",
    "pseudo_label_maps": "ovseg_jax.inference.pseudo_label_maps:label_map_stage",
    "cluster": "ovseg_jax.inference.cluster_masks:cluster_stage",
    "annotate": "ovseg_jax.annotation.stage:annotate_stage",
}

# (config, folder) -> a dict, with "stopped" if it was stopped by a signal.
Runner = Callable[[ConfigDict, epath.Path], Mapping[str, Any]]


def run_stages(config: ConfigDict, workdir: epath.Path, train: Runner) -> bool:
    """Runs the unfinished stages of `config`; returns False if one was stopped by a signal.

    Raises:
      UserError: stages depend on each other in a circle, or a stage fails.
    """
    waiting = stages_of(config)
    while waiting:
        name = next((n for n, stage in waiting.items() if not needed(stage.config) & waiting.keys()), None)
        if name is None:
            raise UserError(
                f"config.stages: {', '.join(waiting)} depend on each other, or on themselves, in a circle"
            )
        stage, folder = waiting.pop(name), workdir / name
        if (folder / MARKER).exists():
            continue
        if jax.process_index() == 0:
            print(f"running the stage {name} in {folder} first", flush=True)
        if _runner(stage.kind, train)(stage.config, folder).get("stopped"):
            return False
        if jax.process_index() == 0:
            marker = {"hash": _hash(stage), "kind": stage.kind, "config": stage.config.to_dict()}
            write_recorded(folder / MARKER, json.dumps(marker, indent=1) + "\n")
        multihost_utils.sync_global_devices("the first process has written a whole stage")
    return True


def check_finished(config: ConfigDict, workdir: epath.Path) -> None:
    """Compares each finished stage with its config, before anything is run or written.

    Raises:
      UserError: they differ; the message names the keys.
    """
    for name, stage in stages_of(config).items():
        path = workdir / name / MARKER
        if not path.exists():
            continue
        try:
            marker = json.loads(read_recorded(path))
            differing = [] if marker["hash"] == _hash(stage) else _differences(marker, stage)
        except DAMAGE as error:
            again = f"delete {path.parent} to run that stage again"
            raise UserError(f"{path} cannot be read ({reason(error)}); {again}") from error
        if differing:
            raise UserError(
                f"the stage {name} in {path.parent} was finished with another config: {'; '.join(differing)}. Choose "
                "another --workdir, or delete that folder and everything made from it."
            )


def check_keys(stage: ConfigDict, where: str) -> None:
    """Checks that the config of a stage has the keys that its kind needs, and no others.

    Args:
      stage: a stage of any kind but "train".
      where: its place in the config around it, for errors.

    Raises:
      UserError: names an unknown or a missing key.
    """
    _, *parameters = inspect.signature(_function(stage.kind)).parameters.values()
    known = {parameter.name: parameter.default is parameter.empty for parameter in parameters}
    for key in stage.config:
        if key not in known:
            raise UserError(config_lib.unknown_key(f"{where}.{key}", known))
    if missing := [key for key, required in known.items() if required and key not in stage.config]:
        raise UserError(f"{where} of kind {stage.kind!r} needs {missing[0]}=")


def _runner(kind: str, train: Runner) -> Runner:
    if kind == "train":
        return train
    return lambda config, folder: _function(kind)(folder, **config_lib.resolved(config, folder).to_dict())


def _function(kind: str) -> Callable[..., Mapping[str, Any]]:
    module, _, function = _ELSEWHERE[kind].partition(":")
    return getattr(importlib.import_module(module), function)


def _differences(before: Any, now: ConfigDict) -> list[str]:
    """Returns the differences between a stage's finished config and its config now."""
    found = [] if before["kind"] == now.kind else [f"kind was {before['kind']}, is {now.kind}"]
    old = ConfigDict(before["config"])
    found += config_differences(old, now.config, grow=False)
    inner, own = stages_of(old), stages_of(now.config)
    if list(inner) != list(own):
        found.append(f"its stages were {', '.join(inner) or 'none'}, are {', '.join(own) or 'none'}")
    return found + [
        f"{name}.{line}"
        for name in inner.keys() & own.keys()
        for line in _differences(inner[name], own[name])
    ]


def _hash(stage: ConfigDict) -> str:
    """Returns a hash of the kind and the config of a stage, without keys that may change."""

    def kept(config: ConfigDict) -> dict[str, Any]:
        own = {k: v for k, v in json.loads(config_lib.to_json(config)).items() if k != "stages"}
        inner = {name: [s.kind, kept(s.config)] for name, s in stages_of(config).items()}
        return {"config": _without_mutable(own), "stages": inner}

    text = json.dumps([stage.kind, kept(stage.config)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _without_mutable(tree: Any, prefix: str = "") -> Any:
    if not isinstance(tree, dict):
        return tree
    paths = {key: f"{prefix}.{key}" if prefix else key for key in tree}
    return {k: _without_mutable(v, paths[k]) for k, v in tree.items() if not may_change(paths[k])}
