"""The guard at the entry of all commands: one sentence, an exit status, and printing that never fails."""

import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from etils import epath
from jax._src import dispatch

from ovseg_jax.cli import console
from ovseg_jax.cli.console import Parser, check_addresses, guarded, run_command
from ovseg_jax.errors import UserError

ROOT = Path(__file__).parents[2]


def raising(error):
    def call():
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (UserError("the dog is no cat"), "error: the dog is no cat"),
        (PermissionError(13, "Permission denied", "/x/y"), "error: /x/y: Permission denied"),
        (OSError(28, "No space left on device"), "error: No space left on device"),
        (OSError("told\nin two lines"), "error: told in two lines"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_1(capsys, error, sentence):
    assert guarded(raising(error)) == 1
    assert capsys.readouterr().err == sentence + "\n"


def test_a_long_quotation_is_cut(capsys):
    """Such as a line of a file that is no list, or a whole page in a flag."""

    def call():
        raise UserError(f"line 1: there is no file {'x' * 100_000}: give a list")

    assert guarded(call) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: line 1: there is no file xxx") and said.endswith("xxx: give a list\n")
    assert len(said) < 3100


def test_ctrl_c_is_status_130(capsys):
    assert guarded(raising(KeyboardInterrupt())) == 130
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "the same command continues" in err


def test_a_mistake_of_the_program_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        guarded(raising(ZeroDivisionError()))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_names_that_the_terminal_cannot_show(monkeypatch, encoding):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding))

    def call():
        print("木.jpg \udcff.png 🐕")
        raise UserError("no image 木\udcff")

    assert guarded(call) == 1
    for stream, ours in ((sys.stdout, b".jpg "), (sys.stderr, b"error: no image ")):
        stream.flush()
        assert ours in stream.buffer.getvalue() and rb"\udcff" in stream.buffer.getvalue()


def test_flags_are_parsed_and_checked_inside_of_the_guard(capsys):
    def parser():
        parser = Parser("nothing", "")
        parser.add_argument("--images")
        parser.add_argument("--size", type=int)
        return parser

    given = []
    assert run_command(parser, given.append, ["--images=a b", "--size=3"]) == 0
    assert (given[0].images, given[0].size) == ("a b", 3)
    assert run_command(parser, lambda _: 1, []) == 1
    for arguments, message in (
        (["--size=x"], "argument --size: invalid int value: 'x'"),
        (["--imagse=x"], "unrecognized arguments: --imagse=x"),
        (["--images="], "the argument '--images=' is empty"),
        (["--images", " "], "the argument ' ' is empty"),
        (["--images=https://a.org/b.jpg"], "--images=https://a.org/b.jpg: https:// is not supported"),
    ):
        assert run_command(parser, given.append, arguments) == 1
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    assert len(given) == 1


def test_addresses_name_the_scheme_or_the_extra(monkeypatch):
    monkeypatch.setattr(console.importlib.util, "find_spec", lambda name: None if name == "s3fs" else name)
    check_addresses({"--images": "gs://bucket/x", "--labels": "dog; see https://a", "n": 3, "tile": (1, 2)})
    with pytest.raises(UserError, match=r"--x=s3://b/x: s3:// needs s3fs: pip install -e '.\[buckets\]'"):
        check_addresses({"--x": "s3://b/x"})
    with pytest.raises(UserError, match=r"--data=folder,data_dir=ftp://x: ftp:// is not supported"):
        check_addresses({"--data": "folder,data_dir=ftp://x"})
    config = {"data": {"train": [{"data_dir": "http://x"}]}}
    with pytest.raises(UserError, match=r"config.data.train.0.data_dir=http://x"):
        check_addresses({"config": config})


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_bucket_that_does_not_answer_is_named_at_once(scheme, monkeypatch, capsys):
    asked, answer = [], threading.Event()

    def exists(path):
        asked.append(str(path))
        if "silent" in str(path):
            answer.wait(60)
        if "closed" in str(path):
            raise RuntimeError("no\ncredentials")
        return False

    monkeypatch.setattr(console.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(console, "_SECONDS_TO_REACH", 1)
    monkeypatch.setattr(epath.Path(f"{scheme}://x").__class__, "exists", exists)

    def parser():
        parser = Parser("nothing", "")
        parser.add_argument("--checkpoint")
        return parser

    def said(value):
        status = run_command(parser, lambda _: 0, [f"--checkpoint={value}"])
        err = capsys.readouterr().err
        assert err.count("\n") == status
        return err

    assert said(f"{scheme}://open/a") == said(f"folder,a={scheme}://open/a b,c={scheme}://open/d") == ""
    assert asked == [f"{scheme}://open/a", f"{scheme}://open/a b"]  # each bucket once a command
    for value in (f"{scheme}://silent/run", f"x={scheme}://silent/run,y=2"):
        begun = time.monotonic()
        assert f"error: --checkpoint: {scheme}://silent/run did not answer within 1 seconds" in said(value)
        assert time.monotonic() - begun < 30
    text = f"error: --checkpoint: {scheme}://closed/run cannot be reached: no credentials\n"
    assert said(f"{scheme}://closed/run") == text
    answer.set()


def test_memory_is_returned_after_a_long_compilation(monkeypatch):
    trimmed, listeners, options = [], [], []
    library = SimpleNamespace(malloc_trim=trimmed.append, mallopt=lambda *option: options.append(option))
    monkeypatch.setattr(console.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", listeners.append)
    console.return_compilers_memory()
    (tell,) = listeners
    tell(dispatch.BACKEND_COMPILE_EVENT, 0.1)
    tell("/jax/other", 9.0)
    assert not trimmed
    tell(dispatch.BACKEND_COMPILE_EVENT, 2.0, fun_name="f")
    assert trimmed == [0] and options == [(-3, 4 << 20)]


@pytest.fixture
def settings(monkeypatch):
    """What `use_compilation_cache` sets on one CPU device."""
    found = {}
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(jax.config, "update", found.__setitem__)
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return found


def test_the_cache_of_a_user_with_a_home(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    console.use_compilation_cache()
    assert settings == {
        "jax_compilation_cache_dir": str(tmp_path / ".cache/ovseg_jax/xla"),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }


def test_the_cache_as_its_user_has_set_it(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "2")
    console.use_compilation_cache()
    assert settings == {}


@pytest.mark.parametrize("home", ["none", "a file", "read-only"])
def test_a_user_without_a_home_has_no_cache(settings, monkeypatch, tmp_path, home):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    if home == "none":  # as of a container's user that /etc/passwd does not list
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    if home == "read-only":
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file" / "x"))
    console.use_compilation_cache()
    assert settings == {"jax_enable_compilation_cache": False}


def test_a_user_without_a_home_gets_one(monkeypatch, tmp_path):
    """nltk, which textblob imports, fails at import without."""
    monkeypatch.setenv("HOME", str(tmp_path))
    console.ensure_home()
    assert os.environ["HOME"] == str(tmp_path)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    console.ensure_home()
    home = os.environ["HOME"]
    assert home != str(tmp_path) and os.access(home, os.W_OK) and not os.listdir(home)
    os.rmdir(home)


def test_the_reader_of_the_output_may_leave():
    """As `... | head -1` does; a process of its own, since its stdout is closed."""
    code = (
        "from ovseg_jax.cli.console import start\n"
        "def main():\n  for i in range(100000): print('line', i)\n  return 0\n"
        "start(main)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "line 0\n"
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 1 and not err


def test_texts_are_kept_where_programs_are(monkeypatch, tmp_path):
    for folder, enabled, want in (
        (str(tmp_path), True, tmp_path / "texts"),
        (str(tmp_path), False, None),
        (None, True, None),
        ("gs://bucket/x", True, None),
    ):
        monkeypatch.setattr(
            jax,
            "config",
            SimpleNamespace(jax_compilation_cache_dir=folder, jax_enable_compilation_cache=enabled),
        )
        assert console.texts_folder() == want


def test_programs_are_removed_beyond_a_bound(settings, monkeypatch, tmp_path):
    """Those that were used last stay, whether they were read or written; other files are not counted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(console, "_MOST_BYTES", 25)
    at_exit = []
    monkeypatch.setattr(console.atexit, "register", lambda *call: at_exit.append(call))
    console.use_compilation_cache()
    folder = tmp_path / "ovseg_jax" / "xla"
    for name, read, written in (("a", 9, 1), ("b", 2, 2), ("c", 1, 3), ("d", 8, 8)):
        (folder / f"{name}-cache").write_bytes(bytes(10))
        os.utime(folder / f"{name}-cache", (read, written))
    (folder / "texts").mkdir()
    ((keep, *arguments),) = at_exit
    keep(*arguments)
    assert sorted(os.listdir(folder)) == ["a-cache", "d-cache", "texts"]
    (folder / "e-cache").write_bytes(bytes(30))
    keep(*arguments)
    assert sorted(os.listdir(folder)) == ["e-cache", "texts"]
