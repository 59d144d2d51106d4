"""Configs: the `key=value,...` argument of `get_config(arg)`, and configs as JSON."""

import difflib
import importlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.reading import DAMAGE

STAGE = "stage:"
STAGE_KINDS = ("train", "pseudo_label", "annotate")
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


class AtLeast(NamedTuple):
    """A number as the default of a key, and the least that the key may have."""

    default: int
    least: int


class Args:
    """The values of a config's argument as attributes; remembers which of them were read."""

    def __init__(self, values: Mapping[str, Any], given: Collection[str], choices: Collection[str] = ()):
        self._values, self._given, self._choices = dict(values), given, choices
        self._read: set[str] = set()

    def __getattr__(self, key: str) -> Any:
        if key.startswith("_") or key not in self._values:
            raise AttributeError(key)
        self._read.add(key)
        return self._values[key]

    def check_read(self) -> None:
        """Raises a UserError for a key that was given and that nothing has read: the run would be another one."""
        for key in self._given:
            if key not in self._read:
                reasons = [k for k in self._given if k in self._read] or [
                    k for k in self._choices if k in self._read
                ]
                others = ",".join(f"{k}={self._values[k]}" for k in reasons)
                raise UserError(
                    f"{key}={self._values[key]} has no effect with {others}: "
                    f"keys that have one are {', '.join(sorted(self._read))}"
                )


def parse_arg(arg: str | None, **defaults: Any) -> Args:
    """Parses `"data=coco,size=tiny"`; each value gets the type of its default.

    Args:
      arg: the text behind the colon of `--config=FILE.py:ARG`, or None. A bare `key` means `key=true`. A value runs
        to the next `,key=` or the end, so a path may hold commas.
      **defaults: the known keys. A tuple lists the values that a key may have, the default first; `AtLeast` bounds it.

    Returns:
      A value for each key of `defaults`. A config ends by `check_read()`.

    Raises:
      UserError: an unknown key (the message lists the known ones) or value, or a value of the wrong type.
    """
    values = {key: value[0] if isinstance(value, tuple) else value for key, value in defaults.items()}
    given: dict[str, Any] = {}
    for item in _split(arg or "", defaults):
        key, _, text = item.partition("=")
        key = key.strip()
        if key not in defaults:
            raise UserError(unknown_key(key, defaults))
        given[key] = _typed(key, text if "=" in item else "true", defaults[key])
    choices = [key for key, value in defaults.items() if isinstance(value, tuple)]
    return Args({**values, **given}, given.keys(), choices)


def unknown_key(key: str, known: Collection[str]) -> str:
    """Returns the sentence for a key that does not exist, "optimizer.rate" beside the `known` ones of its section."""
    close = difflib.get_close_matches(key.rpartition(".")[2], known, 1)
    hint = f" (did you mean '{close[0]}'?)" if close else ""
    return f"unknown config key '{key}'{hint}; known keys: {', '.join(sorted(known))}"


def import_class(name: Any, base: type, what: str, known: Iterable[str]) -> Any:
    """Imports the class "module:Class", which derives from `base`.

    Args:
      name: "module:Class".
      base: what it has to derive from.
      what: what it is called in errors.
      known: the names that stand for classes of ours, for errors.

    Raises:
      UserError: there is no such class, or it does not derive from `base`.
    """
    module, colon, attribute = str(name).partition(":")
    if not colon:
        raise UserError(f"the {what} {name!r} is not one of {', '.join(known)}, and no 'module:Class'")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"the {what} {name!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(f"{name!r} is no {what}: it does not derive from {base.__module__}.{base.__name__}")
    return found


def keys(names: str, effect: bool = True) -> dict[str, bool]:
    """Returns the keys of a section as `experiment.keys` takes them: whether each has an effect."""
    return dict.fromkeys(names.split(), effect)


def _split(arg: str, known: dict[str, Any]) -> list[str]:
    items: list[str] = []
    for part in (p for p in arg.split(",") if p.strip()):
        if items and "=" not in part and part.strip() not in known:
            items[-1] += "," + part
        else:
            items.append(part)
    return items


def _typed(key: str, text: str, default: Any) -> Any:
    if isinstance(default, AtLeast):
        value = _typed(key, text, default.default)
        if value < default.least:
            raise UserError(f"{key}={text}: the least is {default.least}")
        return value
    kind = type(default)
    if kind is tuple:
        if text in default:
            return text
        raise UserError(f"{key}={text}: known are {', '.join(filter(None, default))}")
    if kind is bool:
        if text.lower() in _TRUE + _FALSE:
            return text.lower() in _TRUE
    elif kind is str:
        return text
    else:
        try:
            return kind(text)
        except ValueError:
            pass
    raise UserError(f"config key '{key}' takes a {kind.__name__}, not '{text}'")


def to_json(config: ConfigDict) -> str:
    """The resolved config as indented JSON with sorted keys."""
    return json.dumps(_plain(config), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
    """The config that `to_json` wrote."""
    return ConfigDict(json.loads(text))


def _plain(value: Any) -> Any:
    """Dicts and lists in place of ConfigDicts and tuples, those inside lists too."""
    if isinstance(value, Mapping | ConfigDict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def stages_of(config: ConfigDict) -> dict[str, ConfigDict]:
    """Returns the stages of a config by their names, each with `kind` and `config`.

    Raises:
      UserError: `config.stages` is not a list of dict(name, kind, config), or two have one name.
    """
    stages: dict[str, ConfigDict] = {}
    for stage in config.get("stages") or ():
        try:
            name, kind, own = stage["name"], stage["kind"], ConfigDict(_plain(stage["config"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"config.stages: each is dict(name=..., kind=..., config=...) ({error})"
            ) from error
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in stages:
            raise UserError(f"config.stages: {name!r} is no name of a stage, or two have it")
        if kind not in STAGE_KINDS:
            raise UserError(f"config.stages: {name} is of kind {kind!r}; known are {', '.join(STAGE_KINDS)}")
        stages[name] = ConfigDict({"kind": kind, "config": own})
    return stages


def resolved(config: ConfigDict, workdir: epath.PathLike) -> ConfigDict:
    """Returns the config of a run with each "stage:NAME/..." as that path in the folder of the stage.

    A name is one of the run's own stages, or else one of the run that it is a stage of, and so on outward. The stages'
    own configs stay as they are: each is resolved when it runs.

    Raises:
      UserError: there is no stage of that name.
    """
    places = _places(config, epath.Path(workdir))

    def place(path: str) -> str:
        name, slash, rest = path.partition("/")
        if name not in places:
            raise UserError(
                f"{STAGE}{path}: there is no stage {name!r}; known are {', '.join(places) or 'none'}"
            )
        return str(places[name]) + slash + rest

    own = _plain(config)
    stages = own.pop("stages", None)
    return ConfigDict(_replaced(own, place) | ({} if stages is None else {"stages": stages}))


def needed(config: ConfigDict) -> set[str]:
    """Returns the outer stages that a config names; those that its own stages name count too."""
    own = stages_of(config)
    paths: list[str] = []
    _replaced({k: v for k, v in _plain(config).items() if k != "stages"}, paths.append)
    names = {path.split("/")[0] for path in paths}.union(*(needed(stage.config) for stage in own.values()))
    return names - own.keys()


def _places(config: ConfigDict, workdir: epath.Path) -> dict[str, epath.Path]:
    """The folders of the stages that a run can name: its own, and those of the runs around it."""
    places = {name: workdir / name for name in stages_of(config)}
    outer = workdir.absolute().parent / "config.json"
    if outer.exists():
        try:
            around = from_json(outer.read_text())
            inside = workdir.absolute().name in stages_of(around)
        except (*DAMAGE, UserError):
            return places  # The folder beside is no run's.
        if inside:
            places = _places(around, workdir.parent) | places
    return places


def _replaced(value: Any, replace: Callable[[str], Any]) -> Any:
    """A tree with `replace(PATH)` in the place of each "stage:PATH"."""
    if isinstance(value, dict):
        return {key: _replaced(inner, replace) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replaced(inner, replace) for inner in value]
    if isinstance(value, str) and value.startswith(STAGE):
        return replace(value.removeprefix(STAGE))
    return value
