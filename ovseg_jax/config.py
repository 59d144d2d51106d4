"""Configs: the `key=value,...` argument of `get_config(arg)`, and configs as JSON."""

import difflib
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError

BEFORE = "before:"
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
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
    """The config that `to_json` wrote."""
    return ConfigDict(json.loads(text))


def resolved(config: ConfigDict, workdir: epath.PathLike) -> ConfigDict:
    """The config with each "before:PATH" as that path in the folder of the run: what a stage of `before` has left."""
    return ConfigDict(_replaced(config.to_dict(), lambda path: str(epath.Path(workdir) / path)))


def needed(config: ConfigDict) -> set[str]:
    """The stages that a config speaks of."""
    paths: list[str] = []
    _replaced(config.to_dict(), lambda path: paths.append(path))
    return {path.split("/")[0] for path in paths}


def _replaced(value: Any, replace: Callable[[str], Any]) -> Any:
    """A tree with `replace(PATH)` in the place of each "before:PATH"."""
    if isinstance(value, dict):
        return {key: _replaced(inner, replace) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_replaced(inner, replace) for inner in value)
    if isinstance(value, str) and value.startswith(BEFORE):
        return replace(value.removeprefix(BEFORE))
    return value
