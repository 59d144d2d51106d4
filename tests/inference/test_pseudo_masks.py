"""The command, on files, around a teacher that sees colours."""

import io
import json
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from fake_method import CLASSES, ColourMethod, blocks, config
from PIL import Image

from ovseg_jax import pseudo_label
from ovseg_jax.data.source_base import Example, Source, replaced
from ovseg_jax.data.sources import build
from ovseg_jax.data.sources.build import make_source
from ovseg_jax.data.sources.pseudo_masks import (
    DOUBLE,
    KEPT,
    SMALL,
    UNSURE,
    PseudoMasks,
    Rules,
    Statistics,
    read_shard,
)
from ovseg_jax.errors import UserError
from ovseg_jax.inference import pseudo_masks
from ovseg_jax.inference.pseudo_masks import choose, label_stage
from ovseg_jax.inference.segmenter import Segmenter


@pytest.fixture
def run(tmp_path, monkeypatch):
    loaded = []

    def load(cls, workdir, *, batch_size=8, devices=()):
        loaded.append(workdir)
        method = ColourMethod(masks=str(workdir) != "pixels")
        return cls(method, method.init(None), config(32), CLASSES, batch_size=batch_size, devices=devices)

    monkeypatch.setattr(Segmenter, "from_checkpoint", classmethod(load))
    (tmp_path / "images").mkdir()

    def call(**flags):
        flags = {"checkpoint": "run", "data_dir": tmp_path} | flags
        return pseudo_label.main([f"--{name}={value}" for name, value in flags.items()])

    call.loaded = loaded
    return call


COLOURED = (["red"], ["red", "green"], ["blue", "white", "black"], ["green"], ["yellow", "red"])


class Coloured(Source):
    """Five images of colours; the second has a mask of its own."""

    name, classes, provides = (
        "coloured",
        CLASSES,
        frozenset({"image", "captions", "segments", "class_ids", "boxes"}),
    )

    def __len__(self):
        return len(COLOURED)

    def __getitem__(self, index):
        if index in BROKEN:
            broken = lambda _: (_ for _ in ()).throw(UserError(f"image {index} is damaged"))
        own = np.array([3] if index == 1 else [], np.int32)
        return Example(
            image=broken if index in BROKEN else blocks(24, 40, COLOURED[index]),
            segments=np.full((24, 40), len(own), np.int32),
            class_ids=own,
            isthing=np.ones(len(own), bool),
            iscrowd=np.zeros(len(own), bool),
            boxes=np.array([[0, 0, 40, 24]] * len(own), np.float32).reshape(-1, 4),
            captions=["a colour"],
            image_id=f"{NAMES}-{index}",
        )


BROKEN: set[int] = set()
NAMES = "c"


def save(path, *row):
    Image.fromarray(blocks(24, 40, row)).save(path)


def test_images_without_a_mask_get_one(run, tmp_path, capsys):
    images, masks = tmp_path / "images", tmp_path / "masks"
    for i, row in enumerate((["red"], ["red", "green"], ["blue"])):
        save(images / f"{i}.png", *row)
    save(images / "._0.png", "red")
    (images / "broken.jpg").write_bytes(b"\xff\xd8 cut")
    masks.mkdir()
    (masks / "0.txt").write_text("a note is no mask")
    Image.fromarray(np.full((24, 40), 7, np.uint8)).save(masks / "2.PNG")
    assert run(batch=2) == 1
    out = capsys.readouterr()
    assert "2 masks written" in out.out and "1 existed, 1 images skipped" in out.out
    assert "broken.jpg" in out.err
    assert {path.name for path in masks.iterdir()} == {"0.txt", "0.png", "1.png", "2.PNG"}
    assert np.unique(Image.open(masks / "0.png")).tolist() == [1]
    assert np.unique(Image.open(masks / "1.png")).tolist() == [1, 2]
    (images / "broken.jpg").unlink()
    assert run() == 0 and len(run.loaded) == 1  # nothing is left to do


def test_what_was_stopped_goes_on(run, tmp_path, monkeypatch):
    for i in range(4):
        save(tmp_path / "images" / f"{i}.png", "red")
    whole, count = pseudo_masks.write_whole, []

    def stopped(path, content):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        whole(path, content)

    monkeypatch.setattr(pseudo_masks, "write_whole", stopped)
    assert run(batch=1) == 130
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["0.png", "1.png"]
    assert run(batch=1) == 0 and len(count) == 3 + 2
    assert len(list((tmp_path / "masks").iterdir())) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"data_dir": "nowhere"}, "has no folder images/"),
        ({"checkpoint": "pixels"}, "without mask proposals"),
        ({"threshold": 2}, "threshold=2.0 is not between 0 and 1"),
        ({"min_area": -1}, "min_area=-1.0"),
        ({"min_confidence": "nan"}, "min_confidence=nan is not between 0 and 1"),
        ({"batch": 0}, "--batch=0"),
        ({"twins": 1}, "a.jpg and a.png would share the mask a.png"),
        ({"empty": 1}, "holds no readable image"),
    ],
)
def test_a_wrong_request_is_one_sentence(run, tmp_path, capsys, flags, message):
    if "empty" not in flags:
        save(tmp_path / "images" / "a.png", "red")
    if "twins" in flags:
        save(tmp_path / "images" / "a.jpg", "red")
    assert run(**{key: value for key, value in flags.items() if key not in ("twins", "empty")}) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("error: ") == 1 and "Traceback" not in err


def reference(masks, rules):
    """The rules in NumPy, one mask after the other."""
    binary = (masks > rules.threshold).reshape(len(masks), -1)
    area = binary.sum(1)
    confidence = (masks.reshape(len(masks), -1) * binary).sum(1) / np.maximum(area, 1)
    outcome, kept = np.zeros(len(masks), int), []
    for i in np.argsort(-confidence, kind="stable"):
        overlap = binary[kept] & binary[i]
        iou = overlap.sum(1) / np.maximum(area[kept] + area[i] - overlap.sum(1), 1)
        if area[i] < max(1, rules.min_area * binary.shape[1]):
            outcome[i] = SMALL
        elif confidence[i] < rules.min_confidence:
            outcome[i] = UNSURE
        elif (iou > rules.max_overlap).any():
            outcome[i] = DOUBLE
        else:
            kept.append(i)
    return outcome, confidence


def test_the_rules_are_those_of_a_plain_loop():
    rng, seen = np.random.default_rng(0), set()
    for _ in range(40):
        height, width = rng.integers(3, 9, 2)
        centres = rng.normal(0, 2, (4, 1, height, width))
        logits = (centres + rng.normal(0, 0.7, (4, 6, height, width))).reshape(24, height, width)
        logits[rng.random(24) < 0.2] -= 6
        rules = Rules(
            rng.uniform(0.3, 0.7), rng.uniform(0, 0.4), rng.uniform(0.5, 0.9), rng.uniform(0.2, 0.8)
        )
        padded = np.pad(logits, ((0, 0), (0, 9 - height), (0, 9 - width)), constant_values=5).astype(
            np.float32
        )
        outcome, confidence = choose(jnp.asarray(padded), jnp.array([height, width]), rules)
        expected, sure = reference(1 / (1 + np.exp(-logits.astype(np.float32))), rules)
        assert np.asarray(outcome).tolist() == expected.tolist()
        np.testing.assert_allclose(confidence, sure, atol=1e-6)
        seen |= set(expected)
    assert seen == {KEPT, SMALL, UNSURE, DOUBLE}


def painted(masks, **rules):
    masks = np.asarray(masks, np.float32)
    logits, size = np.where(masks > 0, 5, -5).astype(np.float32), masks.shape[1:]
    outcome, sure = np.zeros(len(masks), np.int32), np.full(len(masks), 0.99, np.float32)
    return pseudo_masks._paint(logits, sure, outcome, size, size, 1, Rules(**rules))


def test_parts_lie_in_front_and_what_they_hide_is_dropped():
    whole, part, most = np.zeros((3, 10, 10), np.float32)
    whole[1:9, 1:9], part[2:4, 2:4], most[1:9, 1:8] = 1, 1, 1
    segments, statistics = painted([part, whole])
    np.testing.assert_array_equal(segments, np.where(part > 0, 2, whole))
    assert statistics == Statistics(1, [0, 0, 1], [0] * 9 + [2], [0, 0, 0, 0], 0.64)
    segments, statistics = painted([most, part, whole])
    np.testing.assert_array_equal(segments, np.where(part > 0, 2, most))
    assert statistics.dropped == [0, 0, 0, 1] and sum(statistics.confidence) == 2
    assert painted([most, part, whole], min_visible=0.1).statistics.masks == [0, 0, 0, 1]
    nothing = painted(np.zeros((0, 10, 10)))
    assert not nothing.segments.any() and nothing.statistics.masks == [1]


@pytest.fixture
def stage(run, monkeypatch):
    monkeypatch.setitem(build.SOURCES, "coloured", f"{__name__}:Coloured")
    monkeypatch.setattr(build, "import_class", lambda *_: Coloured)
    source = dict(name="coloured")
    return lambda folder, **own: label_stage(
        epath.Path(folder), **dict(teacher="run", source=source, shard_size=2, batch_size=2) | own
    )


def test_a_stage_writes_shards_that_a_source_reads(stage, tmp_path, capsys):
    stage(tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    shards = [f"masks-{k:05d}-of-00003.zip" for k in range(3)]
    assert files == sorted([*shards, "sheet.png", "statistics.json"])
    found = Statistics(**json.loads((tmp_path / "out" / "statistics.json").read_text()))
    assert found.images == 5 and found.masks == [0, 2, 2, 1] and 4.8 < found.covered <= 5
    assert str(found) in capsys.readouterr().out
    source = make_source(dict(name="coloured", masks=str(tmp_path / "out")))
    assert [int(source[k]["segments"].max()) for k in range(5)] == [1, 1, 3, 1, 2]
    assert source[1]["class_ids"].tolist() == [3]  # its own
    columns = source[2]["segments"][0]
    assert len(set(columns[[0, 20, 39]])) == 3 and source[2]["class_ids"].tolist() == [-1] * 3
    assert source[2]["boxes"].shape == (3, 4) and source.extent() == (24, 40, 3)
    alone = make_source(dict(name="coloured", fields=["image", "captions"], masks=str(tmp_path / "out")))
    assert int(alone[1]["segments"].max()) == 2 and alone[1]["class_ids"].tolist() == [-1, -1]


def test_a_stage_makes_only_the_shards_that_are_missing(stage, run, tmp_path):
    out = tmp_path / "out"
    stage(out)
    whole = {path.name: path.read_bytes() for path in out.glob("*.zip")}
    stage(out)
    assert len(run.loaded) == 1
    (out / "masks-00001-of-00003.zip").unlink()
    kept = (out / "masks-00000-of-00003.zip").stat().st_mtime_ns
    stage(out)
    assert len(run.loaded) == 2 and (out / "masks-00000-of-00003.zip").stat().st_mtime_ns == kept
    members = lambda content: {i.filename: i.CRC for i in zipfile.ZipFile(io.BytesIO(content)).infolist()}
    again = {path.name: members(path.read_bytes()) for path in out.glob("*.zip")}
    assert again == {name: members(content) for name, content in whole.items()}
    with pytest.raises(UserError, match=r"made with another threshold: 0\.5, not 0\.6; delete"):
        stage(out, threshold=0.6)


def test_unreadable_images_are_named_and_labelled_after_their_repair(stage, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(globals(), "BROKEN", {1, 2})
    with pytest.raises(UserError, match="2 images of coloured could not be read"):
        stage(tmp_path / "out")
    assert "image 1 is damaged" in capsys.readouterr().err
    source = make_source(dict(name="coloured", fields=["image"], masks=str(tmp_path / "out")))
    assert read_shard(tmp_path / "out/masks-00001-of-00003.zip").skipped == [2]
    monkeypatch.setitem(globals(), "BROKEN", set())
    assert source[2]["segments"].max() == 0 and len(source[2]["class_ids"]) == 0
    stage(tmp_path / "out")
    assert make_source(dict(name="coloured", masks=str(tmp_path / "out")))[2]["segments"].max() == 3


def test_devices_share_a_batch(stage, tmp_path, monkeypatch):
    stage(tmp_path / "many")
    monkeypatch.setattr(pseudo_masks.jax, "local_devices", lambda: [])
    stage(tmp_path / "one")
    masks = [PseudoMasks(Coloured(), tmp_path / name) for name in ("many", "one")]
    for k in range(5):
        np.testing.assert_array_equal(masks[0][k]["segments"], masks[1][k]["segments"])


def test_masks_of_another_source_are_refused(stage, tmp_path, monkeypatch):
    stage(tmp_path / "out")
    source = lambda: make_source(dict(name="coloured", fields=["image"], masks=str(tmp_path / "out")))
    monkeypatch.setitem(globals(), "NAMES", "d")
    with pytest.raises(UserError, match="image 0 was 'c-0' and is now 'd-0'; label them anew"):
        source()[0]
    (tmp_path / "out/masks-00002-of-00003.zip").unlink()
    with pytest.raises(UserError, match=r"the 2 shards in .* hold 4 images, but coloured has 5"):
        source()
    with pytest.raises(UserError, match="holds no pseudo-masks"):
        make_source(dict(name="coloured", masks=str(tmp_path)))
    with pytest.raises(UserError, match="shard_size=0"):
        stage(tmp_path / "other", shard_size=0)


def test_captions_alone_open_no_mask(stage, tmp_path, monkeypatch):
    stage(tmp_path / "out")
    source = make_source(dict(name="coloured", masks=str(tmp_path / "out")))
    unread = lambda _: pytest.fail("a mask was read")
    plain = Coloured.__getitem__
    closed = lambda self, index: replaced(plain(self, index), segments=unread, class_ids=unread)
    monkeypatch.setattr(Coloured, "__getitem__", closed)
    assert source[1]["captions"] == ["a colour"] and source[1]["image"].shape == (24, 40, 3)


def test_images_that_moved_are_labelled_anew(stage, tmp_path, monkeypatch):
    stage(tmp_path / "out")
    monkeypatch.setitem(globals(), "COLOURED", COLOURED[1:4])
    monkeypatch.setattr(Coloured, "__len__", lambda self: 3)
    monkeypatch.setitem(globals(), "NAMES", "d")
    stage(tmp_path / "out")
    source = make_source(dict(name="coloured", fields=["image"], masks=str(tmp_path / "out")))
    assert [int(source[k]["segments"].max()) for k in range(3)] == [2, 3, 1]
    assert len([*(tmp_path / "out").glob("*.zip")]) == 2
