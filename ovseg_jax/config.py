"""Configs: the `key=value,...` argument of `get_config(arg)`, and configs as JSON."""

import difflib
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError

BEFORE = "before:"
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
    """Parses `"data=coco,size=tiny"`; each value gets the type of its default.

    Args:
      arg: the text behind the colon of `--config=FILE.py:ARG`, or None. A bare `key` means `key=true`. A value runs
        to the next `,key=` or the end, so a path may hold commas.
      **defaults: the known keys.

    Returns:
      A ConfigDict with a value for each key of `defaults`.

    Raises:
      UserError: an unknown key (the message lists the known ones) or a value of the wrong type.
    """
    values = dict(defaults)
    for item in _split(arg or "", defaults):
        key, _, text = item.partition("=")
        key = key.strip()
        if key not in defaults:
            close = difflib.get_close_matches(key, defaults, 1)
            hint = f" (did you mean '{close[0]}'?)" if close else ""
            raise UserError(f"unknown config key '{key}'{hint}; known keys: {', '.join(sorted(defaults))}")
        values[key] = _typed(key, text if "=" in item else "true", defaults[key])
    return ConfigDict(values)


def check_read(args: ConfigDict, defaults: Mapping[str, Any], read: Collection[str], when: str) -> None:
    """Raises a UserError for a key that was set and that nothing reads: a run would silently be another one.

    Args:
      args: of `parse_arg`.
      defaults: those that it had.
      read: the keys that have a meaning here.
      when: what makes it so, as "data=scenes".
    """
    for key, default in defaults.items():
        if key not in read and args[key] != default:
            raise UserError(f"{key}={args[key]} means nothing with {when}: known are {', '.join(read)}")


def _split(arg: str, known: dict[str, Any]) -> list[str]:
    items: list[str] = []
    for part in (p for p in arg.split(",") if p.strip()):
        if items and "=" not in part and part.strip() not in known:
            items[-1] += "," + part
        else:
            items.append(part)
    return items


def _typed(key: str, text: str, default: Any) -> Any:
    kind = type(default)
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
