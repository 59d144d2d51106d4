"""Features of names that are kept between processes."""

import os

import numpy as np
import pytest

from ovseg_jax.inference import kept_texts
from ovseg_jax.inference.kept_texts import KeptTexts, digest


class Tower:
    """Features that no two names share, and the names of each call."""

    def __init__(self):
        self.calls = []

    def __call__(self, names):
        self.calls.append(list(names))
        return np.array([[len(name), ord(name[0]), 0.1] for name in names], np.float32)


def test_a_name_is_embedded_once(tmp_path):
    tower, file = Tower(), tmp_path / "texts" / "a.npz"
    first = KeptTexts(file, tower, 3)(["cat", "dog", "cat"])
    np.testing.assert_array_equal(first, Tower()(["cat", "dog", "cat"]))
    again = KeptTexts(file, tower, 3)(["sea", "dog", "ape", "cat"])
    np.testing.assert_array_equal(again, Tower()(["sea", "dog", "ape", "cat"]))
    assert tower.calls == [["cat", "dog"], ["sea", "ape"]]
    assert os.listdir(file.parent) == ["a.npz"]


def test_a_stop_among_many_names_keeps_those_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_texts, "_PART", 2)
    tower, file = Tower(), tmp_path / "a.npz"
    names = ["ant", "bee", "cat", "dog", "eel"]

    def stopped(names):
        if "cat" in names:
            raise KeyboardInterrupt
        return tower(names)

    with pytest.raises(KeyboardInterrupt):
        KeptTexts(file, stopped, 3)(names)
    np.testing.assert_array_equal(KeptTexts(file, tower, 3)(names), Tower()(names))
    assert tower.calls == [["ant", "bee"], ["cat", "dog"], ["eel"]]


@pytest.mark.parametrize("fault", ["empty", "cut", "changed", "of another tower"])
def test_damaged_features_are_computed_again(tmp_path, fault, caplog):
    tower, file = Tower(), tmp_path / "a.npz"
    KeptTexts(file, tower, 3)(["cat"])
    whole = file.read_bytes()
    at = whole.index(np.float32(0.1).tobytes())
    changed = whole[:at] + np.float32(0.2).tobytes() + whole[at + 4 :]
    if fault == "of another tower":
        np.savez(file, words=np.array(["cat"]), vectors=np.ones((1, 4), np.float32))
    else:
        file.write_bytes({"empty": b"", "cut": whole[:-30], "changed": changed}[fault])
    np.testing.assert_array_equal(KeptTexts(file, tower, 3)(["cat"]), Tower()(["cat"]))
    assert len(caplog.messages) == 1 and str(file) in caplog.messages[0]
    assert file.read_bytes() == whole and tower.calls == [["cat"]] * 2


def test_a_folder_that_cannot_be_written_costs_time_alone(tmp_path):
    (tmp_path / "file").write_text("")
    tower = Tower()
    kept = KeptTexts(tmp_path / "file" / "a.npz", tower, 3)
    for _ in range(2):
        np.testing.assert_array_equal(kept(["cat"]), Tower()(["cat"]))
    assert len(tower.calls) == 2


def test_kept_features_have_bounds(tmp_path, monkeypatch):
    """The newest names of a file, and the files that were used last, are kept."""
    tower = Tower()
    monkeypatch.setattr(kept_texts, "MOST_BYTES", 3 * 12)
    kept = KeptTexts(tmp_path / "a.npz", tower, 3)
    for names in (["a", "b", "c"], ["a", "d"], ["a", "d", "c"]):
        kept(names)
    assert tower.calls == [["a", "b", "c"], ["d"]]
    size = (tmp_path / "a.npz").stat().st_size
    monkeypatch.setattr(kept_texts, "MOST_BYTES", 2 * size + size // 2)
    for i, name in enumerate("bc"):
        KeptTexts(tmp_path / f"{name}.npz", tower, 3)(["a", "d", "c"])
        os.utime(tmp_path / f"{name}.npz", (i, i))
    kept(["a"])
    KeptTexts(tmp_path / "d.npz", tower, 3)(["a", "d", "c"])
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "d.npz"]


def test_a_digest_changes_with_all_that_features_depend_on(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"12345678")
    facts = file.stat()
    first = digest([tmp_path], "clip", ["a {}."])
    assert first == digest([tmp_path], "clip", ("a {}.",))
    assert first != digest([tmp_path], "clip", ["an {}."]) and first != digest([], "clip", ["a {}."])
    file.write_bytes(b"12345679")
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert (second := digest([tmp_path], "clip", ["a {}."])) != first
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    assert digest([tmp_path], "clip", ["a {}."]) != second
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("1")
    monkeypatch.setattr(kept_texts, "_PACKAGE", package)
    own = digest([], "clip")
    (package / "a.py").write_text("2")
    assert digest([], "clip") != own
