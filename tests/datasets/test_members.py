"""A download folder, packed and unpacked, is the same tree of files; what is damaged there is named in one sentence."""

import gzip
import io
import logging
import os
import pickle
import struct
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from ovseg_jax.datasets.members import CACHE, Members
from ovseg_jax.errors import UserError
from tests.datasets.packing import tarred, unpacked, zipped

FILES = {
    "train/1.jpg": b"one" * 400,
    "train/deep/2.jpg": b"two",
    "train/ümlaut 3.png": os.urandom(300),
    "train0/4.jpg": b"",
    "info.json": b"{}",
}


PACKED = {
    "unpacked": FILES,
    "zip": {"a.zip": zipped(FILES)},
    "stored zip": {"a.zip": zipped(FILES, zipfile.ZIP_STORED)},
    "tar": {"A.TAR": tarred(FILES)},
    "tar.gz": {"a.tar.gz": gzip.compress(tarred(FILES))},
    "tgz": {"a.tgz": gzip.compress(tarred(FILES))},
    "names with ./": {"a.tar": tarred({f"./{name}": data for name, data in FILES.items()})},
    "zip in a zip": {"a.zip": zipped({"b.zip": zipped(FILES), "__MACOSX/._b.zip": b"x", ".DS_Store": b"x"})},
    "tar in a tar": {"a.tar": tarred({"b.tar": tarred(FILES)})},
    "zip in a tar": {"a.tar": tarred({"b.zip": zipped(FILES)})},
    "tar.gz in a zip in a tar": {
        "a.tar": tarred({"b.zip": zipped({"c.tar.gz": gzip.compress(tarred(FILES))}), "./._b.zip": b"x"})
    },
    "in parts": {
        "train.zip": zipped({n: d for n, d in FILES.items() if n.startswith("train/")}),
        "train0.tar": tarred({n: d for n, d in FILES.items() if n.startswith("train0/")}),
        "info.json": FILES["info.json"],
    },
}


@pytest.mark.parametrize("kind", PACKED)
def test_packed_and_unpacked_look_alike(tmp_path, kind):
    members = Members(unpacked(tmp_path, PACKED[kind]))
    assert members.names() == sorted(FILES, key=str.encode) and len(members) == len(FILES)
    for again in (members, pickle.loads(pickle.dumps(members))):
        assert {name: again.read(name) for name in again.names()} == FILES
        assert all(name in again for name in FILES) and "train" not in again and 3 not in again
    # A second look finds what the first one has decompressed.
    cached = {path: path.stat().st_mtime_ns for path in tmp_path.glob(f"{CACHE}/*")}
    assert Members(tmp_path).names() == members.names()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob(f"{CACHE}/*")} == cached


def test_names_are_those_below_a_folder(tmp_path):
    members = Members(unpacked(tmp_path, PACKED["zip"]))
    assert members.names("train") == ["train/1.jpg", "train/deep/2.jpg", "train/ümlaut 3.png"]
    assert members.names("train", ".jpg") == ["train/1.jpg", "train/deep/2.jpg"]
    assert members.names("train0") == ["train0/4.jpg"] and members.names("rain") == []
    assert members.names("x" * 500) == [] and "x" * 500 not in members


def test_an_archive_is_unpacked_where_it_lies(tmp_path):
    nested = {"annotations/panoptic.zip": zipped({"panoptic/1.png": b"x"})}
    members = Members(unpacked(tmp_path, {"coco/all.zip": zipped(nested)}))
    assert members.names() == ["coco/annotations/panoptic/1.png"]
    assert members.read("coco/annotations/panoptic/1.png") == b"x"
    assert members.where("coco/annotations/panoptic/1.png") == (
        f"{tmp_path}/coco/all.zip, member 'coco/annotations/panoptic.zip', member 'coco/annotations/panoptic/1.png',"
    )


def test_patterns_choose_the_archives(tmp_path):
    files = {
        "VOC_x.tar": tarred({"v.txt": b"v"}),
        "other.tar": b"no tar",
        "sub/o.zip": zipped({"VOC_y.tar": b""}),
    }
    unpacked(tmp_path, files)
    assert Members(tmp_path, ["VOC*.tar"]).names() == ["other.tar", "sub/o.zip", "v.txt"]
    assert Members(tmp_path, []).names() == ["VOC_x.tar", "other.tar", "sub/o.zip"]


def test_the_unpacked_file_is_read(tmp_path, caplog):
    unpacked(
        tmp_path,
        {"a.zip": zipped({"x/1": b"old", "x/2": b"2"}), "x/1": b"new", "b.tar": tarred({"x/2": b"3"})},
    )
    with caplog.at_level(logging.WARNING):
        members = Members(tmp_path)
    assert members.read("x/1") == b"new" and members.read("x/2") == b"2"
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/a.zip: members that are also found elsewhere, and are read there: 1, such as 'x/1', which is "
        "unpacked",
        f"{tmp_path}/b.tar: members that are also found elsewhere, and are read there: 1, such as 'x/2', which is in "
        f"{tmp_path}/a.zip",
    ]


def test_an_unpacked_archive_replaces_the_one_inside_another(tmp_path):
    unpacked(tmp_path, {"a.zip": zipped({"b.zip": b"damaged"}), "b.zip": zipped({"1": b"1"})})
    assert Members(tmp_path).names() == ["1"]


def test_the_last_of_two_equal_names_in_an_archive_is_read(tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for data in (b"first", b"second"):
            entry = tarfile.TarInfo("1")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    assert Members(unpacked(tmp_path, {"a.tar": out.getvalue()})).read("1") == b"second"


def test_find(tmp_path):
    files = {"a/x/info.json": b"1", "info.json": b"2", "b/myinfo.json": b"3", "c/deep/info.json": b""}
    members = Members(unpacked(tmp_path, {"z.zip": zipped(files)}))
    assert members.find("info.json") == "info.json" and members.find("x/info.json") == "a/x/info.json"
    assert members.find("nothing.json", "myinfo.json", "info.json") == "b/myinfo.json"
    assert members.find("nothing.json") is None
    del files["info.json"]
    with pytest.raises(
        UserError, match=r"holds both 'a/x/info.json' and 'c/deep/info.json', and only one 'info.j"
    ):
        Members(unpacked(tmp_path / "two", files)).find("info.json")


def test_find_folder(tmp_path):
    files = {"img/train/1.jpg": b"", "img/train/1.png": b"", "map/train/1.png": b"", "map/x/train/2.txt": b""}
    members = Members(unpacked(tmp_path, files))
    assert members.find_folder("train", suffix=".jpg") == "img/train"
    assert members.find_folder("map/train", "train", suffix=".png") == "map/train"
    assert members.find_folder("train", suffix=".txt") == "map/x/train" and members.find_folder("map") is None
    assert members.find_folder("", "img") is None and members.find_folder("rain") is None
    with pytest.raises(
        UserError, match=r"holds both 'img/train' and 'map/train', and only one 'train' can be read"
    ):
        members.find_folder("train", suffix=".png")
    assert Members(unpacked(tmp_path / "flat", {"1.jpg": b""})).find_folder("x", "", suffix=".jpg") == ""


def encrypted() -> bytes:
    data = bytearray(zipped({"a": b"secret"}, zipfile.ZIP_STORED))
    for mark, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(mark) + at] |= 1
    return bytes(data)


def with_link() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        entry = tarfile.TarInfo("link")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(entry)
    return out.getvalue()


def bad_crc() -> bytes:
    data = bytearray(zipped({"a": b"content" * 9}, zipfile.ZIP_STORED))
    data[data.index(b"content")] ^= 1
    return bytes(data)


DAMAGED = {
    "no zip": ({"a.zip": b"<html>404</html>"}, r"a.zip cannot be read: it is cut off or no zip file"),
    "cut zip": ({"a.zip": zipped(FILES)[:-40]}, r"a.zip cannot be read: it is cut off or no zip file"),
    "empty zip": ({"a.zip": b""}, r"a.zip cannot be read: it is cut off or no zip file"),
    "encrypted": ({"a.zip": encrypted()}, r"a.zip cannot be read: its member 'a' is encrypted"),
    "lzma": (
        {"a.zip": zipped(FILES, zipfile.ZIP_LZMA)},
        r"compressed by method 14, which is not supported: unpack",
    ),
    "zip outside": (
        {"a.zip": zipped({"../x": b""})},
        r"a.zip cannot be read: its member '../x' would lie outside",
    ),
    "tar outside": ({"a.tar": tarred({"a/../../x": b""})}, r"its member 'a/../../x' would lie outside"),
    "tar absolute": ({"a.tar": tarred({"/etc/x": b""})}, r"its member '/etc/x' would lie outside"),
    "drive": ({"a.zip": zipped({"C:\\x": b""})}, r"would lie outside"),
    "no tar": ({"a.tar": b"<html>404</html>"}, r"a.tar cannot be read: "),
    "empty tar": ({"a.tar": b""}, r"a.tar cannot be read: empty file"),
    "tar cut at a member": (
        {"a.tar": tarred(FILES)[:2048]},
        r"a.tar cannot be read: it is cut off or damaged at byte 2048",
    ),
    "tar cut in a member": (
        {"a.tar": tarred(FILES)[:1100]},
        r"a.tar cannot be read: it is cut off inside its member 'train/1",
    ),
    "tar damaged": (
        {"a.tar": tarred(FILES)[:2048] + b"\xff" * 512 + tarred(FILES)[2560:]},
        r"a.tar cannot be read: it is cut off or damaged at byte 2048",
    ),
    "cut gzip": (
        {"a.tar.gz": gzip.compress(tarred(FILES))[:-30]},
        r"a.tar.gz cannot be read: Compressed file ended",
    ),
    "no gzip": ({"a.tgz": b"<html>404</html>"}, r"a.tgz cannot be read: Not a gzipped file"),
    "inner": (
        {"a.zip": zipped({"b.zip": b"x"})},
        r"a.zip, member 'b.zip' cannot be read: it is cut off or no zip file",
    ),
    "deep": (
        {"a.tar": tarred({"b.tar": tarred({"c.tar": tarred({"d.tar": tarred({"e.tar": tarred({})})})})})},
        r"e.tar' lies in 4 archives, one inside another, which is not supported: unpack it",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_named(tmp_path, kind):
    files, message = DAMAGED[kind]
    with pytest.raises(UserError, match=message) as error:
        Members(unpacked(tmp_path, files))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.glob(f"{CACHE}/*.tmp"))


def test_damaged_and_missing_members_are_named(tmp_path):
    unpacked(tmp_path, {"a.zip": bad_crc(), "b.tar": tarred({"b": b"x" * 600})})
    members = Members(tmp_path)
    with pytest.raises(
        UserError, match=r"a.zip, member 'a', cannot be read: it is damaged: its size or checksum"
    ):
        members.read("a")
    (tmp_path / "b.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"b.tar, member 'b', cannot be read: it is cut off"):
        members.read("b")
    (tmp_path / "b.tar").unlink()
    with pytest.raises(UserError, match=r"b.tar, member 'b', cannot be read: there is no such file"):
        members.read("b")
    with pytest.raises(UserError, match=r"holds no 'train/9.jpg', unpacked or in an archive"):
        members.read("train/9.jpg")
    with pytest.raises(UserError, match=r"the download folder '.*/missing' is not a folder"):
        Members(tmp_path / "missing")


def test_a_size_that_is_not_true_needs_no_memory(tmp_path):
    """A member that would grow to 64 MiB is refused after as many bytes as it states."""
    data = bytearray(zipped({"a": bytes(1 << 26)}))
    at = data.index(b"PK\1\2")
    struct.pack_into("<I", data, at + 24, 10)
    with pytest.raises(UserError, match=r"its size or checksum differs"):
        Members(unpacked(tmp_path, {"a.zip": bytes(data)})).read("a")


def test_links_hidden_files_and_rings(tmp_path):
    unpacked(
        tmp_path / "data",
        {".hidden": b"", ".git/x": b"", "__MACOSX/y": b"", "a/1": b"1", "l.tar": with_link()},
    )
    unpacked(tmp_path / "elsewhere", {"2": b"2"})
    (tmp_path / "data/a/up").symlink_to(tmp_path / "data")
    (tmp_path / "data/b").symlink_to(tmp_path / "elsewhere")
    members = Members(tmp_path / "data")
    assert members.names() == ["a/1", "b/2"] and members.read("b/2") == b"2"
    (tmp_path / "empty").mkdir()
    empty = Members(tmp_path / "empty")
    assert (
        empty.names() == [] and "a" not in empty and empty.find("a") is None and empty.find_folder("") is None
    )


def test_a_changed_archive_is_decompressed_anew(tmp_path):
    unpacked(tmp_path, {"a.tgz": gzip.compress(tarred({"1": b"old"}))})
    assert Members(tmp_path).read("1") == b"old"
    unpacked(tmp_path, {"a.tgz": gzip.compress(tarred({"1": b"newer"}))})
    assert Members(tmp_path).read("1") == b"newer"


def test_a_cache_that_cannot_be_written_is_said(tmp_path):
    unpacked(tmp_path, {"a.tgz": gzip.compress(tarred(FILES)), "cache": b"a file"})
    with pytest.raises(
        UserError, match=r"a.tgz must be decompressed to be read, but .*/cache/x cannot be written .*unp"
    ):
        Members(tmp_path, cache=tmp_path / "cache/x")


def test_threads_read_the_right_bytes(tmp_path):
    files = {f"{k}": bytes([k % 251]) * (50 + k) for k in range(300)}
    members = Members(
        unpacked(tmp_path, {"a.zip": zipped(files), "b.tar": tarred({f"t{n}": d for n, d in files.items()})})
    )
    names = members.names() * 3
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(members.read, names))
    assert all(data == files[name.removeprefix("t")] for name, data in zip(names, read, strict=True))
