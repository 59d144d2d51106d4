"""Config arguments (`get_config("key=value,...")`), stages of a run, and configs as JSON."""

import difflib
import importlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.reading import DAMAGE, read_bytes

STAGE = "stage:"
STAGE_KINDS = ("train", "pseudo_label", "pseudo_label_maps", "cluster", "annotate")
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


class AtLeast(NamedTuple):
    """The default of a numeric key, with the smallest value that the key accepts."""

    default: int
    least: int


class Args:
    """The values of a config's argument as attributes, with a record of which were read."""

    def __init__(self, values: Mapping[str, Any], given: Collection[str], choices: Collection[str] = ()):
        self._values, self._given, self._choices = dict(values), given, choices
        self._read: set[str] = set()

    def __getattr__(self, key: str) -> Any:
        if key.startswith("_") or key not in self._values:
            raise AttributeError(key)
        self._read.add(key)
        return self._values[key]

    def changed(self, **values: Any) -> "Args":
        """Returns a copy with other values; a key that is read there counts as read here."""
        other = Args({**self._values, **values}, self._given, self._choices)
        other._read = self._read
        return other

    def check_read(self) -> None:
        """Raises a UserError for a key that was given but never read, and so has no effect."""
        for key in self._given:
            if key not in self._read:
                reasons = [k for k in self._given if k in self._read] or [
                    k for k in self._choices if k in self._read
                ]
                others = ",".join(f"{k}={self._values[k]}" for k in reasons)
                raise UserError(
                    f"{key}={self._values[key]} has no effect with {others}: "
                    f"keys that have an effect are {', '.join(sorted(self._read))}"
                )


def parse_arg(arg: str | None, **defaults: Any) -> Args:
    """Parses a config argument such as `"data=coco,size=tiny"`; each value gets the type of its default.

    Args:
      arg: the text after the colon of `--config=FILE.py:ARG`, or None. A bare `key` means `key=true`. A value runs
        to the next `,key=` or the end, so a path may hold commas.
      **defaults: the known keys. A tuple lists the values that a key may have, the default first; `AtLeast` gives a
        lower bound.

    Returns:
      A value for each key of `defaults`; `get_config` calls its `check_read()` at the end.

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
    """Returns the error message for an unknown key, with the `known` keys of its section."""
    close = difflib.get_close_matches(key.rpartition(".")[2], known, 1)
    hint = f" (did you mean '{close[0]}'?)" if close else ""
    return f"unknown config key '{key}'{hint}; known keys: {', '.join(sorted(known))}"


def import_class(name: Any, base: type, what: str, known: Iterable[str]) -> Any:
    """Imports a class named "module:Class" and checks that it derives from `base`.

    Args:
      name: "module:Class".
      base: the required base class.
      what: the role of the class in errors, such as "method".
      known: the built-in names, for errors.

    Raises:
      UserError: there is no such class, or it does not derive from `base`.
    """
    module, colon, attribute = str(name).partition(":")
    if not colon:
        raise UserError(
            f"the {what} {name!r} is not one of {', '.join(known)}, nor of the form 'module:Class'"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"the {what} {name!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(f"the {what} {name!r} does not derive from {base.__module__}.{base.__name__}")
    return found


def keys(names: str, effect: bool = True) -> dict[str, bool]:
    """Returns a dict from the keys of a section to whether they have an effect, for `experiment.keys`."""
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
            raise UserError(f"{key}={text}: the smallest allowed value is {default.least}")
        return value
    kind = type(default)
    if kind is tuple:
        if text in default:
            return text
        raise UserError(f"{key}={text}: known values are {', '.join(filter(None, default))}")
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
    """Returns the resolved config as indented JSON with sorted keys."""
    return json.dumps(_plain(config), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
    """Parses a config that `to_json` wrote."""
    return ConfigDict(json.loads(text))


def _plain(value: Any) -> Any:
    """Converts ConfigDicts and tuples, also inside lists, to dicts and lists."""
    if isinstance(value, Mapping | ConfigDict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def stages_of(config: ConfigDict) -> dict[str, ConfigDict]:
    """Returns the stages of a config by name, each with `kind` and `config`.

    Raises:
      UserError: `config.stages` is not a list of dict(name, kind, config), or two have one name.
    """
    stages: dict[str, ConfigDict] = {}
    for stage in config.get("stages") or ():
        try:
            name, kind, own = stage["name"], stage["kind"], ConfigDict(_plain(stage["config"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"config.stages: each stage is dict(name=..., kind=..., config=...) ({error})"
            ) from error
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in stages:
            raise UserError(
                f"config.stages: the name {name!r} is used twice, or has other characters than letters, digits, _, -"
            )
        if kind not in STAGE_KINDS:
            raise UserError(
                f"config.stages: {name} has the kind {kind!r}; known kinds: {', '.join(STAGE_KINDS)}"
            )
        stages[name] = ConfigDict({"kind": kind, "config": own})
    return stages


def resolved(config: ConfigDict, workdir: epath.PathLike) -> ConfigDict:
    """Returns the config with each "stage:NAME/..." replaced by that path in the folder of the stage.

    A name is looked up among the run's own stages, then among those of the run that contains it, and so on outward.
    The configs of the stages are left alone: each is resolved when it runs.

    Raises:
      UserError: there is no stage of that name.
    """
    places = _places(config, epath.Path(workdir))

    def place(path: str) -> str:
        name, slash, rest = path.partition("/")
        if name not in places:
            raise UserError(
                f"{STAGE}{path}: there is no stage {name!r}; known stages: {', '.join(places) or 'none'}"
            )
        return str(places[name]) + slash + rest

    own = _plain(config)
    stages = own.pop("stages", None)
    return ConfigDict(_replaced(own, place) | ({} if stages is None else {"stages": stages}))


def needed(config: ConfigDict) -> set[str]:
    """Returns the names of the outer stages that a config, or one of its own stages, refers to."""
    own = stages_of(config)
    paths: list[str] = []
    _replaced({k: v for k, v in _plain(config).items() if k != "stages"}, paths.append)
    names = {path.split("/")[0] for path in paths}.union(*(needed(stage.config) for stage in own.values()))
    return names - own.keys()


def _places(config: ConfigDict, workdir: epath.Path) -> dict[str, epath.Path]:
    """Returns the folders of the stages that a run can name: its own and those of the runs that contain it."""
    places = {name: workdir / name for name in stages_of(config)}
    outer = workdir.absolute().parent / "config.json"
    if outer.exists():
        try:
            around = from_json(read_bytes(outer).decode())
            inside = workdir.absolute().name in stages_of(around)
        except (*DAMAGE, UserError):
            return places  # The outer folder does not belong to a run.
        if inside:
            places = _places(around, workdir.parent) | places
    return places


def _replaced(value: Any, replace: Callable[[str], Any]) -> Any:
    """Returns a tree with each "stage:PATH" replaced by `replace(PATH)`."""
    if isinstance(value, dict):
        return {key: _replaced(inner, replace) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replaced(inner, replace) for inner in value]
    if isinstance(value, str) and value.startswith(STAGE):
        return replace(value.removeprefix(STAGE))
    return value
