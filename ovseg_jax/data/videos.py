"""Video files, through PyAV: frames as u8 [H W 3], upright, and MP4 files of pictures. Needs the extra "video"."""

import contextlib
import fractions
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from ovseg_jax.errors import UserError, optional
from ovseg_jax.reading import DAMAGE, reason

SUFFIXES = frozenset((".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"))


def is_video(path: epath.PathLike) -> bool:
    """Tells whether a file's name has the suffix of a video."""
    return epath.Path(path).suffix.lower() in SUFFIXES


class VideoReader:
    """The frames of a video file, in order; the file is opened by each iteration.

    Attributes:
      path: the file.
      fps: its mean number of frames a second; 25 if the file does not say.

    Raises:
      UserError: PyAV is not installed, or the file is missing, not a video or damaged; or, when the frames are read, it
        is damaged further on, or has none.
    """

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)
        with self._open() as container:
            rate = container.streams.video[0].average_rate
        self.fps = fractions.Fraction(rate or 25)

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        av = _av()
        count = 0
        with self._open() as container:
            try:
                for frame in container.decode(video=0):
                    # Phones store frames unrotated, with the rotation as metadata.
                    yield np.ascontiguousarray(
                        np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                    )
                    count += 1
            except (av.FFmpegError, *DAMAGE) as error:
                raise UserError(f"{self.path} is damaged after frame {count}: {reason(error)}") from None
        if not count:
            raise UserError(f"{self.path}: the video has no frames")

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        av = _av()
        if not self.path.exists():
            raise UserError(f"{self.path}: there is no such file")
        if not Path(self.path).is_file():  # FFmpeg would wait for the writer of a named pipe.
            raise UserError(f"{self.path} is not a file of this machine")
        try:
            container = av.open(str(self.path))
        except (av.FFmpegError, *DAMAGE) as error:
            raise UserError(f"{self.path} cannot be read as a video: {reason(error)}") from None
        with container:
            if not container.streams.video:
                raise UserError(f"{self.path}: the file has no video stream, or is damaged")
            yield container


class VideoWriter:
    """An MP4 file (H.264) of pictures of one size; it appears at its path when the context is left without an error.

    An odd row or column at the end, which the format does not have, is cut off.
    """

    def __init__(self, path: epath.PathLike, fps: fractions.Fraction | int):
        self.path, self.fps = epath.Path(path), fps
        self._stack = contextlib.ExitStack()
        self._stream: Any = None

    def __enter__(self) -> "VideoWriter":
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        self._file = Path(folder) / "video.mp4"
        self._container = self._stack.enter_context(_av().open(str(self._file), "w"))
        return self

    def add(self, picture: Image.Image) -> None:
        """Appends a picture.

        Raises:
          UserError: its size is not that of the first.
        """
        av = _av()
        size = picture.width // 2 * 2, picture.height // 2 * 2
        if self._stream is None:
            self._stream = self._container.add_stream("libx264", rate=self.fps)
            self._stream.width, self._stream.height = size
            self._stream.pix_fmt = "yuv420p"
        if size != (self._stream.width, self._stream.height):
            raise UserError(
                f"{self.path}: a picture of {size[0]} x {size[1]} pixels cannot follow those of "
                f"{self._stream.width} x {self._stream.height}"
            )
        pixels = np.asarray(picture.convert("RGB"))[: size[1], : size[0]]
        self._mux(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24"))

    def __exit__(self, kind: Any, *_: Any) -> None:
        with self._stack:
            if kind is None and self._stream is not None:
                self._mux(None)
                self._container.close()
                whole = self.path.parent / f"{self.path.name}.tmp"
                epath.Path(self._file).copy(whole, overwrite=True)
                whole.replace(self.path)

    def _mux(self, frame: Any) -> None:
        for packet in self._stream.encode(frame):
            self._container.mux(packet)


def _av() -> Any:
    return optional("av", "videos need PyAV: pip install 'ovseg_jax[video]'")
