"""The evaluators `panoptic` and `instances` on the mesh, against a loop over masks and against pycocotools."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import panoptic_reference as reference
import pytest
from ml_collections import ConfigDict
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_segmentation import CLASSES, VARIABLES, M, PatchMethod, S, Words, batches, examples

from ovseg_jax.decisions.maps import vocabulary_of
from ovseg_jax.decisions.rules import decide, decision_of
from ovseg_jax.errors import UserError
from ovseg_jax.evals import instances
from ovseg_jax.evals.instances import InstancesEvaluator, shared_pixels, stand_in
from ovseg_jax.evals.panoptic import PanopticEvaluator
from ovseg_jax.evals.registry import make_evaluators
from ovseg_jax.kernels import resize
from ovseg_jax.parallel.sharding import make_mesh
from ovseg_jax.protocols import RegionScores

COCO_SAMPLE = Path(__file__).parents[2] / "../shared/data/coco_sample"


class Guess(PatchMethod):
    """Masks of the true segments and scores of their classes, both with some noise, from the image's colours."""

    def predict(self, variables, image, image_size):
        found = super().predict(variables, image, image_size)
        segment, label = (image[:, 2::4, 2::4, channel].astype(jnp.int32) // 40 for channel in (0, 1))
        masks = jnp.stack([segment == m for m in range(1, M + 2)], 1).astype(jnp.float32)
        share = jnp.einsum("bnhw,bhwk->bnk", masks, jax.nn.one_hot(label, 6))
        logits = 6 * masks - 3 + found.mask_logits
        return found._replace(mask_logits=logits, regions={"": found.regions[""], "share": share})

    def score_regions(self, prediction, text, vocabulary):
        share, noise = prediction.regions["share"], text[""] @ prediction.regions[""].T
        right = share[:, vocabulary.owner + 1] / jnp.maximum(share.sum(1, keepdims=True), 1)
        return RegionScores(0.7 * right.T + 0.15 * (noise + 1))


def data(n=11):
    """Examples with segments of classes, some of them crowds, some void, and an image that shows the segments."""
    out = []
    for i, e in enumerate(examples(n)):
        h, w = e["label_size"]
        classes = np.full(M, -1, np.int32)
        for m in range(M):
            if (e["segments"] == m + 1).any():
                classes[m] = e["label"][e["segments"] == m + 1][0]
        if i % 4 == 1:
            classes[1] = -1  # unlabelled
        present = np.isin(np.arange(1, M + 1), e["segments"])
        rows = np.arange(e["image_size"][0]) * h // e["image_size"][0]
        columns = np.arange(e["image_size"][1]) * w // e["image_size"][1]
        image = e["image"].copy()
        for channel, values in enumerate((e["segments"] + 1, e["label"] + 1)):
            image[: len(rows), : len(columns), channel] = 40 * values[rows][:, columns]
        crowd = present & ~e["segment_valid"]
        out.append(
            e | dict(image=image, segment_classes=classes, segment_iscrowd=crowd, segment_isthing=classes < 2)
        )
    return out


def evaluator(kind, *, n=11, size=4, devices=1, method=None, **options):
    mesh = make_mesh(devices=jax.devices()[:devices])
    return kind("test", method or Guess(), CLASSES, batches(data(n), size), mesh, **options)


def decided(decision, method=None):
    """The decision on each image by itself, cut to the label."""
    method = method or Guess()
    text = method.embed_text(VARIABLES, CLASSES.flat()[0])
    vocabulary = vocabulary_of(CLASSES)
    for e in data():
        h, w = (int(x) for x in e["label_size"])
        prediction = method.predict(
            VARIABLES, jnp.asarray(e["image"])[None], jnp.asarray(e["image_size"])[None]
        )
        views = jnp.ones((1, 1, len(vocabulary.owner)), bool)
        sizes = (jnp.asarray(e[key])[None] for key in ("image_size", "label_size"))
        found = decide(
            *(method, prediction, text, vocabulary, *sizes, views),
            canvas=S,
            shape=(h, w),
            decision=decision_of(decision),
        )
        yield e, e["segments"][:h, :w], jax.tree.map(lambda x: np.asarray(x[0, 0]), found)


def of_class(e):
    classes = {
        m + 1: int(k) for m, k in enumerate(e["segment_classes"]) if k >= 0 and (e["segments"] == m + 1).any()
    }
    return classes, {m + 1 for m in np.flatnonzero(e["segment_iscrowd"])}


@pytest.mark.parametrize("decision", ["panoptic", {"type": "panoptic", "overlap_threshold": 0.4}, "argmax"])
def test_panoptic_quality_is_that_of_a_loop_over_masks(decision):
    total = {}
    for e, true, found in decided(decision):
        number, category = found.category + 1, np.arange(len(CLASSES))
        if found.segments is not None:
            number, category = found.segments.number, found.segments.category
        true_class, crowds = of_class(e)
        true = np.where(np.isin(true, list(true_class)), true, 0)  # unlabelled segments are void
        guess = {int(p): int(category[p - 1]) for p in np.unique(number) if p}
        for k, counts in reference.counts(number, true, guess, true_class, crowds).items():
            total[k] = np.add(total.get(k, 0), counts)
    judge = evaluator(PanopticEvaluator, decision=decision)
    got = judge.run(VARIABLES)
    for suffix, group in (("", range(5)), ("/thing", (0, 1, 4)), ("/stuff", (2, 3)), ("/seen", (0, 1))):
        own = [got[f"{metric}{suffix}"] for metric in ("pq", "sq", "rq")]
        np.testing.assert_allclose(own, 100 * reference.means(total, group), rtol=1e-12)
    assert 5 < got["pq"] < 95
    row = judge.tables["pq"][2]
    assert (row.name, row.kind) == ("grass", "stuff")
    assert [row.tp, row.fp, row.fn] == [int(x) for x in total[2][1:]]


def test_average_precision_is_that_of_pycocotools_on_the_masks():
    truth = dict(images=[], annotations=[], categories=[dict(id=k) for k in (0, 1, 4)])
    results = []
    encode = lambda mask: coco_mask.encode(np.asfortranarray(mask, np.uint8))
    for number, (e, true, found) in enumerate(decided("instances"), 1):
        truth["images"].append(dict(id=number, height=true.shape[0], width=true.shape[1]))
        classes, crowds = of_class(e)
        for m, k in classes.items():
            if CLASSES.isthing[k]:
                own = dict(
                    category_id=k, image_id=number, iscrowd=int(m in crowds), area=int((true == m).sum())
                )
                truth["annotations"].append(
                    own | dict(id=len(truth["annotations"]) + 1, segmentation=encode(true == m))
                )
        for k, score, mask in zip(
            found.segments.category, found.segments.score, found.segments.masks, strict=True
        ):
            if k >= 0:
                own = dict(image_id=number, category_id=int(k), score=float(score), segmentation=encode(mask))
                results.append(own)
    official = COCO()
    official.dataset = truth
    official.createIndex()
    judge = COCOeval(official, official.loadRes(results), "segm")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    ours = evaluator(InstancesEvaluator)
    got = ours.run(VARIABLES)
    names = ("ap", "ap50", "ap75", "aps", "apm", "apl", "ar1", "ar10", "ar100")
    expected = {name: 100 * value for name, value in zip(names, judge.stats, strict=False) if value >= 0}
    assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    assert 5 < got["ap"] < got["ap50"] < 100 and set(got) - set(expected) == {"ap/seen"}
    table = ours.tables["ap"]
    assert [row.name for row in table] == ["cat", "dog", "emu"] and table[2].ap is None
    seen = judge.eval["precision"][:, :, :2, 0, 2]
    assert got["ap/seen"] == pytest.approx(100 * seen[seen > -1].mean())
    counted = [a["category_id"] for a in truth["annotations"] if not a["iscrowd"]]
    assert [row.instances for row in table] == [counted.count(k) for k in (0, 1, 4)]


@pytest.mark.parametrize("kind", [PanopticEvaluator, InstancesEvaluator])
def test_devices_batch_size_and_padding_change_no_number(kind):
    one = evaluator(kind)
    scores = one.run(VARIABLES)
    for options in (dict(devices=8), dict(size=11), dict(size=3, devices=2)):
        other = evaluator(kind, **options)
        assert other.run(VARIABLES) == scores and other.tables == one.tables


def test_masks_and_their_stand_ins_share_as_many_pixels(monkeypatch):
    monkeypatch.setattr(instances, "row_block", lambda rows, floats: resize.row_block(rows, 1, 4))
    rng = np.random.default_rng(0)
    segments = rng.integers(0, 5, (13, 9))
    masks = rng.random((6, 13, 9)) < np.array([0, 0.2, 0.5, 0.9, 1, 0.5])[:, None, None]
    masks[5] = segments == 3
    got = np.asarray(shared_pixels(jnp.asarray(masks), jnp.asarray(segments, jnp.int32), 5))
    np.testing.assert_array_equal(got, [[(m & (segments == k)).sum() for k in range(6)] for m in masks])
    area = np.bincount(segments.ravel(), minlength=6)
    found = [stand_in(row, area) for row in got]
    true = [stand_in(np.where(np.arange(6) == k, area, 0), area) for k in range(6)]
    assert [int(x) for x in coco_mask.area(found)] == masks.sum((1, 2)).tolist()
    real = lambda m: coco_mask.encode(np.asfortranarray(m, np.uint8))
    for crowd in (0, 1):
        expected = coco_mask.iou(
            [real(m) for m in masks], [real(segments == k) for k in range(6)], [crowd] * 6
        )
        np.testing.assert_array_equal(coco_mask.iou(found, true, [crowd] * 6), expected)


def test_a_per_pixel_method_is_scored_by_a_decision_without_masks():
    pixels = PatchMethod(per_pixel=True)
    assert 0 <= evaluator(PanopticEvaluator, method=pixels, decision="argmax").run(VARIABLES)["pq"] <= 100
    with pytest.raises(UserError, match="Panoptic needs predicted masks"):
        evaluator(PanopticEvaluator, method=pixels).run(VARIABLES)


def test_what_cannot_be_evaluated_is_said():
    with pytest.raises(UserError, match=r"evals\.test\.decision must be 'instances'"):
        evaluator(InstancesEvaluator, decision="panoptic")
    with pytest.raises(UserError, match="the decision 'best' is not one of"):
        evaluator(PanopticEvaluator, decision="best")
    for kind in (PanopticEvaluator, InstancesEvaluator):
        with pytest.raises(UserError, match=r"evals\.test: the source has no image with"):
            evaluator(kind, n=0).run(VARIABLES)


@pytest.mark.parametrize("name", ["scenes", "coco"])
def test_a_config_makes_them_of_real_sources(name):
    if name == "coco" and not COCO_SAMPLE.exists():
        pytest.skip("no COCO sample beside the repository")
    source = dict(name="scenes", split="validation", num_examples=5)
    if name == "coco":
        source = dict(name="coco", split="val2017", data_dir=str(COCO_SAMPLE))
    entry = dict(source=source, batch_size=4, limit=5)
    kinds = dict(
        a=dict(entry, type="panoptic"),
        b=dict(entry, type="instances", decision=dict(type="instances", top=9)),
    )
    config = ConfigDict(dict(evals=kinds, data=dict(image_size=S)))
    method = PatchMethod()
    method.texts = Words()
    panoptic, things = make_evaluators(config, method, make_mesh(devices=jax.devices()[:2]))
    assert {"pq", "sq", "rq", "pq/thing", "rq/stuff"} <= set(panoptic.run(VARIABLES))
    assert {"ap", "ap50", "ar100"} <= set(things.run(VARIABLES))
    rows = panoptic.tables["pq"]
    true = sum(row.tp + row.fn for row in rows)
    assert 5 < true == sum(_visible(source, 5)) and sum(row.fp for row in rows) > 0
    found = sum(row.instances for row in things.tables["ap"])
    assert found == sum(row.tp + row.fn for row in rows if row.kind == "thing")


def _visible(source, count):
    from ovseg_jax.data.sources.build import make_source

    read = make_source(source)
    for i in range(count):
        yield len(set(np.unique(read[i]["segments"])) - {0, *(np.flatnonzero(read[i]["iscrowd"]) + 1)})
