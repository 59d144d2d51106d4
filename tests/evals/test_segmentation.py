from functools import partial
from pathlib import Path

import evals_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ovseg_jax.data.sources.build import make_source
from ovseg_jax.errors import UserError
from ovseg_jax.evals.proposals import ProposalsEvaluator
from ovseg_jax.evals.registry import make_evaluators
from ovseg_jax.evals.segmentation import SegmentationEvaluator
from ovseg_jax.parallel.sharding import make_mesh
from ovseg_jax.protocols import Prediction, Segmenting, Trainable, only
from ovseg_jax.towers import features
from ovseg_jax.vocab.classes import ClassList

S, STRIDE, N, D, M, SHAPE = 16, 4, 5, 6, 4, (18, 20)
CLASSES = ClassList(
    (("cat", "kitten"), ("dog",), ("grass", "lawn"), ("sky",), ("emu",)),
    tuple(range(5)),
    (True, True, False, False, True),
    {"seen": (0, 1), "held_out": (4,), "stuff": (2, 3)},
)


class PatchMethod(Trainable, Segmenting):
    """Masks and embeddings are fixed linear functions of each patch of pixels."""

    def __init__(self, per_pixel=False):
        self.per_pixel = per_pixel
        rng = np.random.default_rng(7)
        self.masks, self.pixels = rng.normal(size=(STRIDE**2 * 3, N)), rng.normal(size=(STRIDE**2 * 3, D))
        self.texts = {name: rng.normal(size=D) for names in CLASSES.names for name in names}
        self.asked = []

    def init(self, rng):
        return {"params": {"scale": jnp.ones(())}}

    def loss(self, variables, batch, rng):
        raise AssertionError("an evaluation asks for no loss")

    def predict(self, variables, image, image_size):
        b, g = len(image), S // STRIDE
        x = image.astype(jnp.float32) / 255 - 0.5
        x = x.reshape(b, g, STRIDE, g, STRIDE, 3).swapaxes(2, 3).reshape(b, g, g, -1)
        f_z = x @ jnp.asarray(self.pixels, jnp.float32) * variables["params"]["scale"]
        if self.per_pixel:
            return Prediction(None, {}, {"": f_z})
        logits = jnp.moveaxis(x @ jnp.asarray(self.masks, jnp.float32), -1, 1)
        regions = jnp.einsum("bnhw,bhwd->bnd", jax.nn.sigmoid(logits), f_z)
        regions /= jnp.linalg.norm(regions, axis=-1, keepdims=True)
        return Prediction(logits, {"": regions}, {"": f_z})

    def embed_text(self, variables, texts):
        self.asked.append(len(texts))
        return {"": jnp.asarray(reference.unit(np.stack([self.texts[t] for t in texts])), jnp.float32)}


VARIABLES = PatchMethod().init(None)


def examples(n=11, seed=0):
    """Single examples with labels of their own size, in canvases of (S, S) and SHAPE."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        h, w = int(rng.integers(9, SHAPE[0] + 1)), int(rng.integers(9, SHAPE[1] + 1))
        scale = S / max(h, w)
        size = np.array([round(h * scale), round(w * scale)], np.int32)
        image = np.zeros((S, S, 3), np.uint8)
        image[: size[0], : size[1]] = rng.integers(0, 256, (*size, 3))
        segments, label = np.zeros(SHAPE, np.int32), np.full(SHAPE, -1, np.int32)
        segments[:h, :w] = np.repeat(np.repeat(rng.integers(0, M, (3, 3)), 7, 0), 7, 1)[:h, :w]
        classes = np.array([-1, *rng.integers(0, 4, M)])  # "emu" never occurs
        label[:h, :w] = classes[segments][:h, :w]
        valid = np.isin(np.arange(1, M + 1), segments)
        valid[0] &= i % 3 > 0  # a crowd now and then
        out.append(
            dict(
                image=image,
                image_size=size,
                label=label,
                segments=segments,
                label_size=np.array([h, w], np.int32),
                segment_valid=valid,
                example_mask=np.bool_(True),
                index=np.int32(i),
            )
        )
    return out


def batches(examples, size):
    """Batches of equal size; the last is padded with noise that `example_mask` disowns."""

    def start():
        for i in range(0, len(examples), size):
            part = examples[i : i + size]
            junk = examples[0] | dict(example_mask=np.bool_(False))
            part = part + [junk] * (size - len(part))
            yield {key: np.stack([e[key] for e in part]) for key in part[0]}

    return start


def evaluate(method=None, *, n=11, size=4, devices=1, modes=("predicted",), classes=CLASSES, data=None):
    mesh = make_mesh(devices=jax.devices()[:devices])
    data = batches(examples(n) if data is None else data, size)
    evaluator = SegmentationEvaluator("test", method or PatchMethod(), classes, data, mesh, masks=modes)
    return evaluator.run(VARIABLES), evaluator


def reference_scores(mode, grounding):
    method, (names, owner) = PatchMethod(), CLASSES.flat()
    text = np.asarray(only(method.embed_text(VARIABLES, names)))
    matrix, hits, segments = np.zeros((5, 6), np.int64), np.zeros(3), 0
    for e in examples():
        h, w = e["label_size"]
        p = method.predict(VARIABLES, jnp.asarray(e["image"])[None], jnp.asarray(e["image_size"])[None])
        p = [np.asarray(x[0]) for x in (p.mask_logits, only(p.regions), only(p.pixels))]
        y = reference.logits(mode, *p, text, S, e["image_size"], e["label_size"], e["segments"])
        label = e["label"][:h, :w]
        if grounding:
            y[~np.isin(owner, label)] = -np.inf
        predicted = np.where(np.isfinite(y.max(0)), owner[y.argmax(0)], -1)
        matrix += reference.confusion_matrix(label, predicted, 5)
        masks = reference.upsample(p[0], S, e["image_size"], e["label_size"]) > 0
        for m in np.nonzero(e["segment_valid"])[0]:
            true = e["segments"][:h, :w] == m + 1
            best = max((true & mask).sum() / (true | mask).sum() for mask in masks)
            hits, segments = hits + (best >= np.array([0.5, 0.7, 0.9])), segments + 1
    inter, truth, guess = np.diag(matrix), matrix.sum(1), matrix.sum(0)[:5]
    iou = 100 * inter / np.maximum(truth + guess - inter, 1)
    return iou, truth, guess, 100 * hits / segments


@pytest.mark.parametrize("mode", ["predicted", "none", "truth"])
def test_one_pass_gives_the_reference_scores(mode):
    got, evaluator = evaluate(modes=(mode,))
    iou, truth, guess, recall = reference_scores(mode, False)
    close = partial(pytest.approx, abs=0.1)  # a pixel in a tie may fall either way
    assert got["miou_gt"] == close(iou[truth > 0].mean())
    assert got["miou"] == close(iou[truth + guess > 0].mean())
    assert got["miou/stuff"] == close(iou[2:4].mean())
    assert got["fwiou"] == close((iou * truth).sum() / truth.sum())
    assert [got[f"recall@{t}"] for t in (0.5, 0.7, 0.9)] == pytest.approx(recall.tolist())
    iou, truth, guess, _ = reference_scores(mode, True)
    assert got["grounding_miou"] == close(iou[truth > 0].mean())
    assert [row.pixels for row in evaluator.tables["iou"]] == truth.tolist()


def test_other_names_may_mean_a_class():
    """As PC-59's classes mean VOC's background: a pixel whose best name is one of them has that class."""

    def run(classes, **own):
        mesh = make_mesh(devices=jax.devices()[:1])
        evaluator = SegmentationEvaluator("test", PatchMethod(), classes, batches(examples(), 4), mesh, **own)
        return evaluator.run(VARIABLES), evaluator.tables["iou"]

    asked = ClassList((("kitten", "lawn"), *CLASSES.names[1:]), CLASSES.ids, CLASSES.isthing, CLASSES.groups)
    want, (got, table) = run(asked), run(CLASSES, names={"cat": ["kitten", "lawn"]})
    assert got == want[0] and got != run(CLASSES)[0]
    assert table[0].name == "cat"  # under its own name
    for names, message in (
        ({"kitten": ["a"]}, "no class 'kitten'"),
        ({"cat": []}, "'cat' would have no name"),
    ):
        with pytest.raises(UserError, match=message):
            run(CLASSES, names=names)


def test_void_may_be_background_and_a_class_may_be_ignored():
    mesh = make_mesh(devices=jax.devices()[:1])
    data = examples(5)

    def run(examples, classes=CLASSES, **own):
        own = dict(decision=dict(type="background_threshold", threshold=0.2)) | own
        evaluator = SegmentationEvaluator("test", PatchMethod(), classes, batches(examples, 4), mesh, **own)
        return evaluator.run(VARIABLES), evaluator.tables["iou"]

    # The same as a class of the source's own.
    labelled = []
    for e in data:
        label = e["label"].copy()
        h, w = e["label_size"]
        label[:h, :w][label[:h, :w] < 0] = 5
        labelled.append(e | dict(label=label))
    with_class = ClassList((*CLASSES.names, ("background",)), tuple(range(6)), (*CLASSES.isthing, False))
    got, table = run(data, background="void")
    assert table[-1].name == "background" and table[-1].pixels > 0 and table[-1].iou > 0
    own = dict(names={"background": ["sky"]})  # a name that the method knows
    want, want_table = run(labelled, with_class, background="background", **own)
    assert table == want_table and got["miou"] == want["miou"]
    # A network that learned it as a class is asked for it by its name.
    own = dict(names={"cat": ["cat"], "sky": ["kitten"], "background": ["sky"]}, decision="argmax")
    got, table = run(data, background="void by name", **own)
    want, want_table = run(labelled, with_class, **own)
    assert table == want_table and got["miou"] == want["miou"] and table[-1].iou > 0
    own = dict(names={"background": ["sky"]})
    # Without its class, an ignored pixel is as one of no class.
    ignored, _ = run(labelled, with_class, ignore="background", **own)
    assert ignored["miou_gt"] == run(data)[0]["miou_gt"]
    with pytest.raises(UserError, match=r"evals\.test\.ignore='gnu' is not one of the classes"):
        run(data, ignore="gnu")


@pytest.mark.parametrize("devices", [1, 8])
def test_recall_alone_needs_no_class_and_no_text(devices):
    method, mesh = PatchMethod(), make_mesh(devices=jax.devices()[:devices])
    got = ProposalsEvaluator("test", method, CLASSES, batches(examples(), 4), mesh).run(VARIABLES)
    recall = reference_scores("predicted", False)[-1]
    assert list(got) == ["recall@0.5", "recall@0.7", "recall@0.9"] and not method.asked
    assert list(got.values()) == pytest.approx(recall.tolist())


def test_recall_of_a_method_without_masks_is_a_sentence():
    evaluator = ProposalsEvaluator("test", PatchMethod(True), CLASSES, batches(examples(), 4), make_mesh())
    with pytest.raises(UserError, match="PatchMethod predicts no masks"):
        evaluator.run(VARIABLES)


def test_devices_batch_size_and_padding_change_no_number():
    one, _ = evaluate()
    assert evaluate(devices=8)[0] == one  # 4 examples over 8 devices
    assert evaluate(size=11)[0] == one
    assert evaluate(size=3, devices=2)[0] == one


def test_painting_the_truth_is_perfect():
    """Each class has its own colour, and the network says of that colour the word of the class."""

    class Oracle(PatchMethod):
        def predict(self, variables, image, image_size):
            k = image[:, STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE, 0] // 50
            own = jax.nn.one_hot(k, 5)
            regions = jnp.broadcast_to(jnp.eye(5), (len(image), 5, 5))
            return Prediction(40 * jnp.moveaxis(own, -1, 1) - 20, {"": regions}, {"": own})

        def embed_text(self, variables, texts):
            return {"": jnp.eye(5)}

    rng = np.random.default_rng(0)
    data = []
    for e in examples(6):
        label = np.repeat(np.repeat(rng.integers(0, 5, (4, 4)), STRIDE, 0), STRIDE, 1)
        data.append(
            e
            | dict(
                image=np.repeat(50 * label[..., None], 3, -1).astype(np.uint8),
                image_size=np.array([S, S], np.int32),
                label=label.astype(np.int32),
                segments=label.astype(np.int32) + 1,
                label_size=np.array([S, S], np.int32),
                segment_valid=np.isin(np.arange(1, 6), label + 1),
            )
        )
    classes = ClassList(tuple((n,) for n in "abcde"), tuple(range(5)), (True,) * 5)
    got, _ = evaluate(Oracle(), data=data, modes=("truth", "none"), classes=classes)
    assert got["miou"] == got["grounding_miou"] == got["pacc"] == 100
    assert got["miou@none"] > 90 and got["recall@0.7"] > 90


def test_modes_after_the_first_get_a_suffix_and_their_own_table():
    got, evaluator = evaluate(modes=("predicted", "none", "truth"))
    assert {"miou", "miou@none", "grounding_miou@truth", "miou_gt/seen@none", "chance_miou"} <= set(got)
    assert set(evaluator.tables) == {"iou", "iou@none", "iou@truth"}
    alone, _ = evaluate(modes=("none",))
    assert alone["miou"] == got["miou@none"]
    assert all(np.isfinite(v) for v in got.values())


def test_a_per_pixel_method_has_no_recall_and_is_scored_per_pixel():
    got, _ = evaluate(PatchMethod(per_pixel=True))
    assert not any("recall" in key for key in got)
    assert got["miou"] == evaluate(modes=("none",))[0]["miou"]


def test_names_are_embedded_once_a_run_in_chunks_of_one_shape(monkeypatch):
    whole, _ = evaluate()
    monkeypatch.setattr(features, "TEXT_CHUNK", 3)
    method = PatchMethod()
    assert evaluate(method)[0] == whole
    assert method.asked == [3, 3, 3]  # seven names


def test_a_second_run_compiles_nothing():
    _, evaluator = evaluate(size=11)
    first = evaluator.tables
    evaluator.run(VARIABLES)
    assert evaluator._step._cache_size() == 1 and evaluator.tables == first


COCO = Path(__file__).parents[2] / "../shared/data/coco_sample"


@pytest.mark.parametrize("name", ["scenes", "coco"])
def test_a_config_makes_evaluators_of_real_sources(name):
    """Labels reach the counts at their own size, pixel for pixel, whatever size the model sees."""
    if name == "coco" and not COCO.exists():
        pytest.skip("no COCO sample beside the repository")
    source = dict(name="scenes", split="validation", num_examples=5)
    if name == "coco":
        source = dict(name="coco", split="val2017", data_dir=str(COCO))
    entry = dict(source=source, batch_size=4, every=7, masks=("predicted", "truth"), limit=5)
    other = dict(entry, limit=2, masks="none")
    config = ConfigDict(dict(evals={"b": entry, "a": other}, data=dict(image_size=S)))
    method = PatchMethod()
    method.texts = Words()
    mesh = make_mesh(devices=jax.devices()[:2])
    first, second = make_evaluators(config, method, mesh)
    assert (first.name, second.name, second.every) == ("a", "b", 7)
    assert make_evaluators(config, method, mesh, "final_evals") == []
    assert isinstance(second, SegmentationEvaluator)

    scores = second.run(VARIABLES)
    assert {"miou", "miou@truth", "grounding_miou", "recall@0.5"} <= set(scores)
    data = make_source(source)
    truth, segments = np.zeros(len(data.classes), np.int64), 0
    for i in range(5):
        example = data[i]
        classes = np.concatenate([[-1], example["class_ids"]])[example["segments"]]
        truth += np.bincount(classes[classes >= 0], minlength=len(truth))
        counted = np.concatenate([[False], ~example["iscrowd"]])
        segments += counted[np.unique(example["segments"])].sum()
    assert [row.pixels for row in second.tables["iou"]] == truth.tolist()
    hits = scores["recall@0.5"] * segments / 100
    assert hits == pytest.approx(round(hits), abs=1e-6)


class Words(dict):
    """A fixed random vector for every text."""

    def __missing__(self, text):
        self[text] = np.random.default_rng(list(text.encode())).normal(size=D)
        return self[text]


def test_an_unknown_type_is_said():
    mesh = make_mesh(devices=jax.devices()[:1])
    for entry, said in (
        (dict(type="detection"), "'detection' is not one of segmentation"),
        (dict(type="ovseg_jax.evals.segmentation:Missing"), "cannot be imported"),
        (dict(type="no_such_module:Class"), "cannot be imported"),
        (
            dict(type="ovseg_jax.evals.segmentation:Sums"),
            "evaluator 'ovseg_jax.evals.segmentation:Sums' does not derive from",
        ),
        (dict(type="classification"), "does not support"),
    ):
        with pytest.raises(UserError, match=said):
            make_evaluators(ConfigDict(dict(evals=dict(a=entry), data={})), PatchMethod(), mesh)


def test_nothing_to_evaluate_is_said():
    with pytest.raises(UserError, match="no image"):
        evaluate(n=0)
    with pytest.raises(UserError, match=r"evals\.test\.masks"):
        evaluate(modes=("best",))
