"""Whole files, their checksums, and locks."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ovseg_jax import files
from ovseg_jax.errors import UserError
from ovseg_jax.files import is_recorded, locked, read_recorded, write_recorded, write_whole

ROOT = Path(__file__).parents[1]


def test_a_file_is_replaced_whole_or_stays(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_whole(path, "old")

    def full(self, data):
        Path(str(self)).write_bytes(data[:1])
        raise OSError(28, os.strerror(28))

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"a\.json cannot be written: No space"),
    ):
        patch.setattr(type(files.epath.Path(path)), "write_bytes", full)
        write_whole(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_every_flipped_bit_is_found(tmp_path):
    path = tmp_path / "words.json"
    write_recorded(path, '["red", "ball"]')
    assert read_recorded(path) == '["red", "ball"]' and is_recorded(path)
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=r"words\.json"):
            read_recorded(path)
    write_recorded(path, "[]")
    assert read_recorded(path) == "[]"
    (tmp_path / "checksums.json").unlink()
    assert is_recorded(path) is None and read_recorded(path) == "[]"
    for broken in ("[]", "{", b"\xff\xfe"):
        (tmp_path / "checksums.json").write_bytes(broken if isinstance(broken, bytes) else broken.encode())
        with pytest.raises(UserError, match=r"checksums\.json cannot be read"):
            read_recorded(path)


def test_a_folder_is_locked_as_long_as_its_process_works(tmp_path):
    code = (
        "import sys, time; from ovseg_jax.files import locked\n"
        "with locked(sys.argv[1]): print(1, flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "run"], stdout=subprocess.PIPE, cwd=ROOT, env=os.environ
    )
    try:
        assert other.stdout.readline()
        with (
            pytest.raises(UserError, match=rf"run is in use by process {other.pid} on .* since 2"),
            locked(tmp_path / "run"),
        ):
            pass
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    assert (tmp_path / "run" / ".lock").exists()  # It could not clean up, and locks nothing.
    mine = f"process {os.getpid()} on"
    with locked(tmp_path / "run"), pytest.raises(UserError, match=mine), locked(tmp_path / "run"):
        pass
    assert not list((tmp_path / "run").iterdir())


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text(json.dumps(1))
    with pytest.raises(UserError, match="file/run cannot be created"), locked(tmp_path / "file" / "run"):
        pass
