"""Sliding windows against mmsegmentation's `slide_inference` and GroupViT's rule, in NumPy's float64."""

import evals_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ovseg_jax.data.windows import Sliding
from ovseg_jax.decisions import windows
from ovseg_jax.decisions.rules import (
    Argmax,
    BackgroundThreshold,
    GroupVit,
    Instances,
    Semantic,
    Softmax,
)
from ovseg_jax.decisions.windows import Windows, decide_windows, predict_windows
from ovseg_jax.errors import UserError
from ovseg_jax.kernels import resize
from ovseg_jax.protocols import Prediction, Segmenting, Vocabulary

SIZE, GRID, N, D, K = 16, 4, 5, 6, 4
SLIDING = Sliding(stride=6, short=20, longest=44)
OWNER = np.array([0, 1, 1, 2, 3], np.int32)
VOCABULARY = Vocabulary(jnp.asarray(OWNER), jnp.zeros(5, bool), jnp.ones(K, bool))
# Height and width of images: one wide, one high, one whose shorter side is less than a window after the resize.
IMAGES = [(20, 33), (26, 15), (9, 40)]
SHAPE = (28, 40)


def softmax(x):
    e = np.exp(x - x.max(0))
    return e / e.sum(0)


def resize_to(maps, size):
    """Bilinear with half-pixel centres, as PyTorch's `interpolate`: [C h w] to [C H W]."""
    for axis in (1, 2):
        cells = maps.shape[axis]
        at = np.clip((np.arange(size[axis - 1]) + 0.5) * cells / size[axis - 1] - 0.5, 0, cells - 1)
        low = np.floor(at).astype(int)
        part = (at - low).reshape([-1, 1] if axis == 1 else [-1])
        maps = maps.take(low, axis) * (1 - part) + maps.take(np.minimum(low + 1, cells - 1), axis) * part
    return maps


def drawn(seed, count):
    rng = np.random.default_rng(seed)
    return dict(
        masks=3 * rng.standard_normal((3, count, N, GRID, GRID)),
        regions=reference.unit(rng.standard_normal((3, count, N, D))),
        pixels=rng.standard_normal((3, count, GRID, GRID, D)),
        image=reference.unit(rng.standard_normal((3, count, D))),
        text=reference.unit(rng.standard_normal((5, D))),
    )


def by_class(scores):
    return np.stack([scores[k == OWNER].max(0) for k in range(K)])


def groupvit(masks, regions, image, text, allowed):
    """`encode_decode` of NVlabs/GroupViT, with scale 7: scores of the classes and of the background."""
    winner = masks.argmax(0)
    logits = np.where(allowed[:, None], 7 * by_class(text @ regions.T), -np.inf)
    of_image = np.where(allowed, by_class(text @ image), -np.inf)
    within = np.full_like(logits, -np.inf)
    top = np.argsort(-of_image)[:2]
    within[top] = logits[top]
    affinity = softmax(logits) * softmax(within)
    scores = affinity[:, winner]
    background = scores.max(0) < min(0.3, affinity.max())
    return np.concatenate([scores, background[None]])


def semantic(masks, regions, image, text, allowed):
    """MaskFormer's `semantic_inference`, with scale 7."""
    logits = np.where(allowed[:, None], 7 * by_class(text @ regions.T), -np.inf)
    return np.einsum("kn,nhw->khw", softmax(logits), reference.sigmoid(masks))


def slide(i, score, label):
    """mmsegmentation's `slide_inference`: the average over the windows, at the label's size."""
    height, width = SLIDING.resized(*IMAGES[i])
    total, count, w = 0, np.zeros((height, width)), 0
    for y in range(max(height - SIZE + 5, 0) // 6 + 1):
        for x in range(max(width - SIZE + 5, 0) // 6 + 1):
            bottom, right = min(6 * y + SIZE, height), min(6 * x + SIZE, width)
            top, left = max(bottom - SIZE, 0), max(right - SIZE, 0)
            at, size = np.s_[top:bottom, left:right], (bottom - top, right - left)
            part = score(i, w, size)
            canvas = np.zeros((len(part), height, width))
            canvas[:, at[0], at[1]] = part
            total, w = total + canvas, w + 1
            count[at] += 1
    assert count.min() >= 1 and w > 1
    return resize_to(total / count, label), w


def decided(own, decision, masks=True, mode="predicted", allowed=None):
    """The decision on the three images as `decide_windows` makes it, and their number of windows."""
    f = lambda name: jnp.asarray(own[name], jnp.float32)
    count = own["masks"].shape[1]
    if masks:
        image, scale = {"": f("image")}, jnp.full((3, count), 7.0)
        prediction = Prediction(f("masks"), {"": f("regions")}, {"": f("pixels")}, None, image, scale)
    else:
        prediction = Prediction(None, {}, {"": f("pixels")})
    cuts = [SLIDING.cut(np.zeros((*size, 3), np.uint8), SIZE) for size in IMAGES]
    places = Windows(*(jnp.stack([getattr(cut, name) for cut in cuts]) for name in Windows._fields))
    allowed = np.ones((3, 2, 5), bool) if allowed is None else allowed
    out = decide_windows(
        Segmenting(),
        prediction,
        {"": f("text")},
        VOCABULARY,
        places,
        jnp.asarray(IMAGES),
        jnp.asarray(allowed),
        canvas=SIZE,
        shape=SHAPE,
        decision=decision,
        mode=mode,
    )
    return out, [int(cut.window_valid.sum()) for cut in cuts]


def same(out, i, view, want, best):
    """Compares with the slow scores [R h w]; rounding may change a category where two are equal."""
    h, w = IMAGES[i]
    got = np.asarray(out.category[i, view])
    assert (got[:h, :w] == want).mean() > 0.995
    rest = np.ones(SHAPE, bool)
    rest[:h, :w] = False
    assert (got[rest] == -1).all()
    np.testing.assert_allclose(
        np.asarray(out.confidence[i, view])[:h, :w], np.where(want < 0, 0, best), atol=2e-4
    )


@pytest.mark.parametrize("small_blocks", [False, True])
@pytest.mark.parametrize("rule", [groupvit, semantic])
def test_windows_are_averaged_as_published(rule, small_blocks, monkeypatch):
    if small_blocks:
        monkeypatch.setattr(windows, "row_block", lambda rows, floats: resize.row_block(rows, 1, 5))
    own = drawn(0, SLIDING.count(SIZE))
    allowed = np.ones((3, 2, 5), bool)
    allowed[:, 1, [1, 2]] = False  # the second view lacks a class
    decision = GroupVit(threshold=0.3, top=2) if rule is groupvit else Semantic(threshold=1.1)
    out, counts = decided(own, decision, allowed=allowed)
    seen = set()
    for i, label in enumerate(IMAGES):
        for view in range(2):

            def score(i, w, size, view=view):
                masks = reference.upsample(own["masks"][i, w], SIZE, size, size)
                may = np.array([allowed[i, view, k == OWNER].any() for k in range(K)])
                return rule(masks, own["regions"][i, w], own["image"][i, w], own["text"], may)

            scores, used = slide(i, score, label)
            assert used == counts[i]
            best, want = scores.max(0), scores.argmax(0)
            want = np.where(want == K, -1, want)
            want = np.where(best < decision.least, -1, want)
            same(out, i, view, want, best)
            seen |= set(want.ravel())
    assert -1 in seen and len(seen) > 3


@pytest.mark.parametrize("masks", [True, False])
def test_names_of_pixels_and_masks_are_averaged(masks):
    own = drawn(1, SLIDING.count(SIZE))
    out, _ = decided(own, BackgroundThreshold(threshold=0.1), masks, "predicted" if masks else "none")
    for i, label in enumerate(IMAGES):

        def score(i, w, size):
            if not masks:
                pixels = np.moveaxis(reference.unit(own["pixels"][i, w]), -1, 0)
                return np.einsum("td,dhw->thw", own["text"], reference.upsample(pixels, SIZE, size, size))
            s = reference.sigmoid(reference.upsample(own["masks"][i, w], SIZE, size, size))
            each = np.einsum("tn,nhw->thw", own["text"] @ own["regions"][i, w].T, s)
            return np.concatenate([each, s.sum(0)[None]])

        scores, _ = slide(i, score, label)
        cover = np.maximum(scores[5], 1) if masks else 1
        best = scores[:5].max(0) / cover
        same(out, i, 0, np.where(best >= 0.1, OWNER[scores[:5].argmax(0)], -1), best)


@pytest.mark.parametrize("small_blocks", [False, True])
def test_probabilities_of_names_are_averaged(small_blocks, monkeypatch):
    """As google-deepmind/tips: a softmax over the names at the window's pixels, before windows are averaged."""
    if small_blocks:
        monkeypatch.setattr(windows, "row_block", lambda rows, floats: resize.row_block(rows, 1, 5))
    own = drawn(3, SLIDING.count(SIZE))
    allowed = np.ones((3, 2, 5), bool)
    allowed[:, 1, [1, 2]] = False
    out, _ = decided(own, Softmax(scale=9.0), False, "none", allowed)
    linear, _ = decided(own, Argmax(), False, "none", allowed)
    for i, label in enumerate(IMAGES):
        for view in range(2):

            def score(i, w, size, view=view):
                pixels = np.moveaxis(reference.unit(own["pixels"][i, w]), -1, 0)
                cosine = np.einsum("td,dhw->thw", own["text"], reference.upsample(pixels, SIZE, size, size))
                return softmax(np.where(allowed[i, view, :, None, None], 9 * cosine, -np.inf))

            scores, _ = slide(i, score, label)
            same(out, i, view, OWNER[scores.argmax(0)], scores.max(0))
    assert (np.asarray(out.category) != np.asarray(linear.category)).any()
    with pytest.raises(UserError, match="Softmax scores pixels"):
        decided(own, Softmax())


def test_a_bicubic_resize_is_pillows():
    sliding = Sliding.of(dict(stride=6, short=20, longest=60, resample="bicubic"))
    image = np.random.default_rng(0).integers(0, 256, (13, 22, 3)).astype(np.uint8)
    assert sliding.resized(13, 22) == (20, 33) and SLIDING.resized(13, 22) == (20, 34)
    want = np.asarray(Image.fromarray(image).resize((33, 20), Image.Resampling.BICUBIC))
    cut = sliding.cut(image, SIZE)
    np.testing.assert_array_equal(cut.image[0], want[:SIZE, :SIZE])
    assert sliding.resized(10, 90) == (7, 60)
    with pytest.raises(UserError, match="resample='nearest' is not one of bilinear, bicubic"):
        Sliding.of(dict(stride=6, short=20, longest=60, resample="nearest"))


def test_windows_cover_the_resized_image():
    assert SLIDING.resized(20, 33) == (20, 33) and SLIDING.resized(9, 40) == (10, 44)
    assert Sliding(224, 448, 2048).count(448) == 9
    assert Sliding(224, 448, 2048).resized(375, 500) == (448, 597)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (13, 22, 3)).astype(np.uint8)
    cut = SLIDING.cut(image, SIZE)
    want = resize_to(np.moveaxis(np.float64(image), -1, 0), cut.resized)
    for window, (y, x), size, valid in zip(
        *cut[:1], cut.window_at, cut.image_size, cut.window_valid, strict=True
    ):
        if valid:
            part = want[:, y : y + SIZE, x : x + SIZE]
            assert tuple(size) == part.shape[1:]
            np.testing.assert_allclose(np.moveaxis(window, -1, 0)[:, : size[0], : size[1]], part, atol=1)
    padding = SLIDING.cut(None, SIZE)
    assert not padding.window_valid.any() and padding.image.shape == cut.image.shape


def test_a_method_runs_as_often_as_there_are_windows():
    calls = []

    def predict(variables, image, image_size):
        jax.debug.callback(lambda: calls.append(1))
        return Prediction(None, {}, {"": image[..., :1] * variables["x"]})

    image = jnp.arange(2 * 4 * 3 * 3 * 3).reshape(2, 4, 3, 3, 3).astype(jnp.float32)
    valid = jnp.asarray([[True, True, False, False], [True, False, False, False]])
    run = jax.jit(lambda v, x: predict_windows(predict, v, x, jnp.zeros((2, 4, 2), jnp.int32), valid))
    out = run({"x": 2.0}, image)
    np.testing.assert_array_equal(out.pixels[""][:, :2], 2 * image[:, :2, ..., :1])
    assert not np.asarray(out.pixels[""][:, 2:]).any()
    jax.effects_barrier()
    assert len(calls) == 2


def test_what_cannot_be_averaged_is_refused():
    own = drawn(2, SLIDING.count(SIZE))
    with pytest.raises(UserError, match="Instances works on whole images, not on sliding windows"):
        decided(own, Instances())
    with pytest.raises(UserError, match="GroupVit needs predicted masks"):
        decided(own, GroupVit(), masks=False, mode="none")
    with pytest.raises(UserError, match="'truth' cannot be used with sliding windows"):
        decided(own, GroupVit(), mode="truth")
    for given, message in (
        (dict(stride=1, short=2), "has the keys stride, short, but needs stride, short, longest"),
        (dict(stride=0, short=2, longest=3), "windows.stride=0 is not a positive whole number"),
        (dict(stride=1, short=4, longest=3), "windows.longest=3 is less than short=4"),
    ):
        with pytest.raises(UserError, match=message):
            Sliding.of(given)
