"""ZSSeg's two stages against its rules written the slow way: NumPy, float64, one proposal and one pixel at a time."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ovseg_jax.decisions.maps import vocabulary_of
from ovseg_jax.errors import UserError
from ovseg_jax.evals.segmentation import SegmentationEvaluator
from ovseg_jax.inference.segmenter import Segmenter
from ovseg_jax.methods import build
from ovseg_jax.methods.zsseg import CROPS, Rules, TwoStage
from ovseg_jax.parallel.sharding import make_mesh
from ovseg_jax.protocols import Classifier, Prediction, RegionScores, Segmenting, Trainable
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList

S, STRIDE, N, D, E, Z = 16, 4, 7, 6, 5, 8
CLASSES = ClassList(
    (("cat", "kitten"), ("dog",), ("grass", "lawn"), ("sky",)),
    tuple(range(4)),
    (True, True, False, False),
    {"seen": (0, 2), "unseen": (1, 3)},
)
NAMES, OWNER = CLASSES.flat()
SEEN = ("cat", "kitten", "grass", "lawn")
FILL = (120.0, 30.0, 200.0)
VOCABULARY, UNSEEN = vocabulary_of(CLASSES, SEEN), vocabulary_of(CLASSES)


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def vector(text, size):
    return np.random.default_rng(zlib.crc32(text.encode())).normal(size=size)


class Proposals(Segmenting):
    """Masks and embeddings are fixed linear functions of each patch of pixels; the last proposal is empty."""

    rng = np.random.default_rng(7)
    masks, pixels = 2 * rng.normal(size=(STRIDE**2 * 3, N)), rng.normal(size=(STRIDE**2 * 3, D))

    nothing = None

    def __init__(self, per_pixel=False):
        self.per_pixel = per_pixel

    def predict(self, variables, image, image_size):
        b, g = len(image), S // STRIDE
        x = image.astype(jnp.float32) / 255 - 0.5
        x = x.reshape(b, g, STRIDE, g, STRIDE, 3).swapaxes(2, 3).reshape(b, g, g, -1)
        pixels = x @ jnp.asarray(self.pixels, jnp.float32) * variables["params"]["scale"]
        if self.per_pixel:
            return Prediction(None, {}, {"": pixels})
        logits = jnp.moveaxis(x @ jnp.asarray(self.masks, jnp.float32), -1, 1).at[:, -1].set(-9)
        regions = jnp.einsum("bnhw,bhwd->bnd", jax.nn.sigmoid(logits), pixels)
        regions /= jnp.linalg.norm(regions, axis=-1, keepdims=True)
        void = None if self.nothing is None else regions @ jnp.asarray(self.nothing, jnp.float32)
        return Prediction(logits, {"": regions}, {"": pixels}, void)

    def embed_text(self, variables, texts):
        return {"": jnp.asarray(unit(np.stack([vector(t, D) for t in texts])), jnp.float32)}


class Crops(Trainable, Classifier):
    """A classifier: an image is a fixed linear function of its pixels."""

    weights = np.random.default_rng(8).normal(size=(Z * Z * 3, E))

    def embed_image(self, variables, image):
        x = (image.astype(jnp.float32) / 255).reshape(len(image), -1) @ jnp.asarray(self.weights, jnp.float32)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    def embed_text(self, variables, texts):
        return self.embed_phrases(variables, [f"learned {t}" for t in texts])

    def embed_phrases(self, variables, texts):
        return {"": jnp.asarray(unit(np.stack([vector(t, E) for t in texts])), jnp.float32)}

    def logit_scale(self, variables):
        return variables["params"]["scale"]


VARIABLES = {
    "proposals": {"params": {"scale": jnp.ones(())}},
    "classifier": {"params": {"scale": jnp.asarray(4.0)}},
}


def make(w=0.8, crops=32, threshold=0.4, seen=SEEN, templates=None, per_pixel=False):
    rules = Rules(Z, ensemble=w, scale=3.0, threshold=threshold, fill=FILL, crops=crops)
    return TwoStage(Proposals(per_pixel), Crops(), rules, seen=seen, templates=templates)


def case(b=3, seed=0):
    rng = np.random.default_rng(seed)
    sizes = np.array([[S, S], [11, S], [S, 6]], np.int32)[np.arange(b) % 3]
    image = np.zeros((b, S, S, 3), np.uint8)
    for i, (h, w) in enumerate(sizes):
        image[i, :h, :w] = rng.integers(0, 256, (h, w, 3))
    return image, sizes


def bilinear(grid, height, width, image_size):
    """Logits at the pixels of the image, from cells of STRIDE pixels that the image touches."""
    h, w = image_size
    last = (-(-h // STRIDE) - 1, -(-w // STRIDE) - 1)
    out = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            py = np.clip((y + 0.5) * h / height / STRIDE - 0.5, 0, last[0])
            px = np.clip((x + 0.5) * w / width / STRIDE - 0.5, 0, last[1])
            y0, x0 = int(py), int(px)
            y1, x1 = min(y0 + 1, last[0]), min(x0 + 1, last[1])
            top = grid[y0, x0] * (1 - px + x0) + grid[y0, x1] * (px - x0)
            bottom = grid[y1, x0] * (1 - px + x0) + grid[y1, x1] * (px - x0)
            out[y, x] = top * (1 - py + y0) + bottom * (py - y0)
    return out


def keys(x, a=-0.75):
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def bicubic(region):
    h, w = region.shape[:2]
    out = np.zeros((Z, Z, 3))
    for i in range(Z):
        for j in range(Z):
            y, x = (i + 0.5) * h / Z - 0.5, (j + 0.5) * w / Z - 0.5
            for v in range(int(np.floor(y)) - 1, int(np.floor(y)) + 3):
                for u in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
                    out[i, j] += (
                        keys(y - v) * keys(x - u) * region[np.clip(v, 0, h - 1), np.clip(u, 0, w - 1)]
                    )
    return np.clip(np.round(out), 0, 255)


def softmax_of_best(logits, *others):
    """Of each name, if a class stands by its best name; `others` are logits of further classes."""
    best = np.array([*(logits[k == OWNER].max() for k in range(len(CLASSES))), *others])
    return np.exp(logits) / np.exp(best).sum()


def slow_scores(image, image_size, found, w, threshold=0.4, seen=SEEN, prompt="learned {}", no_object=None):
    """[t n]: ZSSeg's rules for one image."""
    h, wide = image_size
    own, text = (unit([vector(f.format(t), d) for t in NAMES]) for f, d in (("{}", D), (prompt, E)))
    trained = np.array([name in seen for name in NAMES])
    scores = np.zeros((len(NAMES), N))
    for n in range(N):
        mask = 1 / (1 + np.exp(-bilinear(np.asarray(found.mask_logits[n], np.float64), h, wide, image_size)))
        inside = mask > threshold
        region = np.asarray(found.regions[""][n], np.float64)
        p = softmax_of_best(3.0 * own @ region, *([] if no_object is None else [3.0 * no_object @ region]))
        q = np.ones(len(NAMES))
        if inside.any():
            rows, columns = np.nonzero(inside.any(1))[0], np.nonzero(inside.any(0))[0]
            region = np.where(inside[..., None], image[:h, :wide].astype(np.float64), FILL)
            crop = bicubic(region[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
            q = softmax_of_best(4.0 * text @ unit((crop / 255).reshape(-1) @ Crops.weights))
        elif not w:
            q = np.zeros(len(NAMES))
        if not w:
            scores[:, n] = q
        else:
            scores[:, n] = np.where(trained, p**w * q ** (1 - w), p ** (1 - w) * q**w)
    return scores


def first_stage(image, sizes):
    return Proposals().predict(VARIABLES["proposals"], jnp.asarray(image), jnp.asarray(sizes))


@pytest.mark.parametrize("w", [0.0, 0.3, 0.8, 1.0])
def test_scores_of_proposals_are_zssegs(w):
    image, sizes = case()
    method = make(w)
    text = method.embed_text(VARIABLES, NAMES)
    found = jax.jit(method.predict)(VARIABLES, image, sizes)
    slow = first_stage(image, sizes)
    for i in range(len(image)):
        one = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
        got = method.score_regions(one(found), text, VOCABULARY).names
        want = slow_scores(image[i], sizes[i], one(slow), w)
        np.testing.assert_allclose(got, want, atol=2e-4)  # a byte that is rounded the other way
        assert bool(got[:, -1].any()) == (w > 0)


def test_proposals_may_know_no_object(monkeypatch):
    """ZSSeg's MaskFormer learns an embedding of it, which takes its share of p and is no answer."""
    image, sizes = case()
    vector_ = unit(vector("nothing", D))
    plain = make(0.8)
    text = plain.embed_text(VARIABLES, NAMES)
    without = plain.predict(VARIABLES, jnp.asarray(image), jnp.asarray(sizes))
    monkeypatch.setattr(Proposals, "nothing", vector_)
    found = make(0.8).predict(VARIABLES, jnp.asarray(image), jnp.asarray(sizes))
    slow = first_stage(image, sizes)
    for i in range(len(image)):
        one = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
        got = plain.score_regions(one(found), text, VOCABULARY).names
        want = slow_scores(image[i], sizes[i], one(slow), 0.8, no_object=vector_)
        np.testing.assert_allclose(got, want, atol=2e-4)
        assert (got < plain.score_regions(one(without), text, VOCABULARY).names).all()


def test_where_nothing_is_seen_w_is_the_classifiers():
    image, sizes = case()
    method = make(0.2, seen=())
    found = method.predict(VARIABLES, jnp.asarray(image), jnp.asarray(sizes))
    one = jax.tree.map(lambda x: x[0], found)
    got = method.score_regions(one, method.embed_text(VARIABLES, NAMES), UNSEEN).names
    want = slow_scores(
        image[0], sizes[0], jax.tree.map(lambda x: x[0], first_stage(image, sizes)), 0.2, seen=()
    )
    np.testing.assert_allclose(got, want, atol=2e-4)


@pytest.mark.parametrize("w", [0.8, 1.0])
def test_probabilities_of_zero_stay_numbers(w, monkeypatch):
    """Those of a closed vocabulary, which float32 rounds to 0; with w = 1 unseen classes leave them out."""
    image, sizes = case(1)
    method = make(w)
    found = jax.tree.map(lambda x: x[0], method.predict(VARIABLES, jnp.asarray(image), jnp.asarray(sizes)))
    monkeypatch.setattr(Proposals, "probabilities", True)
    sure = jnp.zeros((len(NAMES), N)).at[0].set(1.0)
    monkeypatch.setattr(Proposals, "score_regions", lambda *_: RegionScores(sure))
    got = method.score_regions(found, method.embed_text(VARIABLES, NAMES), VOCABULARY).names
    seen = np.array([name in SEEN for name in NAMES])
    assert np.isfinite(got).all() and (got[0] > 0).all() and not got[seen][1:].any()
    assert (got[~seen] > 0).all() == (w == 1)


def test_hand_written_prompts_are_averaged():
    templates = ("a photo of a {}.", "art of the {}.")
    text = make(templates=templates).embed_text(VARIABLES, ["hot_dog"])
    want = unit(sum(unit(vector(t.format("hot dog"), E)) for t in templates))
    np.testing.assert_allclose(text[CROPS][0], 4 * want, atol=1e-5)
    assert set(text) == {"", CROPS}
    assert set(make(w=0.0).embed_text(VARIABLES, ["cat"])) == {CROPS}  # the proposals' text side is not asked


def test_how_many_crops_go_together_changes_nothing():
    image, sizes = case()
    together = make(crops=1000).predict(VARIABLES, jnp.asarray(image), jnp.asarray(sizes))
    for crops in (1, 6, 12):
        apart = make(crops=crops).predict(VARIABLES, jnp.asarray(image), jnp.asarray(sizes))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), apart, together)


def test_memory_does_not_grow_with_the_proposals():
    """Crops of 64 proposals from an image of 512 x 512 would be 200 MB of float32 at once."""
    side, z = 512, 64

    class Many(Proposals):
        def __init__(self, count):
            self.count = count

        def predict(self, variables, image, image_size):
            x = image[:, ::4, ::4].astype(jnp.float32).mean(-1)
            masks = x[:, None] * jnp.arange(1, self.count + 1)[:, None, None] - 100
            return Prediction(masks, {"": masks.mean(3)[..., :D]}, {"": x[..., None].repeat(D, -1)})

    class Large(Crops):
        def embed_image(self, variables, image):
            return image.astype(jnp.float32).mean((1, 2))

    def bytes_needed(count):
        method = TwoStage(Many(count), Large(), Rules(z, crops=4))
        image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
        size = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        lowered = jax.jit(method.predict).lower(VARIABLES, image, size)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    small, large = bytes_needed(8), bytes_needed(64)
    grids = 56 * (side // 4) ** 2 * 4
    assert large - small < 3 * grids and large < 80e6


def batch_of(b=6):
    image, sizes = case(b)
    rng = np.random.default_rng(3)
    label = np.full((b, S, S), -1, np.int32)
    for i, (h, w) in enumerate(sizes):
        label[i, :h, :w] = rng.integers(0, 4, (h, w))
    return dict(
        image=image,
        image_size=sizes,
        label=label,
        segments=label + 1,
        label_size=sizes,
        segment_valid=np.ones((b, 4), bool),
        example_mask=np.ones(b, bool),
        index=np.arange(b, dtype=np.int32),
    )


def evaluate(method, devices=1, texts=None):
    mesh = make_mesh(devices=jax.devices()[:devices])
    evaluator = SegmentationEvaluator("test", method, CLASSES, lambda: [batch_of()], mesh)
    if texts is None:
        return evaluator.run(VARIABLES)
    return evaluator.compare(VARIABLES, texts), evaluator


def test_the_evaluator_scores_what_the_rules_give():
    batch, w = batch_of(), 0.6
    found = first_stage(batch["image"], batch["image_size"])
    right, total = 0, 0
    for i, (h, wide) in enumerate(batch["image_size"]):
        one = jax.tree.map(lambda x, i=i: np.asarray(x[i], np.float64), found)
        scores = slow_scores(batch["image"][i], batch["image_size"][i], one, w)
        masks = np.stack([1 / (1 + np.exp(-bilinear(m, h, wide, (h, wide)))) for m in one.mask_logits])
        category = OWNER[np.einsum("tn,nhw->thw", scores, masks).argmax(0)]
        right += (category == batch["label"][i, :h, :wide]).sum()
        total += h * wide
    got = evaluate(make(w))
    assert got["pacc"] == pytest.approx(100 * right / total, abs=0.15)
    assert {"hiou", "hiou_gt", "miou/unseen", "fwiou", "macc", "recall@0.5"} <= got.keys()


def test_devices_change_nothing_and_several_prompts_share_a_pass():
    method = make(crops=2)
    one = evaluate(method)
    assert evaluate(method, devices=8) == one
    prompts = {"own": None, "art": ("art of the {}.",)}
    texts = {name: make(templates=t).embed_text(VARIABLES, NAMES) for name, t in prompts.items()}
    both, evaluator = evaluate(method, texts=texts)
    assert both["own"] == one and both["art"] == evaluate(make(templates=prompts["art"])) != one
    assert set(evaluator.tables) == {"iou[own]", "iou[art]"}


def openseg():
    words = WordList(["cat", "kitten", "dog", "grass", "lawn", "sky"])
    config = ConfigDict(
        dict(
            method="openseg",
            batch_size=2,
            model=dict(
                backbone=dict(name="small", width=16, levels=3),
                mean=(0.5,) * 3,
                std=(0.25,) * 3,
                width=16,
                embed_dim=D,
                num_queries=5,
                head_convs=1,
                position_grid=4,
            ),
            text=dict(learned=True),
            loss=dict(
                mask_weight=2.0,
                grounding_weight=1.0,
                contrast="unsync",
                group=2,
                form="auto",
                temperature=0.1,
                temperature_bounds=(0.01, 1.0),
                shared_temperature=True,
            ),
            data=dict(image_size=32),
        )
    )
    method = build(config, words, CLASSES)
    return method, jax.jit(method.init)(jax.random.key(0)), config


def test_a_segmenter_takes_openseg_and_a_classifier():
    first, variables, config = openseg()
    method = TwoStage(first, Crops(), Rules(Z, ensemble=0.5, fill=FILL))
    assert isinstance(method, Segmenting)
    both = {"proposals": variables, "classifier": VARIABLES["classifier"]}
    image = np.random.default_rng(5).integers(0, 256, (32, 32, 3), np.uint8)
    segmenter = Segmenter(method, both, config, CLASSES)
    result = segmenter.segment(image, threshold=0.0)
    found = segmenter._predict(both, image[None], np.array([[32, 32]], np.int32))  # compiled by now
    one = jax.tree.map(lambda x: x[0], found)
    scores = np.asarray(method.score_regions(one, segmenter.embed(CLASSES), UNSEEN).names)
    masks = np.stack([bilinear(np.asarray(mask, np.float64), 32, 32, (32, 32)) for mask in one.mask_logits])
    y = np.einsum("tn,nhw->thw", scores, 1 / (1 + np.exp(-masks)))
    assert y.shape == (6, 32, 32)
    assert (OWNER[y.argmax(0)] == result.label_map).mean() > 0.99
    with pytest.raises(UserError, match="no common features"):
        segmenter.features(image)


def test_what_cannot_be():
    with pytest.raises(UserError, match="which does not propose masks"):
        make(per_pixel=True).predict(VARIABLES, *map(jnp.asarray, case()))
    with pytest.raises(UserError, match=r"ensemble=1\.2"):
        make(1.2)
    with pytest.raises(UserError, match="threshold=0"):
        make(threshold=0.0)
    with pytest.raises(UserError, match="supports predicted"):
        SegmentationEvaluator("x", make(), CLASSES, list, make_mesh(), masks=("predicted", "none"))
