"""Tars of images and captions: the layout of img2dataset, random access, resumed batches, and damaged tars."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image

from ovseg_jax.data.images import Encoded, read_image
from ovseg_jax.data.pipeline import train_iterator
from ovseg_jax.data.rows import Rows
from ovseg_jax.data.sources import webdataset
from ovseg_jax.data.sources.build import make_source
from ovseg_jax.data.sources.webdataset import WebDataset
from ovseg_jax.errors import UserError
from tests.datasets.packing import as_json, jpeg, tarred


def shard(first: int, count: int) -> bytes:
    """A tar as img2dataset writes it."""
    files = {}
    for k in range(first, first + count):
        files[f"{k:09d}.jpg"] = jpeg(6 + k, 8, k)
        files[f"{k:09d}.json"] = as_json({"caption": f"no, {k}", "url": "http://x", "key": f"{k:09d}"})
        files[f"{k:09d}.txt"] = f"a  dog number {k}\n".encode()
    return tarred(files)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "cc3m"
    root.mkdir()
    for k in range(3):
        (root / f"{k:05d}.tar").write_bytes(shard(4 * k, 4))
        (root / f"{k:05d}.parquet").write_bytes(b"x")
        (root / f"{k:05d}_stats.json").write_bytes(b"{}")
    return root


def test_the_layout_of_img2dataset(folder):
    source = pickle.loads(pickle.dumps(make_source({"name": "webdataset", "data_dir": str(folder)})))
    assert len(source) == 12 and source.provides == {"image", "captions"} and not len(source.classes)
    for index in (7, 0, 11, 7):
        example = source[index]
        np.testing.assert_array_equal(example["image"], read_image(Encoded("", jpeg(6 + index, 8, index))))
        assert example["captions"] == [f"a dog number {index}"]
        assert example["image_id"] == f"{index // 4:05d}/{index:09d}"
    assert list(source.captions()) == [f"a dog number {k}" for k in range(12)]
    assert source.extent() == (17, 8, 0)
    assert len(WebDataset(folder, "0000[12].tar")) == 8
    with pytest.raises(IndexError):
        source[12]


def test_captions_of_json_and_a_users_own_names(tmp_path, caplog):
    files = {
        "a/x.1.en.jpg": b"",  # "x" is the name, ".1.en.jpg" the suffix: no image
        "a/b.PNG": red(),
        "a/b.json": as_json({"texts": ["one", " two  words ", ""]}),
        "a/c.png": red(),
        "d.txt": b"no image",
        ".hidden": b"",
        "e.cls": b"3",
        "e.jpeg": jpeg(4, 5),
        "e.txt": b"\xef\xbb\xbfa cat",
    }
    (tmp_path / "own.tar").write_bytes(tarred(files))
    source = WebDataset(tmp_path, caption="texts")
    assert [source[k]["image_id"] for k in range(2)] == ["own/a/b", "own/e"] and len(source) == 2
    assert [source[k]["captions"] for k in range(2)] == [["one", "two words"], ["a cat"]]
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"{tmp_path}: 1 examples have no caption and were left out",
        f"{tmp_path}: 2 examples have no image and were left out",
    ]
    with pytest.raises(
        UserError, match=r"the caption of own/a/b in .*own.tar cannot be read: it has no 'caption'"
    ):
        dict(WebDataset(tmp_path)[0])


def red() -> bytes:
    import io

    out = io.BytesIO()
    Image.new("RGB", (5, 4), "red").save(out, "PNG")
    return out.getvalue()


def test_an_index_is_read_in_place_of_the_tars(folder, tmp_path, monkeypatch):
    index = tmp_path / "index.npz"
    first = WebDataset(folder, index=index)
    scans = []
    scan = webdataset._scan_tar
    monkeypatch.setattr(webdataset, "_scan_tar", lambda *of: scans.append(of[1].name) or scan(*of))
    again = WebDataset(folder, index=index)
    assert not scans and len(again) == 12
    assert all(again[k]["image_id"] == first[k]["image_id"] for k in range(12))
    assert again[9]["captions"] == ["a dog number 9"]
    (folder / "00003.tar").write_bytes(shard(12, 1))
    assert len(WebDataset(folder, index=index)) == 13 and len(scans) == 4
    assert len(WebDataset(folder, index=index)) == 13 and len(scans) == 4
    # Another tar of the same size, as a second download may be.
    other = (folder / "00003.tar").read_bytes().replace(b"a  dog", b"a  cat")
    (folder / "00003.tar").write_bytes(other)
    assert WebDataset(folder, index=index)[12]["captions"] == ["a cat number 12"] and len(scans) == 8
    index.write_bytes(b"x")
    with pytest.raises(UserError, match=r"the index .*index.npz cannot be read"):
        WebDataset(folder, index=index)


def test_tars_of_other_suffixes_are_said(folder, caplog):
    for name in ("00003.TAR", "00004.tar.gz", "00005.tgz", "._00000.tar"):
        (folder / name).write_bytes(b"x")
    assert len(WebDataset(folder)) == 12
    (said,) = [record.getMessage() for record in caplog.records]
    assert "ignored 3 tars that are not called *.tar, such as 00003.TAR" in said
    caplog.clear()
    assert len(WebDataset(folder, "0000[12].tar")) == 8 and not caplog.records


def test_processes_write_one_index(folder, tmp_path, monkeypatch):
    """The second process begins while the first one writes."""
    index, write = tmp_path / "index.npz", type(epath.Path(tmp_path)).write_bytes
    begun = []

    def interrupted(self, data):
        write(self, data)
        if not begun:
            begun.append(self)
            WebDataset(folder, index=index)

    monkeypatch.setattr(type(epath.Path(tmp_path)), "write_bytes", interrupted)
    WebDataset(folder, index=index)
    assert begun and len(WebDataset(folder, index=index)) == 12
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["index.npz"]


def test_faults(folder, tmp_path):
    with pytest.raises(UserError, match="data_dir='' is not a folder"):
        WebDataset("")
    with pytest.raises(UserError, match=r"holds no tar 'x\*.tar'"):
        WebDataset(folder, "x*.tar")
    whole = (folder / "00001.tar").read_bytes()
    for size, message in (
        (700, r"00001.tar cannot be read: it is cut off inside its member '000000004.jpg'"),
        (len(whole) - 9000, r"00001.tar cannot be read: it is cut off"),
        (0, r"00001.tar cannot be read"),
    ):
        (folder / "00001.tar").write_bytes(whole[:size])
        with pytest.raises(UserError, match=message):
            WebDataset(folder)
    index = tmp_path / "i.npz"
    (folder / "00001.tar").write_bytes(whole)
    source = WebDataset(folder, index=index)
    (folder / "00001.tar").write_bytes(whole[:600])
    with pytest.raises(UserError, match=r"00001.tar cannot be read: it is cut off"):
        dict(source[4])
    (folder / "00001.tar").write_bytes(whole.replace(b"\xff\xd8\xff", b"\0\0\0"))
    with pytest.raises(UserError, match=r"00001/000000004 in the tars of .*cc3m cannot be read"):
        source[4]["image"]
    (folder / "only").mkdir()
    (folder / "only/a.tar").write_bytes(tarred({"a.txt": b"x"}))
    with pytest.raises(UserError, match=r"no example of .*only has an image and a caption"):
        WebDataset(folder / "only")


def test_batches_do_not_depend_on_processes_and_resume(folder):
    source = WebDataset(folder)
    data = {"image_size": 16, "threads": 0, "augment": dict(crop=(1.0, 1.0), randaugment=0)}
    config = {"seed": 3, "steps": 9, "batch_size": 4, "data": data}
    rows = Rows.from_config(config, ("image",))

    def batches(count, **more):
        stream = train_iterator(config, rows, source=source, **more)
        return [next(stream)["image"] for _ in range(count)]

    whole = batches(6)
    of_epoch = {image.tobytes() for batch in whole[:3] for image in batch}
    assert len(of_epoch) == 12 == len({image.tobytes() for batch in whole[3:] for image in batch})
    np.testing.assert_array_equal(batches(2, start=4), whole[4:])
    halves = [batches(6, process_index=k, process_count=2) for k in range(2)]
    np.testing.assert_array_equal(np.concatenate(halves, 1), whole)
