"""The `--config` flag of the commands that take a config, and its errors as sentences."""

import importlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from ovseg_jax.cli.console import check_addresses, ensure_home, guarded, silence
from ovseg_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="FILE.py, or a config of the library by name; then :key=value,..."
)


def chosen_config() -> ConfigDict:
    """Returns the config of `--config=FILE.py:ARG`, changed by `--config.key=value`.

    Raises:
      UserError: no config is named, there is no such file, or an address in it cannot be read.
    """
    config = _CONFIG.value
    if isinstance(config, ConfigDict):
        check_addresses({"config": config.to_dict()})
        return config
    if config is None:
        raise UserError("--config=FILE.py is missing; --config=openseg is the library's own.")
    path = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
    raise UserError(f"the config file {path} does not exist or cannot be read.")


def shipped_config(argument: str) -> str:
    """Returns `--config=openseg:ARG`, or `--config=configs/openseg.py:ARG`, with the path of the library's own file.

    A file of that name in the current folder comes first, and other arguments are returned as they are.
    """
    flag, equals, value = argument.partition("=")
    path, colon, arg = value.partition(":")
    if flag not in ("--config", "-config") or not path or Path(path).is_file():
        return argument
    name = path.removeprefix("configs/").removesuffix(".py")
    own = [folder / f"{name}.py" for folder in _shipped_folders()]
    return next((f"{flag}{equals}{file}{colon}{arg}" for file in own if file.is_file()), argument)


def _shipped_folders() -> list[Path]:
    package = importlib.import_module("ovseg_jax.configs")  # its files are found, not imported
    return [Path(folder) for folder in package.__path__]


def given_keys() -> list[str]:
    """Returns the keys that `--config.key=value` sets, such as "optimizer.momentum"."""
    return list(config_flags.get_override_values(flags.FLAGS["config"]))


def launch(run: Callable[[list[str]], int]) -> NoReturn:
    """Parses the flags, calls `run` and exits with its status; see `console.guarded`."""

    def call() -> int:
        ensure_home()
        silence()
        try:
            app.run(run, flags_parser=parse)
        except SystemExit as stop:  # absl exits with the value that `run` returned.
            return stop.code if isinstance(stop.code, int) else 0
        return 0

    sys.exit(guarded(call))


def parse(arguments: list[str]) -> list[str]:
    """Parses the flags and returns the arguments that are left over.

    Raises:
      UserError: an unknown flag or config, an unknown key of the config, or a value of the wrong type.
    """
    arguments = [shipped_config(argument) for argument in arguments]
    for argument in arguments:
        flag, _, value = argument.partition("=")
        path = value.partition(":")[0]
        if flag in ("--config", "-config") and path and not Path(path).is_file():
            own = {file.stem for folder in _shipped_folders() for file in folder.glob("*.py")}
            listed = ", ".join(sorted(own - {"__init__", "common"}))
            raise UserError(f"--config={path} is no file, and none of the library's configs: {listed}")
    try:
        return flags.FLAGS(arguments)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        # An error inside the config file keeps its traceback, which shows its author where it is.
        frames = traceback.walk_tb(error.__traceback__)
        if any(frame.f_code.co_name == "get_config" for frame, _ in frames) or "Traceback" in str(error):
            raise
        cause: Any = error
        while isinstance(cause, AttributeError | KeyError) and cause.args:
            cause = cause.args[0]  # An AttributeError may hold a KeyError, whose text would be quoted twice.
        text = str(cause) if cause is error else f"unknown config key {cause}"
        raise UserError(" ".join(text.split())) from error
