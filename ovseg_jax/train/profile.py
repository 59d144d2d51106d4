"""Traces of training steps for XProf: `tensorboard --logdir=WORKDIR/profile`, or xprof.dev."""

import re
from collections.abc import Callable
from types import TracebackType

import jax
from etils import epath

from ovseg_jax.errors import UserError


class Profile:
    """A context that traces the steps from `first` to before `stop`; each process traces its own devices.

    Args:
      steps: "FIRST:STOP", such as "100:105"; "" for no trace.
      workdir: the folder of the run, for the folder `profile`.

    Raises:
      UserError: `steps` is not of this form.
    """

    def __init__(self, steps: str, workdir: epath.PathLike):
        self._folder = epath.Path(workdir) / "profile"
        self._first, self._stop, self._running = -1, -1, False
        if steps:
            numbers = re.fullmatch(r"(\d+):(\d+)", steps)
            if not numbers or int(numbers[1]) >= int(numbers[2]):
                raise UserError(f'profile="{steps}" is not FIRST:STOP, the steps to trace, such as 100:105.')
            self._first, self._stop = int(numbers[1]), int(numbers[2])

    def at(self, step: int, finish: Callable[[], None]) -> None:
        """Starts or stops the trace if due; called after `step` steps, with `finish` waiting for pending steps."""
        if step == self._first:
            finish()
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif step == self._stop and self._running:
            finish()
            self._end()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
