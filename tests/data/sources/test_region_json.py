"""Images with one JSON file each: in folders and zips, with other keys, and what is missing."""

import json
import pickle
import zipfile

import numpy as np
import pytest

from ovseg_jax.data.images import Encoded, read_image
from ovseg_jax.data.rows import Rows
from ovseg_jax.data.sources.build import make_source
from ovseg_jax.data.sources.region_json import RegionJson
from ovseg_jax.errors import UserError
from ovseg_jax.towers.vocabulary import SPOKEN, spoken_words
from ovseg_jax.vocab.word_tokenizer import WordTokenizer
from tests.datasets.packing import as_json, jpeg


def told(k):
    return {
        "captions": [f"dog {k}", " a  dog "],
        "tags": ["dog", ""],
        "regions": [
            {"bbox": [1, 0, 4.5, 3], "captions": "a paw", "tags": ["paw", "leg"]},
            {"bbox": [0, 2, 6, 6], "captions": ["grass", f"green grass {k}"], "tags": "grass"},
        ],
    }


@pytest.fixture
def folder(tmp_path):
    """Five annotations and four images, in two folders and a zip each."""
    for root in ("told", "shown"):
        (tmp_path / root / "00").mkdir(parents=True)
        (tmp_path / root / "__MACOSX").mkdir()
        (tmp_path / root / "__MACOSX" / "x.json").write_text("no")
    for k in range(3):
        (tmp_path / f"told/00/{k}.json").write_bytes(as_json(told(k)))
    for k in (0, 2):
        (tmp_path / f"shown/00/{k}.JPG").write_bytes(jpeg(6 + k, 8, k))
    with zipfile.ZipFile(tmp_path / "told/a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for k in (3, 4):
            archive.writestr(f"01/{k}.json", as_json(told(k)))
    with zipfile.ZipFile(tmp_path / "shown/b.zip", "w") as archive:
        archive.writestr("01/4.jpg", jpeg(10, 8, 4))
        archive.writestr("01/5.jpg", jpeg(11, 8, 5))
    return tmp_path


def test_folders_and_zips(folder, caplog):
    config = dict(name="region_json", data_dir=str(folder / "told"), images=str(folder / "shown"))
    source = pickle.loads(pickle.dumps(make_source(config)))
    assert "2 of 5 JSON files have no image in" in caplog.text and "such as 00/1.json" in caplog.text
    assert "shown: 1 images have no JSON file" in caplog.text
    assert source.provides == {"image", "captions", "tags", "boxes", "region_captions", "region_tags"}
    assert [source[k]["image_id"] for k in range(len(source))] == ["00/0", "00/2", "01/4"]
    for place, k in enumerate((0, 2, 4)):
        example = source[place]
        np.testing.assert_array_equal(example["image"], read_image(Encoded("", jpeg(6 + k, 8, k))))
        assert example["captions"] == [f"dog {k}", "a dog"] and example["tags"] == ["dog"]
        np.testing.assert_array_equal(example["boxes"], np.float32([[1, 0, 4.5, 3], [0, 2, 6, 6]]))
        assert example["region_captions"] == [["a paw"], ["grass", f"green grass {k}"]]
        assert example["region_tags"] == [["paw", "leg"], ["grass"]]
    assert source.extent() == (10, 8, 0)
    assert list(source.captions())[:3] == ["dog 0", "a dog", "dog 2"]
    assert list(source.texts("region_tags"))[:3] == ["paw", "leg", "grass"]
    assert not [*source.texts("boxes")]
    words = spoken_words({}, source, SPOKEN)
    data = dict(image_size=16, max_boxes=3, flip=False)
    fields = ("image", "boxes", "box_tokens", "box_tags", "tags", "tokens")
    row = Rows.from_config(
        dict(seed=0, steps=1, batch_size=1, data=data), fields, words, WordTokenizer(words, 6)
    )(0, source[2])
    # 10 x 8 pixels are 16 x 13 on a canvas of 16; the largest box first.
    boxes = np.float32([[0, 2, 6, 6], [1, 0, 4.5, 3]]) * np.float32([13 / 8, 16 / 10] * 2)
    np.testing.assert_allclose(row["boxes"][:2], boxes, atol=1e-5)
    assert row["box_valid"].tolist() == [True, True, False]


def test_archives_that_are_not_read_are_named(folder, caplog):
    """As UMG-41M is published, with a tar beside its zips."""
    (folder / "told/YFCC15M.tar.gz").write_bytes(b"")
    make_source(dict(name="region_json", data_dir=str(folder / "told"), images=str(folder / "shown")))
    assert "archives that are not read: 1, such as YFCC15M.tar.gz: unpack them" in caplog.text


def test_other_keys_and_forms(tmp_path):
    content = {
        "image": {"texts": [{"t": "one"}, {"t": "two"}]},
        "objects": {
            "o": [{"xywh": [0.25, 0.5, 0.5, 0.25], "label": "dog"}, {"label": "cat", "xywh": [1, 1, -1, 0]}]
        },
    }
    (tmp_path / "x.json").write_text(json.dumps(content))
    (tmp_path / "x.jpg").write_bytes(jpeg(8, 16, 0))
    paths = dict(
        captions="image.texts.t",
        tags="",
        regions="objects.o",
        box="xywh",
        region_captions="",
        region_tags="label",
    )
    source = RegionJson(tmp_path, paths=paths, boxes="xywh", unit="shares")
    assert source.provides == {"image", "captions", "boxes", "region_tags"}
    example = source[0]
    assert example["captions"] == ["one", "two"] and example["region_tags"] == [["dog"], ["cat"]]
    np.testing.assert_array_equal(example["boxes"], [[4, 4, 12, 6], [16, 8, 16, 8]])
    none = RegionJson(tmp_path, paths=dict(captions="image.texts.t", tags="", regions=""))
    assert none.provides == {"image", "captions"} and none[0]["captions"] == ["one", "two"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(data_dir="none"), "'none' is not a folder"),
        (
            dict(paths=dict(box="b")),
            "has 'box' at 'regions.b' .*x.json has the keys 'captions', 'tags', 'regions'",
        ),
        (dict(paths=dict(boxes="b")), "paths has no key 'boxes'; known keys: captions, tags, regions, box"),
        (dict(boxes="yxyx"), "boxes='yxyx' is not one of xyxy, xywh"),
        (dict(unit="cm"), "unit='cm' is not one of pixels, shares"),
        (dict(paths=dict(captions="tags.x")), "'tags.x': expected an object with the key 'x', got 'dog'"),
    ],
)
def test_mistakes(tmp_path, arguments, message):
    (tmp_path / "x.json").write_bytes(as_json(told(0)))
    (tmp_path / "x.jpg").write_bytes(jpeg(8, 16, 0))
    with pytest.raises(UserError, match=message):
        RegionJson(**{"data_dir": tmp_path, **arguments})


def test_nothing_fits(tmp_path):
    with pytest.raises(UserError, match="hold no JSON file"):
        RegionJson(tmp_path)
    (tmp_path / "x.json").write_bytes(as_json(told(0)))
    with pytest.raises(UserError, match="hold no image"):
        RegionJson(tmp_path)
    (tmp_path / "y.jpg").write_bytes(jpeg(8, 16, 0))
    with pytest.raises(UserError, match=r"none of the 1 JSON files .* the first are x\.json and y\.jpg"):
        RegionJson(tmp_path)
    (tmp_path / "x.jpg").write_bytes(b"")
    (tmp_path / "x.json").write_bytes(as_json(told(0)))
    with pytest.raises(UserError, match=r"x\.jpg"):
        RegionJson(tmp_path)[0]["image"]
    one = told(0)
    del one["regions"][0]["bbox"]
    (tmp_path / "x.json").write_bytes(as_json(one))
    with pytest.raises(UserError, match=r"x\.json: a region has no 'bbox'"):
        RegionJson(tmp_path)[0]["boxes"]
    (tmp_path / "x.json").write_text('{"captions": [3]}')
    with pytest.raises(UserError, match=r"x\.json.*'captions': expected a text"):
        RegionJson(tmp_path)
