"""Commands whose flags are absl's, run in the process of the test."""

import contextlib
import io
import logging
import os
import subprocess
import sys
from unittest import mock

import jax
from absl import flags
from absl.testing import flagsaver


def run_command(main, *arguments):
    """Calls a command's `main` with arguments; returns its exit status and what it printed.

    Flags, logging, environment and JAX's settings are as before afterwards.
    """
    argv = ["command", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    loggers = logging.getLogger(), logging.getLogger("ovseg_jax")
    with contextlib.ExitStack() as stack:
        for name in ("jax_enable_compilation_cache", "jax_platforms"):
            stack.callback(jax.config.update, name, getattr(jax.config, name))
        for logger in loggers:
            stack.enter_context(
                mock.patch.multiple(
                    logger, handlers=list(logger.handlers), level=logger.level, propagate=logger.propagate
                )
            )
        if not flags.FLAGS.is_parsed():
            stack.callback(flags.FLAGS.unparse_flags)
        stack.enter_context(flagsaver.flagsaver())
        stack.enter_context(mock.patch.object(sys, "argv", argv))
        stack.enter_context(mock.patch.dict(os.environ))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            main()
        except SystemExit as stop:
            return subprocess.CompletedProcess(argv, stop.code, out.getvalue(), err.getvalue())
