"""Graceful stopping: after SIGTERM or Ctrl-C the step finishes and the state is saved."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import jax


class StopRequest:
    """A context that watches for SIGTERM and SIGINT; a second Ctrl-C interrupts at once.

    With several processes, JAX's preemption service handles SIGTERM in place of this class, and chooses a step at which
    all of them stop.

    Args:
      reached_preemption: step -> whether all processes stop here; only used with several processes.
    """

    def __init__(self, reached_preemption: Callable[[int], bool]):
        self._reached_preemption = reached_preemption
        self._told = False
        self._before: dict[int, Any] = {}

    def at(self, step: int) -> bool:
        """Tells whether to stop after `step` steps."""
        if jax.process_count() > 1:
            return self._reached_preemption(step)
        return self._told

    def __enter__(self) -> "StopRequest":
        # Only the main thread may set handlers; runs in other threads cannot be stopped by signals.
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
