"""Whole files, their checksums, and locks."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from ovseg_jax import files
from ovseg_jax.cli.outputs import check_out_file
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.run import write_tables
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


def test_a_table_of_scores_is_replaced_whole_or_stays(tmp_path, monkeypatch):
    class Row(NamedTuple):
        name: str
        iou: float

    table, folder = tmp_path / "tables" / "test-iou.csv", files.epath.Path(tmp_path)
    write_tables(folder, {"test-iou": [Row("caña", 1.5)], "none": []})
    before = table.read_bytes()
    assert before.decode().split() == ["name,iou", "caña,1.5"]

    def full(self, data):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(type(folder), "write_bytes", full)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"test-iou\.csv cannot be written: No space"):
        write_tables(folder, {"test-iou": [Row("x", 2.5)]})
    assert table.read_bytes() == before and len(list(tmp_path.rglob("*"))) == 2


def test_a_link_stays_and_what_is_no_file_is_not_replaced(tmp_path):
    target, link, pipe = tmp_path / "a" / "t.json", tmp_path / "link.json", tmp_path / "pipe"
    target.parent.mkdir()
    link.symlink_to(target)
    write_whole(link, "one")  # to a file that there is not yet
    write_whole(link, "two")
    assert link.is_symlink() and target.read_text() == "two"
    os.mkfifo(pipe)
    for path, said in ((pipe, "it is a pipe or a device"), (tmp_path, "it is a folder")):
        with pytest.raises(UserError, match=f"{path} cannot be written: {said}"):
            write_whole(path, "x")
        with pytest.raises(UserError, match=f"--json={path} cannot be written: {said}"):
            check_out_file(path, {}, "--json")
    assert pipe.is_fifo() and sorted(p.name for p in tmp_path.rglob("*")) == [
        "a",
        "link.json",
        "pipe",
        "t.json",
    ]


def test_the_output_of_a_process_is_written_to(tmp_path):
    """`--json=/dev/stdout`, and a pipe of the shell, are written to; /dev/null stays the device that it is."""
    read, write = os.pipe()
    with open(read, "rb") as reader:
        check_out_file(f"/dev/fd/{write}", {})
        write_whole(f"/dev/fd/{write}", "text")
        os.close(write)
        assert reader.read() == b"text"
    log = tmp_path / "log"
    with log.open("w") as file:
        file.write("before\n")
        file.flush()
        write_whole(f"/dev/fd/{file.fileno()}", "after\n")
    assert log.read_text() == "before\nafter\n" and os.listdir(tmp_path) == ["log"]


def test_processes_that_write_one_file_at_once(tmp_path, monkeypatch):
    """The second begins while the first one's temporary file is written."""
    path, write, begun = tmp_path / "index", type(files.epath.Path(tmp_path)).write_bytes, []

    def interrupted(self, data):
        write(self, data)
        if not begun:
            begun.append(self)
            write_whole(path, "second", shared=True)

    monkeypatch.setattr(type(files.epath.Path(tmp_path)), "write_bytes", interrupted)
    write_whole(path, "first", shared=True)
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["index"]


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
