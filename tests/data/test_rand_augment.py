"""RandAugment against torchvision: each operation, its strengths, and how they are drawn."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from ovseg_jax.data.rand_augment import (
    OPERATIONS,
    TORCHVISION,
    dassl_ranges,
    rand_augment,
    rand_augment_dassl,
    torchvision_strengths,
)
from tests.extras import require

NAMES = {
    "identity": "Identity",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateX",
    "translate_y": "TranslateY",
    "rotate": "Rotate",
    "brightness": "Brightness",
    "color": "Color",
    "contrast": "Contrast",
    "sharpness": "Sharpness",
    "posterize": "Posterize",
    "solarize": "Solarize",
    "auto_contrast": "AutoContrast",
    "equalize": "Equalize",
}


def picture(width=45, height=32, low=30, high=220):
    return np.random.default_rng(0).integers(low, high, (height, width, 3), np.uint8)


@pytest.mark.parametrize("name", TORCHVISION)
def test_operations_are_torchvisions(name):
    theirs = require("torchvision.transforms.autoaugment")
    image = Image.fromarray(picture(61, 47))
    strengths, signed = theirs.RandAugment()._augmentation_space(31, (47, 61))[NAMES[name]]
    for magnitude in (9, 20):
        for sign in (1, -1) if signed else (1,):
            strength = sign * float(strengths[magnitude] if strengths.ndim else 0)
            nearest = theirs.InterpolationMode.NEAREST
            expected = np.asarray(theirs._apply_op(image, NAMES[name], strength, nearest, None))
            strength = int(strength) if name.startswith("translate") else strength
            np.testing.assert_array_equal(np.asarray(OPERATIONS[name](image, strength)), expected)


@pytest.mark.parametrize("magnitude", [0, 9, 20, 30])
def test_strengths_are_torchvisions(magnitude):
    theirs = require("torchvision.transforms.autoaugment")
    ours = torchvision_strengths(61, 47, magnitude)
    for name, reference in NAMES.items():
        strengths, signed = theirs.RandAugment()._augmentation_space(31, (47, 61))[reference]
        expected = float(strengths[magnitude] if strengths.ndim else 0)
        expected = int(expected) if name.startswith("translate") else expected
        assert ours[name] == (pytest.approx(expected, rel=1e-6), signed), name


def test_all_operations_of_torchvision_are_there():
    theirs = require("torchvision.transforms.autoaugment")
    assert set(NAMES.values()) == set(theirs.RandAugment()._augmentation_space(31, (8, 8)))
    assert tuple(NAMES) == TORCHVISION


def _outcomes(strengths, image):
    """What each (operation, sign) makes of an image."""
    made = {}
    for name in TORCHVISION:
        strength, signed = strengths[name]
        for sign in (1, -1) if signed else (1,):
            made[name, sign] = np.asarray(OPERATIONS[name](Image.fromarray(image), sign * strength)).tobytes()
    return made


def test_operations_and_signs_are_drawn_evenly():
    image, rng = picture(), np.random.default_rng(3)
    made = _outcomes(torchvision_strengths(45, 32, 9), image)
    assert len(set(made.values())) == len(made) == 5 + 2 * 9
    counts = Counter(rand_augment(image, rng, 1).tobytes() for _ in range(2800))
    assert set(counts) == set(made.values())
    signs = Counter(name for name, _ in made)
    for (name, _), outcome in made.items():
        assert abs(counts[outcome] - 200 / signs[name]) < 60, name


def test_two_operations_follow_one_another():
    image, strengths = picture(), torchvision_strengths(45, 32, 9)
    made = _outcomes(strengths, image)
    twice = {
        outcome
        for first in made.values()
        for outcome in _outcomes(strengths, np.frombuffer(first, np.uint8).reshape(image.shape)).values()
    }
    rng = np.random.default_rng(4)
    assert all(rand_augment(image, rng, 2).tobytes() in twice for _ in range(100))
    np.testing.assert_array_equal(rand_augment(image, rng, 0), image)


def test_dassl_leaves_operations_out_and_draws_strengths():
    image, rng = picture(), np.random.default_rng(5)
    counts = Counter(rand_augment_dassl(image, rng, 1).tobytes() for _ in range(2000))
    # 0.4 of the operations are left out, and one in 15 of the others is the identity; an 8-bit posterize too.
    assert abs(counts[image.tobytes()] / 2000 - (0.4 + 0.6 / 15)) < 0.04
    assert abs(counts[(255 - image).tobytes()] / 2000 - 0.6 / 15) < 0.02
    assert len(counts) > 500
    ranges = dassl_ranges(45, 32)
    assert set(ranges) == set(OPERATIONS)
    for name, ends in ranges.items():
        for strength in ends:
            assert OPERATIONS[name](Image.fromarray(image), strength).size == (45, 32)
