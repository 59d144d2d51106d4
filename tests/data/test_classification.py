"""Rows with a label or a caption: crops as torchvision draws them, flips, tokens, evaluation."""

import numpy as np
import pytest
from PIL import Image

from ovseg_jax.data.classification import (
    Augment,
    CaptionTransform,
    ClassifyEval,
    ClassifyTransform,
    random_crop,
)
from ovseg_jax.data.images import centre_square
from ovseg_jax.data.source_base import Source
from ovseg_jax.errors import UserError
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList
from tests.extras import require

WORDS = WordList(["a", "red", "ball", "on", "the", "left"])
WHOLE = dict(crop=(1.0, 1.0), randaugment=0)


def make_config(**augment):
    return {"seed": 3, "data": {"image_size": 16, "text_length": 6, "augment": augment}}


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
        augment = Augment(16, flip=False, randaugment=0)
        expected = theirs.resized_crop(
            Image.fromarray(image), *place, (16, 16), theirs.InterpolationMode.BICUBIC
        )
        np.testing.assert_array_equal(augment(image, np.random.default_rng(seed)), np.asarray(expected))


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
    transform = ClassifyTransform.from_config(make_config(**WHOLE), WORDS)
    rows = [transform(index, {"image": image, "label": 2})["image"] for index in range(400)]
    mirrored = [row[:, 0].max() < 128 for row in rows]
    assert 0.4 < np.mean(mirrored) < 0.6
    plain = ClassifyTransform.from_config(make_config(**WHOLE, flip=False), WORDS)
    assert all(plain(index, {"image": image, "label": 2})["image"][0, 0, 0] > 128 for index in range(50))


@pytest.mark.parametrize("policy", ["torchvision", "dassl"])
def test_a_row_is_a_function_of_seed_index_and_example(policy):
    config, example = make_config(policy=policy), {"image": photo(30, 40), "label": 4}
    before = example["image"].copy()
    transform = ClassifyTransform.from_config(config, WORDS)
    rows = [transform(index, example) for index in range(20)]
    np.testing.assert_array_equal(example["image"], before)
    for index in (3, 11):
        again = ClassifyTransform.from_config(config, WORDS)(index, example)
        assert all((again[key] == rows[index][key]).all() for key in again)
    assert {k: (v.dtype.name, v.shape) for k, v in rows[0].items()} == {
        "image": ("uint8", (16, 16, 3)), "label": ("int32", ()), "example_mask": ("bool", ()),
    }  # fmt: skip
    assert rows[0]["label"] == 4 and len({row["image"].tobytes() for row in rows}) == 20
    other = ClassifyTransform.from_config({**config, "seed": 4}, WORDS)(3, example)
    assert (other["image"] != rows[3]["image"]).any()


def test_features_pass_through():
    feature = np.arange(5, dtype=np.float32)
    row = ClassifyTransform.from_config(make_config(), WORDS)(0, {"feature": feature, "label": 1})
    assert set(row) == {"feature", "label", "example_mask"} and (row["feature"] == feature).all()
    example = {"feature": np.stack([feature, -feature]), "label": 1}
    rows = [ClassifyTransform.from_config(make_config(), WORDS)(index, example) for index in range(40)]
    assert {row["feature"][1] for row in rows} == {1, -1} and rows[0]["feature"].shape == (5,)
    # Consecutive rows that show one example show different views of it.
    example = {"feature": np.arange(4, dtype=np.float32)[:, None], "label": 1}
    transform = ClassifyTransform.from_config(
        make_config() | {"data": {**make_config()["data"], "views": 4}}, WORDS
    )
    drawn = np.array([transform(index, example)["feature"][0] for index in range(80)]).reshape(20, 4)
    assert (np.sort(drawn) == np.arange(4)).all() and len({tuple(group) for group in drawn}) > 5


def test_captions_and_sides():
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, :8] = 255
    transform = CaptionTransform.from_config(make_config(**WHOLE), WORDS)
    captions = ["a red ball", "a ball on the left"]
    seen = set()
    for index in range(200):
        row = transform(index, {"image": image, "captions": captions})
        ids = row["ids"][row["valid"]][1:-1].tolist()
        mirrored = bool(row["image"][:, 0].max() < 128)
        # Six tokens have room for four words.
        assert ids in ([1, 2, 3], [1, 3, 4, 5])
        seen.add((len(ids), mirrored))
        assert (
            row["ids"].shape == row["valid"].shape == (6,)
            and row["ids"].dtype == np.int32
            and row["example_mask"]
        )
    assert seen == {(3, True), (3, False), (4, False)}
    for silent in ({"image": image, "captions": []}, {"image": image}):
        assert not transform(0, silent)["example_mask"]
    with pytest.raises(UserError, match="'dog'"):
        transform(0, {"image": image, "captions": ["a dog"]})


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
        (dict(colour=1), "no key 'colour'; it has crop, flip, randaugment, policy"),
    ],
)
def test_bad_settings(augment, message):
    with pytest.raises(UserError, match=message):
        ClassifyTransform.from_config(make_config(**augment), WORDS)
