"""Geometry of images, masks and boxes: crops as torchvision draws them, flips, and rows of images of one class."""

import numpy as np
import pytest
from PIL import Image

from ovseg_jax.data import transforms
from ovseg_jax.data.evaluation import ClassifyEval
from ovseg_jax.data.geometry import RandomCrop, ScaleJitter, geometry_of, random_crop
from ovseg_jax.data.images import centre_square
from ovseg_jax.data.rows import Rows
from ovseg_jax.data.source_base import Source
from ovseg_jax.errors import UserError
from ovseg_jax.vocab.classes import ClassList
from tests.extras import require

WHOLE = dict(crop=(1.0, 1.0), randaugment=0)


def make_config(**augment):
    return {"seed": 3, "steps": 9, "batch_size": 4, "data": {"image_size": 16, "augment": augment}}


def labelled(config):
    return Rows.from_config(config, ("image", "label"))


def photo(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("size", [(37, 90), (90, 37), (64, 64), (50, 51), (8, 9), (16, 16), (31, 16)])
def test_centre_square_is_torchvisions(size):
    theirs = require("torchvision.transforms")
    image = photo(*size)
    bicubic = theirs.InterpolationMode.BICUBIC
    crop = theirs.Compose([theirs.Resize(16, bicubic), theirs.CenterCrop(16)])
    np.testing.assert_array_equal(centre_square(image, 16), np.asarray(crop(Image.fromarray(image))))


def test_resized_crop_is_torchvisions():
    theirs = require("torchvision.transforms.functional")
    image = photo(70, 50)
    for seed in range(5):
        place = random_crop(70, 50, (0.08, 1.0), np.random.default_rng(seed))
        crop = RandomCrop(16, flip=False, randaugment=0)
        expected = theirs.resized_crop(
            Image.fromarray(image), *place, (16, 16), theirs.InterpolationMode.BICUBIC
        )
        moved, flipped = crop({"image": image}, np.random.default_rng(seed))
        np.testing.assert_array_equal(moved["image"], np.asarray(expected))
        assert not flipped and moved["image_size"].tolist() == [16, 16]


@pytest.mark.parametrize("share", [(0.08, 1.0), (0.6, 0.6)])
def test_crops_are_drawn_as_by_torchvision(share):
    theirs, torch = require("torchvision.transforms"), require("torch")
    torch.manual_seed(0)
    rng, image = np.random.default_rng(0), Image.new("RGB", (120, 80))
    ours = np.array([random_crop(80, 120, share, rng) for _ in range(3000)], float)
    reference = [theirs.RandomResizedCrop.get_params(image, share, (3 / 4, 4 / 3)) for _ in range(3000)]
    quantiles = np.linspace(0.05, 0.95, 10)
    for values in (lambda x: x[:, 0] / 80, lambda x: x[:, 1] / 120, lambda x: x[:, 2] * x[:, 3] / 9600,
                   lambda x: x[:, 3] / x[:, 2] / 2):  # fmt: skip
        a, b = (np.quantile(values(np.array(x, float)), quantiles) for x in (ours, reference))
        np.testing.assert_allclose(a, b, atol=0.035)


@pytest.mark.parametrize("size", [(10, 400), (400, 10), (3, 7)])
def test_a_crop_that_never_fits_is_the_middle(size):
    theirs = require("torchvision.transforms")
    expected = theirs.RandomResizedCrop.get_params(Image.new("RGB", size[::-1]), (1.0, 1.0), (3 / 4, 4 / 3))
    assert random_crop(*size, (1.0, 1.0), np.random.default_rng(0)) == tuple(expected)


def test_half_are_mirrored():
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, :8] = 255
    transform = labelled(make_config(**WHOLE))
    rows = [transform(index, {"image": image, "label": 2})["image"] for index in range(400)]
    mirrored = [row[:, 0].max() < 128 for row in rows]
    assert 0.4 < np.mean(mirrored) < 0.6
    plain = labelled(make_config(**WHOLE, flip=False))
    assert all(plain(index, {"image": image, "label": 2})["image"][0, 0, 0] > 128 for index in range(50))


@pytest.mark.parametrize("policy", ["torchvision", "dassl"])
def test_a_row_is_a_function_of_seed_index_and_example(policy):
    config, example = make_config(policy=policy), {"image": photo(30, 40), "label": 4}
    before = example["image"].copy()
    transform = labelled(config)
    rows = [transform(index, example) for index in range(20)]
    np.testing.assert_array_equal(example["image"], before)
    for index in (3, 11):
        again = labelled(config)(index, example)
        assert all((again[key] == rows[index][key]).all() for key in again)
    assert {k: (v.dtype.name, v.shape) for k, v in rows[0].items()} == {
        "image": ("uint8", (16, 16, 3)), "image_size": ("int32", (2,)), "label": ("int32", ()),
        "example_mask": ("bool", ()),
    }  # fmt: skip
    assert rows[0]["label"] == 4 and len({row["image"].tobytes() for row in rows}) == 20
    other = labelled({**config, "seed": 4})(3, example)
    assert (other["image"] != rows[3]["image"]).any()


def scene(height=45, width=70):
    """Three segments on void."""
    segments = np.zeros((height, width), np.int32)
    segments[5:20, 10:30], segments[15:40, 25:60], segments[30:, :8] = 1, 2, 3
    return {
        "image": photo(height, width),
        "segments": segments,
        "boxes": transforms.segment_boxes(segments, 3),
    }


@pytest.mark.parametrize("geometry", [RandomCrop(32, (0.2, 0.9), True, 0), ScaleJitter(32, (0.6, 2.0))])
def test_boxes_and_segments_move_with_the_image(geometry):
    example = scene()
    # The image tells where each pixel comes from: segments in red.
    example["image"] = np.repeat((example["segments"] * 80).astype(np.uint8)[..., None], 3, -1)
    flips = set()
    for seed in range(30):
        moved, flipped = geometry(example, np.random.default_rng(seed))
        flips.add(flipped)
        again = transforms.segment_boxes(moved["segments"], 3)
        visible = np.bincount(moved["segments"].ravel(), minlength=4)[1:] > 0
        # All segments are rectangles but the first, of which the second hides a corner.
        whole = visible & (np.arange(3) > 0)
        assert np.abs(again - moved["boxes"])[whole].max(initial=0) <= 1.0
        sides = moved["boxes"][:, 2:] - moved["boxes"][:, :2]
        assert (sides[~visible].min(1) <= 1.0).all()
        inside = np.lib.stride_tricks.sliding_window_view(moved["segments"], (5, 5))
        even = inside.min((2, 3)) == inside.max((2, 3))
        off = moved["image"][2:-2, 2:-2, 0].astype(int) - moved["segments"][2:-2, 2:-2] * 80
        assert (
            np.abs(off[even]).max(initial=0) <= 24
        )  # a bicubic filter of two pixels of the source reaches farther
    assert flips == {True, False}
    alone, _ = geometry({"image": example["image"]}, np.random.default_rng(3))
    both, _ = geometry(example, np.random.default_rng(3))
    np.testing.assert_array_equal(alone["image"], both["image"])
    assert set(alone) == {"image", "image_size"}


def test_one_geometry_is_asked_for():
    with pytest.raises(UserError, match=r"leave out data\.scale_jitter and data\.flip"):
        geometry_of({"image_size": 16, "augment": {}, "flip": False}, False)
    with pytest.raises(UserError, match=r"randaugment=2 transforms images without their masks and boxes"):
        geometry_of({"image_size": 16, "augment": {}}, True)


class Pair(Source):
    name, classes, provides = "pair", ClassList((), (), ()), frozenset({"image", "label"})

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"image": photo(20 + index, 30), "label": index + 1}


def test_evaluation_rows():
    evaluate = ClassifyEval.from_config({"image_size": 16}, Pair())
    row, padding = evaluate(1), evaluate(-1)
    assert {k: (v.dtype.name, v.shape) for k, v in row.items()} == {
        "image": ("uint8", (16, 16, 3)), "label": ("int32", ()), "index": ("int32", ()), "example_mask": ("bool", ()),
    }  # fmt: skip
    assert row["label"] == 2 and row["index"] == 1 and row["example_mask"]
    np.testing.assert_array_equal(row["image"], centre_square(photo(21, 30), 16))
    assert padding.keys() == row.keys() and not padding["image"].any() and not padding["example_mask"]
    assert padding["index"] == -1

    class Features(Pair):
        def __getitem__(self, index):
            return {"feature": np.ones(4, np.float32), "label": index}

    evaluate = ClassifyEval.from_config({"image_size": 16}, Features())
    assert evaluate(0)["feature"].shape == (4,) and not evaluate(-1)["feature"].any()


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (dict(crop=(0.5, 0.2)), "crop"),
        (dict(crop=(0.0, 1.0)), "crop"),
        (dict(randaugment=-1), "randaugment=-1"),
        (dict(policy="timm"), "'timm' is not one of torchvision, dassl"),
        (dict(colour=1), "no key 'colour'; known keys: crop, flip, randaugment, policy"),
    ],
)
def test_bad_settings(augment, message):
    with pytest.raises(UserError, match=message):
        labelled(make_config(**augment))


def test_a_crop_by_the_short_side():
    data = dict(image_size=16, short_side=dict(ratio=(2.0, 2.0), category_share=1.0, colours=False))
    geometry = geometry_of(data, True)
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, :20] = 200
    segments = (image[..., 0] > 0).astype(np.int32) + 1
    flips = set()
    for seed in range(30):
        out, flipped = geometry({"image": image, "segments": segments}, np.random.default_rng(seed))
        assert out["image"].shape == (16, 16, 3) and out["image_size"].tolist() == [16, 16]
        bright = out["image"][..., 0] > 100
        assert (bright == (out["segments"] == 2)).mean() > 0.9
        flips.add(flipped)
        if bright.any() and not bright.all():
            assert bright[:, 0].all() != flipped
    assert flips == {True, False}
    coloured = geometry_of(dict(image_size=16, short_side={}), True)
    outs = [coloured({"image": image}, np.random.default_rng(s))[0]["image"] for s in range(8)]
    assert len({tuple(x.reshape(-1, 3).max(0)) for x in outs}) > 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (dict(short_side=dict(ratios=(1, 2))), r"data\.short_side has no key 'ratios'"),
        (dict(short_side=dict(ratio=(2, 1))), r"short_side.ratio=\(2.0, 1.0\)"),
        (dict(short_side=dict(category_share=0)), r"category_share=0\.0 is out of range"),
        (dict(short_side={}, flip=True), r"leave out data\.flip"),
        (dict(short_side={}, augment={}), r"leave out data\.augment"),
    ],
)
def test_wrong_keys_of_a_crop_by_the_short_side(data, message):
    with pytest.raises(UserError, match=message):
        geometry_of(dict(data, image_size=16), True)
