"""The Python API, around a method whose answers are known."""

import functools
import itertools
import json

import jax
import numpy as np
import pytest
from fake_method import CLASSES, COLOURS, ColourMethod, blocks, config
from PIL import Image
from pycocotools import mask as coco

from ovseg_jax.configs import openseg
from ovseg_jax.data.images import fit_canvas, read_image
from ovseg_jax.decisions import maps
from ovseg_jax.errors import UserError
from ovseg_jax.inference import tiles
from ovseg_jax.inference.segmenter import Segmenter
from ovseg_jax.inference.tiles import Blender, Span, View, shares, spans
from ovseg_jax.kernels.resize import upsampling
from ovseg_jax.methods.openseg import OpenSeg
from ovseg_jax.protocols import only
from ovseg_jax.vocab.classes import ClassList, parse_labels
from ovseg_jax.vocab.vectors import ClassVectors
from ovseg_jax.vocab.words import WordList


@functools.cache  # one compilation for many tests
def make(size=32, *, stride=1, masks=True, **kwargs) -> Segmenter:
    method = ColourMethod(stride, masks)
    return Segmenter(method, method.init(jax.random.key(0)), config(size), CLASSES, **kwargs)


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("shape", [(32, 32), (64, 96), (13, 40), (200, 70)])
def test_blocks_of_colour_are_found(masks, shape):
    image = blocks(*shape, ["red", "green"], ["blue", "blue"])
    result = make(masks=masks).segment(image, "green; red; blue; black")
    truth = np.select([(image == COLOURS[c]).all(-1) for c in ("green", "red", "blue")], [0, 1, 2], -1)
    assert (result.label_map == truth).mean() > 0.9
    assert result.label_map[:2, :2].tolist() == [[1, 1], [1, 1]] and result.label_map[-1, -1] == 2
    assert result.labels == ["blue", "green", "red"] or result.labels == ["blue", "red", "green"]
    assert result.masks.shape == (3, *shape) and result.masks.sum() == (result.label_map >= 0).sum()
    assert result.areas.tolist() == result.masks.sum((1, 2)).tolist()
    assert (result.scores > 0.5).all() and (result.scores <= 1).all()
    for mask, score in zip(result.masks, result.scores, strict=True):
        np.testing.assert_allclose(result.confidence[mask].mean(), score, rtol=1e-5)


def test_a_category_scores_as_its_best_name_and_what_nobody_named_is_unknown():
    image = blocks(32, 32, ["red", "green", "blue", "black"])
    result = make().segment(image, "blue,red; green")
    assert result.label_map[0, ::8].tolist() == [0, 1, 0, -1]
    assert result.labels == ["blue", "green"]
    assert make().segment(image, "yellow").labels == []
    assert make().segment(image, "yellow").masks.shape == (0, 32, 32)
    assert (make().segment(image, "yellow", threshold=-1.0).label_map == 0).all()


@pytest.mark.parametrize("masks", [True, False])
def test_label_map_equals_equation_6_on_the_whole(masks):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (24, 32, 3), np.uint8)
    segmenter = make(32, masks=masks)
    canvas, fitted = fit_canvas(image, 32)
    assert fitted == (24, 32)
    prediction = segmenter.method.predict(segmenter.variables, canvas[None], np.array([fitted]))
    names = "red blue; green; yellow,white black"
    text, owner = np.asarray(only(segmenter.embed(names))), np.array([0, 1, 2, 2])
    if masks:
        s = 1 / (1 + np.exp(-np.float64(prediction.mask_logits[0])))
        y = np.einsum("kn,nhw->khw", text @ np.asarray(only(prediction.regions)[0]).T, s)
        confidence = y / np.maximum(s.sum(0), 1)
    else:
        y = confidence = np.einsum("kd,hwd->khw", text, np.asarray(only(prediction.pixels)[0]) / 3)
    expected = np.where(confidence.max(0) >= 0.04, owner[y.argmax(0)], -1)[:24]
    result = segmenter.segment(image, names)
    np.testing.assert_array_equal(result.label_map, expected)
    np.testing.assert_allclose(result.confidence, confidence.max(0)[:24], atol=1e-5)


def test_many_categories_go_in_blocks_and_of_equal_ones_the_first_wins():
    labels = ["black"] * 150 + ["red", "red", "green"]
    result = make().segment(blocks(8, 8, ["red", "green"]), labels)
    assert result.label_map[0, 0] == 150 and result.label_map[0, -1] == 152


@pytest.mark.parametrize("masks", [True, False])
def test_of_many_names_most_are_left_out_without_a_difference(masks, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "v.npz", words=[f"w{i}" for i in range(1500)], vectors=rng.random((1500, 6)))
    image = blocks(96, 130, ["red", "green", "white"], ["blue", "black", "yellow"])
    found = []
    for least in (1024, 1 << 30):
        monkeypatch.setattr(maps, "MANY", least)
        jax.clear_caches()  # of blocks of the same shape
        method = ColourMethod(4, masks)
        segmenter = Segmenter(method, method.init(None), config(32), CLASSES)
        found.append(segmenter.segment(image, tmp_path / "v.npz", threshold=-1.0))
    assert len(found[0].labels) > 3
    np.testing.assert_array_equal(found[0].label_map, found[1].label_map)
    np.testing.assert_array_equal(found[0].confidence, found[1].confidence)


@pytest.mark.parametrize("how", [{}, {"tile": (20, 4)}, {"decision": "panoptic"}, {"features": True}])
def test_several_devices_share_a_batch_and_give_the_same(how):
    rng = np.random.default_rng(0)
    images = [blocks(*rng.integers(20, 50, 2), ["red", "green"], ["blue", "white"]) for _ in range(5)]
    one, many = make(), make(devices=tuple(jax.devices()[:4]))
    assert len(jax.devices()) == 8 and make(devices=None).batch_size == 8
    for a, b in zip(one.segment(images, **how), many.segment(images, **how), strict=True):
        np.testing.assert_array_equal(a.label_map, b.label_map)
        np.testing.assert_array_equal(a.confidence, b.confidence)
        assert a.image is not b.image and (a.image == b.image).all()
        if how == {"features": True}:
            np.testing.assert_array_equal(a.features.pixels, b.features.pixels)


def test_every_way_of_writing_labels_gives_the_same(tmp_path):
    segmenter, image = make(32), blocks(16, 16, ["red", "green"])
    before = segmenter.method.embedded
    file = tmp_path / "labels.txt"
    file.write_text("3:red,blue\n9:green\n")
    written = ["red,blue; green", ["red,blue", "green"], [["red", "blue"], "green"], str(file), file]
    maps = [segmenter.segment(image, labels).label_map for labels in [*written, parse_labels(written[0])]]
    for label_map in maps[1:]:
        np.testing.assert_array_equal(label_map, maps[0])
    assert segmenter.method.embedded == before + 1  # one set of names, embedded once
    assert segmenter.segment(image, file).record()["segments"][0]["id"] == 3
    assert segmenter.segment(image).classes == CLASSES


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("", "no labels"),
        ([], "no labels"),
        ("red;;blue", "category 2"),
        (["red", ""], "no labels"),
        ([["red", " "]], "empty category"),
        (["red", ()], "empty category"),
        ("red; hovercraft", "hovercraft"),
        ("missing.txt", "missing.txt"),
        (ClassList((), (), ()), "empty"),
    ],
)
def test_labels_that_cannot_be(labels, message):
    with pytest.raises(UserError, match=message):
        make().segment(blocks(8, 8, ["red"]), labels)


@pytest.mark.parametrize("given", [dict(protocol="voc"), dict(decision="argmax")])
def test_a_rule_of_its_own_takes_no_threshold(given):
    with pytest.raises(UserError, match=f"{next(iter(given))} decides by its own rule: leave out threshold"):
        make().segment(blocks(8, 8, ["red"]), "red", threshold=0.5, **given)


def test_without_labels_of_its_own_it_asks_for_some():
    method = ColourMethod()
    with pytest.raises(UserError, match="no labels were given"):
        Segmenter(method, method.init(None), config()).segment(blocks(8, 8, ["red"]))


def test_labels_that_come_with_their_vectors(tmp_path):
    segmenter, image = make(), blocks(32, 32, ["red", "green", "blue", "black"])
    path, names = tmp_path / "v.npz", ["stop sign", "a,b;c", "stop sign"]
    vectors = 3 * np.asarray(only(segmenter.embed("green; red; blue")))
    np.savez(path, words=names, vectors=vectors)
    expected = segmenter.segment(image, "green; red; blue")
    for labels in (path, str(path), ClassVectors.of(path)):
        found = segmenter.segment(image, labels)
        np.testing.assert_array_equal(found.label_map, expected.label_map)
        np.testing.assert_allclose(found.confidence, expected.confidence, atol=1e-6)
    assert found.classes.names == (("stop sign",), ("a,b;c",), ("stop sign",))
    # Words of the same names are still words.
    np.savez(path, words=["red", "green"], vectors=vectors[:2])
    assert segmenter.segment(image, path).label_map[0, ::8].tolist() == [1, 0, -1, -1]
    assert segmenter.segment(image, "red; green").label_map[0, ::8].tolist() == [0, 1, -1, -1]


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.ones((2, 7)), "labels: their vectors have 7 numbers, but this model's"),
        (np.zeros((2, 3)), "zero or not finite"),
        (np.ones((0, 3)), "v.npz cannot be read"),
        (np.ones((3, 3)), r"\(3, 3\), which does not fit 'words' \(2,\)"),
        (None, "no such file"),
        (b"PK\x03\x04 cut off", "v.npz cannot be read"),
        (b"hello", "v.npz cannot be read"),
        ("npy", "v.npz cannot be read: it is not an .npz file"),
    ],
)
def test_vectors_that_cannot_be(tmp_path, vectors, message):
    path = tmp_path / "v.npz"
    if isinstance(vectors, bytes):
        path.write_bytes(vectors)
    elif isinstance(vectors, str):
        with path.open("wb") as file:
            np.save(file, np.ones(3))
    elif vectors is not None:
        np.savez(path, words=["red", "green"][: len(vectors)], vectors=vectors)
    with pytest.raises(UserError, match=message):
        make().segment(blocks(32, 32, ["red"]), path)


def test_images_go_in_batches_and_a_batch_changes_nothing():
    images = [blocks(10 + 7 * i, 40 - 3 * i, ["red", "blue"], ["green", "white"]) for i in range(5)]
    together = make(batch_size=4).segment(images)
    segmenter = make(batch_size=1)
    for image, result in zip(images, together, strict=True):
        alone = segmenter.segment(image)
        np.testing.assert_array_equal(result.image, image)
        np.testing.assert_array_equal(result.label_map, alone.label_map)
        np.testing.assert_allclose(result.confidence, alone.confidence, atol=1e-6)
    assert make().segment([]) == []


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize(
    ("shape", "tile"), [((90, 70), (32, 8)), ((33, 200), (32, 0)), ((150, 32), (32, 20))]
)
def test_tiles_at_the_models_own_scale_equal_the_whole_at_that_scale(masks, shape, tile):
    """A method without context sees the same in a tile as in the whole, so blending must change nothing."""
    rng = np.random.default_rng(1)
    image = blocks(*shape, ["red", "green", "blue"], ["yellow", "black", "red"])
    image = np.clip(image + rng.normal(0, 40, image.shape), 0, 255).astype(np.uint8)
    whole = make(256, masks=masks, batch_size=3)
    tiled = make(32, masks=masks, batch_size=3).segment(image, tile=tile)
    expected = whole.segment(blocks_on_canvas(image, 256))
    same = tiled.label_map == expected.label_map[: shape[0], : shape[1]]
    assert same.mean() > 0.999
    np.testing.assert_allclose(tiled.confidence, expected.confidence[: shape[0], : shape[1]], atol=1e-4)


@pytest.mark.parametrize("sure", [True, False])
def test_many_names_in_tiles_of_pixel_features_equal_numpy(monkeypatch, sure):
    """With bounds where most names cannot win, and where none can be left out; four tiles, of which some overlap."""
    rng = np.random.default_rng(0)
    names, side, size = 1500, 8, (100, 180)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    text = unit(rng.normal(size=(names, 32))).astype(np.float32)
    rows, columns = spans(size[0], (64, 16)), spans(size[1], (128, 32))
    blender, total = Blender(rows, columns), np.zeros((names, *size))
    of_rows, of_columns = (dict(zip(axis, shares(axis), strict=True)) for axis in (rows, columns))
    groups, made = tiles._groups, []
    monkeypatch.setattr(tiles, "_groups", lambda *x: made.append(groups(*x)) or made[-1])
    monkeypatch.setattr(maps, "FEW_CELLS", 4)
    for row in rows:
        for column in columns:
            own = text[rng.integers(0, names, (2, 2)).repeat(4, 0).repeat(4, 1)] if sure else 0
            features = unit(own + 0.1 * rng.normal(size=(side, side, 32))).astype(np.float32)
            layers = maps.Layers(
                jax.numpy.asarray(text), jax.numpy.asarray(features.transpose(2, 0, 1)), None, False
            )
            done = blender.add(View(row, column, 64, (64, 64), layers))
            up = [
                np.float64(
                    upsampling(
                        s.stop - s.start, side, 64, jax.numpy.int32(64), jax.numpy.int32(s.stop - s.start)
                    )
                )
                for s in (row, column)
            ]
            score = np.einsum(
                "rh,hwd,cw,td->trc", up[0], np.float64(features), up[1], np.float64(text), optimize=True
            )
            total[:, slice(*row), slice(*column)] += score * of_rows[row][:, None] * of_columns[column]
    blender.finish()
    assert done and len(made) == 2 and blender.name.dtype == np.uint16
    assert (blender.name == total.argmax(0)).mean() > 0.999
    np.testing.assert_allclose(blender.confidence, total.max(0), atol=1e-5)


def blocks_on_canvas(image, size):
    canvas = np.zeros((size, size, 3), np.uint8)
    canvas[: image.shape[0], : image.shape[1]] = image
    return canvas


def test_an_image_that_fits_one_tile_is_not_changed_by_tiling():
    image = np.random.default_rng(2).integers(0, 256, (50, 60, 3), np.uint8)
    segmenter = make(32, stride=2)
    plain, tiled = segmenter.segment(image), segmenter.segment(image, tile=(60, 10))
    np.testing.assert_array_equal(plain.label_map, tiled.label_map)
    np.testing.assert_array_equal(plain.confidence, tiled.confidence)


def test_tiles_of_one_row_and_a_few_are_kept(monkeypatch):
    """Of an image of 4 rows of 20 tiles: a block of pixels is scored as soon as its tiles are there."""
    kept, add = [], Blender.add
    monkeypatch.setattr(tiles, "BLOCK_COLUMNS", 64)

    def counting(self, view):
        done = add(self, view)
        kept.append(len(self._views))
        return done

    monkeypatch.setattr(Blender, "add", counting)
    image = blocks(104, 488, ["red", "green", "blue"], ["yellow", "black", "red"])
    result = make(32, batch_size=3).segment(image, tile=(32, 8))
    assert len(kept) == 4 * 20 and kept[-1] == 0 and max(kept) <= 20 + 5
    assert (result.label_map == make(32, batch_size=3).segment(image, tile=(32, 0)).label_map).mean() > 0.99


def test_the_network_takes_less_memory_for_tiles():
    """As planned by the compiler for OpenSeg's network: its operations run one after another there."""
    words = ["cat", "dog"]
    method = OpenSeg(openseg.get_config(), WordList(words), parse_labels(";".join(words)))
    segmenter = Segmenter(method, jax.jit(method.init)(jax.random.key(0)), method.config)
    inputs = np.zeros((1, 64, 64, 3), np.uint8), np.full((1, 2), 64, np.int32)
    whole, tile = (
        run.lower(segmenter.variables, *inputs).compile()
        for run in (segmenter._predict, segmenter._predict_tiles)
    )
    assert tile.memory_analysis().temp_size_in_bytes < whole.memory_analysis().temp_size_in_bytes
    for a, b in zip(
        *(jax.tree.leaves(run(segmenter.variables, *inputs)) for run in (whole, tile)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_tiles_see_what_the_whole_is_too_coarse_for():
    image = blocks(256, 256, ["red"])
    image[100:104, 100:104] = COLOURS["blue"]
    segmenter = make(32, stride=2)
    assert segmenter.segment(image).labels == ["red"]
    assert segmenter.segment(image, tile=(32, 8)).labels == ["red", "blue"]


@pytest.mark.parametrize(
    ("length", "tile"), [(100, (32, 8)), (33, (32, 0)), (640, (256, 128)), (65, (32, 31))]
)
def test_spans_cover_an_axis_and_their_shares_add_up_to_one(length, tile):
    axis = spans(length, tile)
    assert axis[0].start == 0 and axis[-1].stop == length
    total = np.zeros(length)
    for span, share in zip(axis, shares(axis), strict=True):
        assert span.stop - span.start == tile[0] and (share > 0).all()
        total[span.start : span.stop] += share
    np.testing.assert_allclose(total, 1)
    assert all(a.stop - b.start >= tile[1] for a, b in itertools.pairwise(axis))


def test_spans_of_what_fits_and_of_tiles_that_cannot_be():
    assert spans(20, (32, 8)) == spans(20, None) == [Span(0, 20)]
    for tile in [(0, 0), (8, 8), (8, -1)]:
        with pytest.raises(UserError, match="overlap"):
            spans(100, tile)


@pytest.mark.parametrize("masks", [True, False])
def test_features_give_the_same_segmentation(masks):
    image = blocks(40, 20, ["red", "green"], ["blue", "white"])
    segmenter = make(32, stride=2, masks=masks)
    features = segmenter.features(image)
    assert features.pixels.shape == (16, 8, 6) and features.size == (40, 20)
    assert features.embedding.shape == (16, 8, 6)
    assert (features.masks is None) == (not masks)
    if masks:
        assert features.masks.shape == (6, 16, 8)
        np.testing.assert_allclose(np.linalg.norm(features.regions, axis=-1), 1, rtol=1e-5)
    proposals = features.proposals()
    assert (proposals is None) == (not masks) and (proposals is None or proposals.shape == (40, 20))
    names = "red; green; blue; white"
    full = features.at_image_size()
    assert full.shape == (40, 20, 6)
    result = segmenter.segment(image, names, features=True)
    np.testing.assert_array_equal(result.features.pixels, features.pixels)
    with pytest.raises(UserError, match="leave out tile"):
        segmenter.segment(image, names, features=True, tile=(16, 4))
    label_map = (full @ np.asarray(only(segmenter.embed(names))).T).argmax(-1)
    known = result.label_map >= 0
    assert (label_map == result.label_map)[known].mean() > 0.97
    assert len(segmenter.features([image, image])) == 2


def test_features_are_saved_as_documented(tmp_path):
    make().features(blocks(32, 16, ["red"])).save(tmp_path / "x.npz")
    saved = np.load(tmp_path / "x.npz")
    assert set(saved) == {"pixels", "embedding", "masks", "regions", "size", "fitted", "stride"}
    assert saved["pixels"].dtype == np.float16 and saved["size"].tolist() == [32, 16]


def test_record_holds_coco_rle_boxes_and_scores():
    image = blocks(40, 60, ["red", "green", "red"], ["red", "red", "red"])
    result = make(64).segment(image, "green; red,yellow")
    record = json.loads(result.to_json())
    assert (record["height"], record["width"]) == (40, 60)
    red, green = record["segments"]
    assert (red["category"], red["names"], red["category_id"]) == ("red", ["red", "yellow"], 2)
    decoded = coco.decode(green["segmentation"])
    np.testing.assert_array_equal(decoded, result.label_map == 0)
    assert green["area"] == decoded.sum() == (result.label_map == 0).sum()
    ys, xs = np.nonzero(decoded)
    box = [xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()]
    assert green["bbox"] == box
    assert record["unknown_area"] == (result.label_map < 0).sum()


def test_save_writes_pictures_that_read_back(tmp_path):
    image = blocks(30, 20, ["red", "green"])
    result = make().segment(image, "green; red")
    paths = result.save(tmp_path / "new", "a")
    assert [p.name for p in paths] == ["a.labels.png", "a.json", "a.overlay.png"]
    labels = np.asarray(Image.open(paths[0]))
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels.astype(int) - 1, result.label_map)
    many = make().segment(image, ["black"] * 300 + ["red"])
    assert np.asarray(many.label_image()).max() == 301 and many.label_image().mode == "I;16"
    assert Image.open(paths[2]).width >= 300


def test_images_of_every_kind_read_as_rgb(tmp_path):
    rgb = blocks(10, 20, ["red", "blue"])
    grey = np.tile(np.arange(20, dtype=np.uint8) * 12, (10, 1))
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    Image.fromarray(rgb).quantize(4).save(tmp_path / "palette.png")
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    Image.fromarray(np.dstack([rgb, np.full((10, 20), 255, np.uint8)])).save(tmp_path / "rgba.png")
    clear = np.dstack([rgb, np.zeros((10, 20), np.uint8)])
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees to view
    Image.fromarray(rgb).save(tmp_path / "turned.png", exif=exif)

    for name in ("rgb", "palette", "rgba"):
        assert np.abs(read_image(tmp_path / f"{name}.png").astype(int) - rgb).max() <= 16, name
    for name in ("grey", "sixteen"):
        np.testing.assert_array_equal(read_image(str(tmp_path / f"{name}.png")), np.dstack([grey] * 3))
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png"), np.rot90(rgb, -1))
    assert (read_image(clear) == 255).all()
    np.testing.assert_array_equal(read_image(rgb / 255), rgb)
    np.testing.assert_array_equal(read_image(Image.fromarray(grey)), read_image(grey[..., None]))


def test_what_is_no_image(tmp_path):
    good = tmp_path / "good.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(good)
    cut, text = tmp_path / "cut.jpg", tmp_path / "text.jpg"
    cut.write_bytes(good.read_bytes()[:1500])
    text.write_text("no picture")
    cases = [(cut, "truncated"), (text, "not an image"), (tmp_path / "none.jpg", "there is no such file")]
    cases += [(tmp_path, "cannot be read"), (3, "not a int"), (np.zeros((4, 4, 5), np.uint8), "shape")]
    cases += [
        (np.full((4, 4), 7.0), "0..1"),
        (np.full((4, 4), np.nan), "0..1"),
        (np.zeros((4, 4), int), "int64"),
    ]
    cases += [
        (np.zeros((0, 4), np.uint8), "shape"),
        (Image.fromarray(np.full((4, 4), 0.5, np.float32)), "mode"),
    ]
    for image, message in cases:
        with pytest.raises(UserError, match=message):
            make().segment(image)
