"""Pictures: what must be in them. How they look is for eyes."""

import json

import numpy as np
import pytest
from PIL import Image

from ovseg_jax.errors import UserError
from ovseg_jax.viz import segments
from ovseg_jax.viz.curves import curves, panel
from ovseg_jax.viz.segments import GridRow, enlarge_labels, overlay, paint, palette, prediction_grid


def test_palette_is_distinct_and_does_not_depend_on_the_count():
    many = palette(5000)
    for count in (1, 10, 133):
        np.testing.assert_array_equal(palette(count), many[:count])
    assert len(np.unique(many[:1000], axis=0)) == 1000
    # In the eye's measure two colours are as far apart as Compuphase's "redmean" of CIE's says, of at most 765.
    r, g, b = np.moveaxis(many[:40, None].astype(float) - many[:40], -1, 0)
    red = (many[:40, None, 0].astype(float) + many[:40, 0]) / 2
    distance = np.sqrt((2 + red / 256) * r**2 + 4 * g**2 + (2 + (255 - red) / 256) * b**2)
    assert (distance + 999 * np.eye(40)).min() > 45


def test_paint_gives_each_label_its_colour():
    colours = palette(3)
    picture = paint(np.array([[0, 2], [-1, 1]]), colours)
    np.testing.assert_array_equal(picture[[0, 0, 1], [0, 1, 1]], colours[[0, 2, 1]])
    assert picture[1, 0].tolist() not in colours.tolist()


def test_enlarged_labels_keep_areas_and_never_mix_numbers():
    labels = np.array([[-1, -1, 7], [-1, 3, 7], [3, 3, 7]])
    large = enlarge_labels(labels, (90, 120))
    assert large.shape == (90, 120) and set(np.unique(large)) == {-1, 3, 7}
    for label in (-1, 3, 7):
        assert abs((large == label).mean() - 1 / 3) < 0.02
    assert enlarge_labels(labels, (3, 3)) is labels


def test_overlay_colours_segments_leaves_the_unknown_grey_and_names_in_a_legend():
    image = np.full((120, 200, 3), 128, np.uint8)
    labels = np.full((60, 100), -1)
    labels[:, 50:] = 1
    names = ["absent", "present"]
    picture = np.asarray(overlay(image, labels, names, min_side=400)).astype(int)
    assert picture.shape[1] == 400 and picture.shape[0] > 240
    left, right = picture[20, 20], picture[20, 380]
    assert np.ptp(left) <= 2 and np.ptp(right) > 20
    colours = picture[240:].reshape(-1, 3)
    assert (colours == palette(2)[1]).all(-1).sum() > 100 and not (colours == palette(2)[0]).all(-1).any()
    assert (colours.sum(-1) < 200).any()  # words in ink
    assert overlay(image, labels, names, legend=False, min_side=400).size == (400, 240)
    unknown = overlay(image, np.full((5, 5), -1), names)
    assert unknown.size[0] == 512


def test_names_are_written_where_they_fit_and_only_there():
    image = np.zeros((200, 400, 3), np.uint8)
    labels = np.zeros((200, 400), int)
    labels[90:110, 100:104] = 1

    def ink(names):
        return np.asarray(overlay(image, labels, names, legend=False, min_side=400)).astype(int)

    changed = np.abs(ink(["wide", "tall"]) - ink([" ", " "])).sum(-1) > 0
    ys, xs = np.nonzero(changed)
    assert changed.any() and not changed[labels == 1].any()
    assert ys.min() > 0 and xs.min() > 0 and ys.max() < 199 and xs.max() < 399


@pytest.mark.parametrize("shape", [(1, 600), (900, 20), (1, 1), (2, 5000), (5000, 3)])
def test_pictures_of_any_shape(shape):
    image, labels = np.zeros((*shape, 3), np.uint8), np.zeros(shape, int)
    names = ["a name of many words that is wider than the picture"]
    for picture in (overlay(image, labels, names), overlay(image, labels, names, legend=False)):
        assert max(picture.size) >= 512
    assert prediction_grid([GridRow(image, labels, labels, labels)], names, title="run").width > 4 * 256
    assert (np.asarray(overlay(image, labels, names)) < 100).any()  # the name is there


@pytest.mark.parametrize("shape", [(64, 64), (96, 150), (150, 60)])
def test_grid_has_the_columns_that_the_rows_have(shape):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (*shape, 3), np.uint8)
    labels = np.repeat(np.arange(4), shape[0] // 2)[: shape[0], None].repeat(shape[1], 1) % 3
    names = ["red ball", "green board with a very long name that does not fit", "sand"]
    full = prediction_grid([GridRow(image, labels, labels, labels)] * 2, names, marked={0}, title="run")
    bare = prediction_grid([GridRow(image, None, labels)] * 2, names)
    assert full.width - bare.width == 2 * (256 + 10) and full.height > bare.height
    six = prediction_grid([GridRow(image, None, labels)] * 6, names)
    assert six.width == 2 * (bare.width - 48) + 40 + 48
    with pytest.raises(ValueError, match="at least one"):
        prediction_grid([], names)


def test_words_of_other_scripts_and_very_long_ones_are_drawn():
    labels = np.zeros((50, 50), int)
    for name in ["дерево", "木", "a" * 300, "naïve façade"]:
        assert overlay(np.zeros((50, 50, 3), np.uint8), labels, [name]).width == 512


def test_a_long_caption_ends_in_dots():
    font = segments._font(15)
    assert segments._shortened("a dog", font, 200) == "a dog"
    short = segments._shortened("a dog " * 50, font, 200)
    assert short.startswith("a dog a dog") and short.endswith("…")
    assert 180 < font.getlength(short) <= 200
    line = np.asarray(segments._line("a dog " * 50, 200, 15, segments.INK))
    assert (line[:, :12] < 100).any() and (line[:, -1] == 255).all()


@pytest.mark.parametrize("letter", ["é", "ü", "ł", "ж", "…", "a"])
def test_letters_with_accents_have_a_shape_of_their_own(letter):
    font = segments._font(20, letter)
    assert bytes(font.getmask(letter)) != bytes(font.getmask("\u0870"))  # the box of a letter that is lacking


def test_curves_of_a_run_that_was_killed_while_writing(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [{"step": s, "loss": 1 / (s + 1), "mask_loss": 0.5, "images_per_second": 50.0} for s in range(5)]
    lines.append(
        {"step": 4, "val/miou": 50.0, "val/miou/seen": 60.0, "val/recall@0.5": 90.0, "val/name": "x"}
    )
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "lo')
    picture = curves(file, tmp_path / "curves.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "curves.png")), np.asarray(picture))
    pixels = np.asarray(picture).astype(int)
    assert (pixels == 255).all(-1).mean() > 0.7 and (np.ptp(pixels, axis=-1) > 60).any()
    file.write_text("\n")
    with pytest.raises(UserError, match="no metrics"):
        curves(file)
    with pytest.raises(UserError, match="does not exist"):
        curves(tmp_path / "none.jsonl")


def test_what_is_no_percentage_has_a_panel_of_its_own():
    assert panel("val/accuracy[hard]")[0] == panel("val/per_class")[0]
    assert panel("val/alignment")[0] == panel("val/uniformity[hard]")[0] != panel("val/accuracy")[0]
