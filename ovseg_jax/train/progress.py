"""Progress of a run on stderr: a bar on a terminal, occasional lines elsewhere."""

import sys
import time
from typing import Any

from tqdm import tqdm


class Progress:
    """A display of step, loss, images/s and time left, on stderr.

    Args:
      total: steps of the run.
      start: steps already done.
      show: False on all processes but the first.
      every: seconds between lines if there is no terminal.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        show: bool = True,
        every: float = 10.0,
        file: Any = None,
    ):
        self._file = sys.stderr if file is None else file
        self._total, self._start, self._every, self._show = total, start, every, show
        self._began = self._said = time.monotonic()
        self._bar = None
        if show and self._file.isatty():
            self._bar = tqdm(
                total=total, initial=start, unit="step", dynamic_ncols=True, file=self._file, smoothing=0.1
            )

    def update(self, step: int, loss: float, images_per_second: float) -> None:
        """Shows a finished step."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}, {images_per_second:.1f} images/s", refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if self._show and (now - self._said >= self._every or step == self._total):
            self._said = now
            left = (now - self._began) / max(step - self._start, 1) * (self._total - step)
            rate = f"{images_per_second:.1f} images/s"
            self.say(f"step {step}/{self._total}, loss {loss:.3f}, {rate}, {clock(left)} left")

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if not self._show:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._file)
        else:
            print(text, file=self._file, flush=True)

    def close(self) -> None:
        """Closes the bar and leaves it visible."""
        if self._bar is not None:
            self._bar.close()


def clock(seconds: float | int) -> str:
    """Formats seconds as `h:mm:ss` or `m:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
