"""Being told to stop: SIGTERM and Ctrl-C let the step finish and the state be saved."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import jax


class StopRequest:
    """Watches for SIGTERM and SIGINT while it is entered; the second Ctrl-C interrupts at once.

    With several processes, SIGTERM belongs to JAX's preemption service, which agrees on a step at which all
    of them stop; it is then asked instead of this process's own signals.

    Args:
      reached_preemption: step -> whether all processes stop here; asked with several processes only.
    """

    def __init__(self, reached_preemption: Callable[[int], bool]):
        self._reached_preemption = reached_preemption
        self._told = False
        self._before: dict[int, Any] = {}

    def at(self, step: int) -> bool:
        """Whether to stop after `step` steps."""
        if jax.process_count() > 1:
            return self._reached_preemption(step)
        return self._told

    def __enter__(self) -> "StopRequest":
        # Only the main thread may set handlers; a run in another one is stopped by other means.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._told and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._told = True
