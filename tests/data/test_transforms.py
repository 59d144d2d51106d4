"""Image, segments and boxes move together; masks are held to a dense float reference."""

import numpy as np
import pytest

from ovseg_jax.data import transforms


def example(height=40, width=60, seed=0):
    """Two boxes and an ellipse on void; the image says where each pixel came from."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((height, width), np.int32)
    segments[5:20, 10:30] = 1
    segments[15:35, 25:50] = 2
    y, x = np.mgrid[:height, :width]
    segments[((y - 28) / 8) ** 2 + ((x - 12) / 9) ** 2 < 1] = 3
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return {"image": image, "segments": segments, "boxes": transforms.segment_boxes(segments, 3)}


def dense_masks(segments, ids, stride):
    size = segments.shape[0] // stride
    cells = (segments[None] == np.asarray(ids)[:, None, None]).astype(np.float64)
    return cells.reshape(len(ids), size, stride, size, stride).mean((2, 4))


def test_boxes_are_tight():
    e = example()
    for k, (x0, y0, x1, y1) in enumerate(e["boxes"].astype(int), 1):
        mask = e["segments"] == k
        assert mask[y0:y1, x0:x1].sum() == mask.sum()
        assert mask[y0].any() and mask[y1 - 1].any() and mask[:, x0].any() and mask[:, x1 - 1].any()
    assert transforms.segment_boxes(e["segments"], 4)[3].tolist() == [0, 0, 0, 0]


def test_flip_moves_all_and_twice_is_nothing():
    e = example()
    before = e["segments"].copy()
    flipped = transforms.flip(e)
    np.testing.assert_array_equal(flipped["boxes"], transforms.segment_boxes(flipped["segments"], 3))
    twice = transforms.flip(flipped)
    for key in ("image", "segments", "boxes"):
        np.testing.assert_array_equal(twice[key], e[key])
    np.testing.assert_array_equal(e["segments"], before)


def test_no_jitter_at_the_own_size_changes_nothing():
    e = example(48, 48)
    out = transforms.scale_jitter(e, 48, (1.0, 1.0), np.random.default_rng(0))
    for key in ("image", "segments", "boxes"):
        np.testing.assert_array_equal(out[key], e[key])
    assert out["image_size"].tolist() == [48, 48]


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.0, 1.5])
def test_jitter_keeps_aspect_pads_bottom_right_and_boxes_follow(factor):
    e, size = example(40, 60), 64
    for seed in range(5):
        out = transforms.scale_jitter(e, size, (factor, factor), np.random.default_rng(seed))
        height, width = out["image_size"]
        assert height == min(round(40 * factor * 64 / 60), 64) and width == min(round(64 * factor), 64)
        assert out["image"].shape == (size, size, 3) and not out["image"][height:].any()
        assert not out["image"][:, width:].any() and not out["segments"][:, width:].any()
        again = transforms.segment_boxes(out["segments"], 3)
        seen = np.bincount(out["segments"].ravel(), minlength=4)[1:] > 0
        # Nearest-neighbour edges lie within a pixel of the scaled box's. What a crop leaves of the ellipse
        # may be smaller than what it leaves of its box.
        off = again - out["boxes"]
        assert np.abs(off[:2][seen[:2]]).max(initial=0) <= 1.0
        assert not seen[2] or (off[2, :2].min() >= -1.0 and off[2, 2:].max() <= 1.0)


def test_image_and_segments_stay_aligned():
    e = example(50, 70)
    e["image"] = np.repeat((e["segments"] * 80).astype(np.uint8)[..., None], 3, -1)
    for seed in range(4):
        out = transforms.scale_jitter(e, 64, (0.8, 1.4), np.random.default_rng(seed))
        windows = np.lib.stride_tricks.sliding_window_view(out["segments"], (5, 5))
        inside = windows.min((2, 3)) == windows.max((2, 3))  # away from edges, which the image blends
        expected = out["segments"][2:-2, 2:-2] * 80
        assert inside.mean() > 0.5
        np.testing.assert_array_equal(out["image"][2:-2, 2:-2, 0][inside], expected[inside])


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_masks_against_dense(stride):
    out = transforms.scale_jitter(example(), 64, (1.2, 1.2), np.random.default_rng(3))
    ids = np.array([3, 1], np.int32)
    masks = transforms.segment_masks(out["segments"], ids, 5, stride)
    assert masks.shape == (5, 64 // stride, 64 // stride) and masks.dtype == np.uint8
    assert not masks[2:].any()
    np.testing.assert_allclose(masks[:2] / 255, dense_masks(out["segments"], ids, stride), atol=0.51 / 255)


def test_masks_of_nothing():
    masks = transforms.segment_masks(np.zeros((8, 8), np.int32), np.zeros(0, np.int32), 3, 2)
    assert masks.shape == (3, 4, 4) and not masks.any()


def test_largest_segments_are_chosen_without_crowds():
    segments = np.zeros((10, 10), np.int32)
    segments[0], segments[1:4], segments[4:6] = 1, 2, 4
    crowd = np.array([False, False, False, False])
    assert transforms.chosen_segments(segments, crowd, 8).tolist() == [2, 4, 1]  # 3 is not visible
    assert transforms.chosen_segments(segments, crowd, 2).tolist() == [2, 4]
    crowd[1] = True
    assert transforms.chosen_segments(segments, crowd, 8).tolist() == [4, 1]
    assert transforms.chosen_segments(np.zeros((4, 4), np.int32), crowd[:0], 8).tolist() == []


def test_class_map():
    segments = np.array([[0, 1, 1, 2], [0, 1, 1, 2], [3, 3, 0, 0], [3, 3, 0, 0]], np.int32)
    ids = np.array([7, -1, 5], np.int32)
    assert transforms.class_map(segments, ids).tolist()[0] == [-1, 7, 7, -1]
    assert transforms.class_map(segments, ids, 2).tolist() == [[7, -1], [5, -1]]


def test_channel_scramble_is_a_mix_of_channels():
    e = example()
    image = e["image"]
    out = transforms.scramble_channels(image, np.random.default_rng(1), grey=0.0)
    assert sorted(out.reshape(-1, 3).sum(0).tolist()) == sorted(image.reshape(-1, 3).sum(0).tolist())
    grey = np.repeat(image[..., :1], 3, -1)
    for seed in range(5):
        np.testing.assert_array_equal(transforms.scramble_channels(grey, np.random.default_rng(seed)), grey)


def test_mix_channels_against_numpy():
    image = example()["image"]
    matrix = np.random.default_rng(0).normal(size=(3, 3))
    expected = np.clip(np.floor(image.astype(np.float64) @ matrix.T + 0.5), 0, 255)
    off = np.abs(transforms.mix_channels(image, matrix) - expected)
    assert off.max() <= 1 and off.mean() < 1e-3  # Pillow computes in float32: ties may fall the other way


def test_hue_turns_colours_and_leaves_greys():
    grey = np.full((4, 4, 3), 90, np.uint8)
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 200
    moved = 0
    for seed in range(8):
        assert np.abs(transforms.rotate_hue(grey, np.random.default_rng(seed)).astype(int) - 90).max() <= 1
        moved += transforms.rotate_hue(red, np.random.default_rng(seed))[0, 0].argmax() != 0
    assert moved >= 3


def test_blur_removes_detail_and_not_the_mean_and_keeps_padding():
    image = np.zeros((32, 32, 3), np.uint8)
    checks = ((np.arange(24)[:, None] + np.arange(32)) % 2 * 200).astype(np.uint8)
    image[:24] = checks[..., None]
    out = transforms.blur(image, np.array([24, 32], np.int32), 4.0)
    assert out[:24].std() < 10 and abs(out[:24].mean() - 100) < 3
    assert not out[24:].any() and image[:24].std() > 90


def test_a_short_side_crop_follows_mmsegmentations_rules():
    """Sizes of RandomResize with keep_ratio; a crop's place is that of the labels; padding is void."""
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(60):
        height, width = (int(n) for n in rng.integers(20, 90, 2))
        y, x = np.mgrid[:height, :width]
        image = np.stack([y, x, y * 0], -1).astype(np.uint8)
        example = {"image": image, "segments": (y * 100 + x + 1).astype(np.int32)}
        seed = int(rng.integers(1 << 30))
        draws = np.random.default_rng(seed)
        out = transforms.short_side_crop(example, 32, (0.5, 2.0), np.random.default_rng(seed), long_side=64)
        f = draws.uniform(0.5, 2.0)
        scale = min(f * 64 / max(height, width), f * 32 / min(height, width))
        scaled = round(height * scale), round(width * scale)
        kept = tuple(min(n, 32) for n in scaled)
        assert tuple(out["image_size"]) == kept
        top, left = (int(draws.integers(max(n - 32, 0) + 1)) for n in scaled)
        rows = ((np.arange(top, top + kept[0]) + 0.5) * height / scaled[0]).astype(int)
        columns = ((np.arange(left, left + kept[1]) + 0.5) * width / scaled[1]).astype(int)
        np.testing.assert_array_equal(
            out["segments"][: kept[0], : kept[1]], rows[:, None] * 100 + columns + 1
        )
        assert not out["segments"][kept[0] :].any() and not out["image"][:, kept[1] :].any()
        assert np.abs(out["image"][: kept[0], : kept[1], 0] - rows[:, None].astype(float)).max() <= 2
        seen |= {(scaled[0] > 32, scaled[1] > 32), f * 64 / max(height, width) < f * 32 / min(height, width)}
    assert len(seen) >= 4


def test_a_crop_of_one_category_is_drawn_anew():
    """At most 75% of its labelled pixels, by class and not by segment; after ten failures any crop is taken."""
    segments = np.ones((64, 64), np.int32)
    segments[:, 32:], segments[:8, :8] = 2, 3
    segments[52:, 52:] = 0
    example = {"image": np.zeros((64, 64, 3), np.uint8), "segments": segments}
    shares = {}
    for name, ids, limit in (("cut", [4, 5, 4], 0.75), ("any", [4, 5, 4], 1.0), ("same", [4, 4, 4], 0.75)):
        shares[name] = []
        for seed in range(60):
            rng = np.random.default_rng(seed)
            out = transforms.short_side_crop(
                example | {"class_ids": np.array(ids)}, 16, (4.0, 4.0), rng, category_share=limit
            )
            found = transforms.class_map(out["segments"], np.array(ids))
            count = np.bincount(found[found >= 0], minlength=1)
            shares[name].append(count.max() / max(count.sum(), 1))
    below = {name: np.mean(np.array(found) < 0.75) for name, found in shares.items()}
    # A crop of 16 of 64 columns crosses the border between 4 and 12 of its columns with a probability of 8/49.
    assert below["any"] < 0.35 and below["cut"] > 0.75 and below["same"] == 0


def test_colours_are_distorted_by_mmsegmentations_rules():
    """Against the steps in float64 with the same draws, to the rounding of 8-bit HSV."""
    import colorsys

    image = np.random.default_rng(1).integers(0, 256, (6, 5, 3), np.uint8)
    changed = set()
    for seed in range(200):
        draws = np.random.default_rng(seed)
        coin = lambda draws=draws: draws.random() < 0.5
        clip = lambda x: np.clip(x, 0, 255)
        x, steps = image.astype(np.float64), set()
        if coin():
            x, steps = clip(x + draws.uniform(-32, 32)), steps | {"brightness"}
        last = coin()
        contrast = draws.uniform(0.5, 1.5) if coin() else None
        if contrast and not last:
            x, steps = clip(x * contrast), steps | {"contrast first"}
        saturation = draws.uniform(0.5, 1.5) if coin() else None
        turn = int(draws.integers(-18, 18)) if coin() else 0
        hsv = np.array([[colorsys.rgb_to_hsv(*p) for p in row] for row in x / 255])
        if saturation:
            hsv[..., 1], steps = np.clip(hsv[..., 1] * saturation, 0, 1), steps | {"saturation"}
        if turn:
            hsv[..., 0], steps = (hsv[..., 0] + turn / 180) % 1, steps | {"hue"}
        x = np.array([[colorsys.hsv_to_rgb(*p) for p in row] for row in hsv]) * 255
        if contrast and last:
            x, steps = clip(x * contrast), steps | {"contrast last"}
        out = transforms.distort_colours(image, np.random.default_rng(seed))
        assert out.dtype == np.uint8 and np.abs(out - x).max() < 10 and np.abs(out - x).mean() < 2.5
        if not steps:
            np.testing.assert_array_equal(out, image)
        changed |= steps
    assert len(changed) == 5
