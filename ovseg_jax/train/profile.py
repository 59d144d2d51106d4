"""A trace of some steps, for XProf: `tensorboard --logdir=WORKDIR/profile`, or xprof.dev."""

import re
from collections.abc import Callable
from types import TracebackType

import jax
from etils import epath

from ovseg_jax.errors import UserError


class Profile:
    """Traces the steps from `first` on, before `stop`, while it is entered. Each process traces its own devices.

    Args:
      steps: "FIRST:STOP", such as "100:105"; "" for no trace.
      workdir: gets the folder `profile`.

    Raises:
      UserError: the steps are no such pair.
    """

    def __init__(self, steps: str, workdir: epath.PathLike):
        self._folder = epath.Path(workdir) / "profile"
        self._first, self._stop, self._running = -1, -1, False
        if steps:
            numbers = re.fullmatch(r"(\d+):(\d+)", steps)
            if not numbers or int(numbers[1]) >= int(numbers[2]):
                raise UserError(f'profile="{steps}" is no FIRST:STOP, the steps to trace, such as 100:105.')
            self._first, self._stop = int(numbers[1]), int(numbers[2])

    def at(self, step: int, finish: Callable[[], None]) -> None:
        """Called before the step after `step` steps; `finish` waits for those that are under way."""
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
