"""The method Mask2Former: its loss on padded batches, its inference as transformers' and the authors', a short run."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.configs import mask2former
from ovseg_jax.decisions.maps import vocabulary_of
from ovseg_jax.decisions.rules import Argmax, Instances, Panoptic, decide
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.run import train
from ovseg_jax.inference import export
from ovseg_jax.inference.segmenter import Segmenter
from ovseg_jax.methods import build
from ovseg_jax.pretrained.files import read_arrays
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList
from tests import reference
from tests.extras import require
from tests.methods.test_maskformer_method import CLASSES, batch, loss_of
from tests.segments import assert_same_segments


def config(**changes):
    found = mask2former.get_config()
    sizes = dict(num_queries=4, width=32, mask_dim=16, layers=2, heads=2, ffn=16, encoder_ffn=16)
    found.model.update(sizes | changes)
    found.model.backbone.width = 16
    found.update(dict(batch_size=4, log_every=2))
    found.data.image_size, found.loss.points = 32, 64
    return found


def method(classes=CLASSES, **changes):
    return build(config(**changes), WordList(["cat"]), classes)


@pytest.fixture(scope="module")
def drawn():
    shapes = jax.eval_shape(method().init, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), shapes)


def test_padding_and_withheld_classes_change_nothing(drawn):
    data = batch()
    value, aux = loss_of(method(), drawn, data)
    assert {"loss", "mask_loss", "dice_loss", "class_loss"} == set(aux.metrics)
    assert aux.metrics["dice_loss"][1] == 8  # the third masks are of a held-out class
    other = {k: x.copy() for k, x in data.items()}
    other["masks"][:, 2] = 255 - other["masks"][:, 2]
    padded = {k: np.concatenate([x, batch(4, seed=1)[k]]) for k, x in other.items()}
    padded["example_mask"][4:], padded["image_size"][4:] = False, 0
    again, _ = loss_of(method(), drawn, padded)
    np.testing.assert_allclose(again, value, rtol=1e-5)
    split = config()
    split.accumulate, split.loss.points = 2, 4096  # each part has its own points
    parts, _ = loss_of(build(split, WordList(["cat"]), CLASSES), drawn, padded)
    np.testing.assert_allclose(parts, value, rtol=0.02)


def decided(drawn, decision, classes=CLASSES, side=384):
    """Our decision for one image, and the logits of masks and classes that it is made of."""
    found, image, size = method(classes), batch(1)["image"], jnp.full((1, 2), 32)
    prediction = jax.jit(found.predict)(drawn, jnp.asarray(image), size)
    out, logits = jax.jit(found.model.apply)(drawn, jnp.asarray(image), size)
    assert out.mask_logits.shape[:3] == (1, 1, 4)
    text = found.embed_text(drawn, classes.flat()[0])
    views = jnp.ones((1, 1, len(classes.flat()[0])), bool)
    ours = decide(
        found,
        prediction,
        text,
        vocabulary_of(classes),
        size,
        jnp.full((1, 2), side),
        views,
        canvas=32,
        shape=(side, side),
        decision=decision,
    )
    return ours, np.array(out.mask_logits[0, -1]), np.array(logits[0, -1])


def same_instance(ours, info, mask):
    category, score, own = ours
    return (
        info["label_id"] == category and abs(info["score"] - score) < 2e-4 and (own == mask).mean() > 0.9999
    )


@pytest.fixture(scope="module")
def varied(drawn):
    """Variables whose queries have different classes, and masks that end inside of the image."""
    drawn = jax.tree.map(jnp.asarray, drawn)  # a copy
    head, dense = drawn["params"]["net"]["head"], drawn["params"]["classifier"]["dense"]
    for name, layer in head["decoder"].items():
        for branch in (
            layer[k] for k in ("mlp_out", "self_attention", "cross_attention") if "layer_" in name
        ):
            out = branch.get("out", branch)
            out["kernel"], out["bias"] = 0.2 * out["kernel"], 0.2 * out["bias"]
    features = head["pixel_decoder"]["mask_features"]
    features["kernel"] *= 20
    own = jax.jit(method().model.apply)(drawn, jnp.asarray(batch(1)["image"]), jnp.full((1, 2), 32))[0]
    features["bias"] -= own.pixels.mean((0, 1, 2))
    dense["kernel"] *= 5
    dense["bias"] -= jnp.asarray(decided(drawn, Argmax(), CLASSES)[2].mean(0))  # no class above the others
    return drawn


def test_semantic_and_instances_are_those_of_transformers(varied):
    torch, _ = require("torch"), require("transformers")
    from transformers.models.mask2former.image_processing_mask2former import Mask2FormerImageProcessor

    # transformers takes all classes for things.
    things = ClassList(CLASSES.names, CLASSES.ids, (True,) * 3)
    ours, masks, classes = decided(varied, Instances(top=4), things)
    logits = SimpleNamespace(
        masks_queries_logits=torch.from_numpy(masks)[None],
        class_queries_logits=torch.from_numpy(classes)[None],
    )
    process = Mask2FormerImageProcessor()
    (found,) = process.post_process_instance_segmentation(
        logits, threshold=0.0, target_sizes=[(384, 384)], return_binary_maps=True
    )
    segments = jax.tree.map(lambda x: np.asarray(x[0, 0]), ours.segments)
    real = segments.category >= 0
    assert real.sum() == len(found["segments_info"]) >= 3
    expected = list(zip(found["segments_info"], found["segmentation"].numpy() > 0, strict=True))
    for ours_ in zip(segments.category[real], segments.score[real], segments.masks[real], strict=True):
        at = [i for i, theirs in enumerate(expected) if same_instance(ours_, *theirs)]
        assert at
        del expected[at[0]]
    (semantic,) = process.post_process_semantic_segmentation(logits, target_sizes=[(384, 384)])
    ours, *_ = decided(varied, Argmax(), things)
    assert (semantic.numpy() == ours.category[0, 0]).mean() > 0.9999
    assert len(semantic.unique()) > 1


def test_panoptic_is_the_authors(drawn):
    """Their `panoptic_inference`, in NumPy; transformers compares weighted masks with 0.5, which theirs does not."""
    drawn = jax.tree.map(jnp.asarray, drawn)  # a copy, in which few queries are "no object"
    drawn["params"]["classifier"]["dense"]["bias"] = jnp.array([1.0, 1.0, 1.0, -2.0])
    ours, masks, classes = decided(drawn, Panoptic(object_threshold=0.3, overlap_threshold=0.3))
    share = np.exp(np.float64(classes))
    share /= share.sum(-1, keepdims=True)
    place = np.clip((np.arange(384) + 0.5) * 8 / 384 - 0.5, 0, 7)
    matrix = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(8)))
    assert masks.shape[1:] == (8, 8)
    probability = 1 / (1 + np.exp(-np.einsum("ri,nij,cj->nrc", matrix, np.float64(masks), matrix)))
    score, label = share.max(-1), share.argmax(-1)
    kept = np.flatnonzero((label != 3) & (score > 0.3))
    owner = kept[(score[kept, None, None] * probability[kept]).argmax(0)]
    expected, number, stuff = np.zeros((384, 384), int), 0, {}
    for k in kept:
        mask = (owner == k) & (probability[k] >= 0.5)
        original = (probability[k] >= 0.5).sum()
        if not mask.any() or (owner == k).sum() / original < 0.3:
            continue
        if not CLASSES.isthing[label[k]] and label[k] in stuff:
            expected[mask] = stuff[label[k]]
            continue
        number += 1
        stuff[label[k]] = number
        expected[mask] = number
    assert number >= 1
    segments = jax.tree.map(lambda x: None if x is None else np.asarray(x[0, 0]), ours.segments)
    assert (segments.number == expected).mean() > 0.9999
    for n in range(1, number + 1):
        assert segments.category[n - 1] in label[kept]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("run"), config()
    found.steps, found.batch_size, found.evals = 2, 8, {}
    found.data.train = [dict(name="scenes", split="train", num_examples=8, image_size=32)]
    source = dict(name="scenes", split="test", num_examples=8, image_size=32)
    for one in found.final_evals.values():
        with one.unlocked():
            one.source, one.batch_size = source, 8
    train(found, folder)
    return folder


def test_a_short_run(run):
    summary = json.loads((run / "summary.json").read_text())
    assert {"test/miou", "panoptic/pq", "instances/ap"} <= summary.keys() and 0 <= summary[
        "panoptic/pq"
    ] <= 100
    result = Segmenter.from_checkpoint(run).segment(batch(1)["image"][0], "grass; water")
    assert set(np.unique(result.label_map)) <= {-1, 0, 1}


def test_mask2former_in_pytorch_gives_the_same_labels_and_outputs(varied, tmp_path):
    torch = require("torch")
    import ovseg_jax.torch

    segmenter = Segmenter(method(), varied, config(), CLASSES)
    export.export_model(lambda: segmenter, "torch", str(tmp_path))
    loaded = ovseg_jax.torch.load(tmp_path)
    image = np.random.default_rng(3).integers(0, 256, (53, 71, 3), dtype=np.uint8)
    for labels in ("kitten; sky", None):
        ours, theirs = segmenter.segment(image, labels), loaded.segment(image, labels)
        assert len(np.unique(ours.label_map)) > 1
        assert (ours.label_map == theirs.label_map).mean() > 0.999
        np.testing.assert_allclose(theirs.confidence, ours.confidence, atol=1e-4)
        for decision in ("panoptic", dict(type="instances", top=3)):
            assert_same_segments(*(x.segment(image, labels, decision=decision) for x in (segmenter, loaded)))
    predict = jax.jit(method().predict)
    for canvas, sizes in (((32, 32), [(32, 32), (20, 27)]), ((64, 90), [(64, 90), (41, 70), (7, 90)])):
        pixels = np.random.default_rng(4).integers(0, 256, (len(sizes), *canvas, 3), np.uint8)
        expected = predict(varied, pixels, np.array(sizes, np.int32))
        with torch.no_grad():
            found = loaded.net(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor(sizes))
        assert 0.05 < (found.mask_logits > 0).float().mean() < 0.95
        error = reference.relative_error(found.mask_logits, expected.mask_logits)
        print(f"Mask2Former in PyTorch, canvas {canvas}: masks max relative error {error:.1e}")
        assert error < 1e-4
        np.testing.assert_allclose(found.regions, expected.regions["class"], atol=1e-4)
        np.testing.assert_allclose(found.void, expected.void, atol=1e-4)


def test_stablehlo_of_mask2former_gives_the_same_outputs(varied, tmp_path):
    require("flatbuffers")
    export.to_stablehlo(Segmenter(method(), varied, config(), CLASSES), tmp_path, np.dtype("float32"))
    exported = jax.export.deserialize(bytearray((tmp_path / "model.stablehlo").read_bytes()))
    image, size = batch(3)["image"], np.array([[32, 32], [20, 27], [9, 32]], np.int32)
    logits, scores, void = exported.call(read_arrays(tmp_path), image, size, np.eye(3, dtype=np.float32)[:2])
    expected = jax.jit(method().predict)(varied, image, size)
    np.testing.assert_allclose(logits, expected.mask_logits, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(scores, jnp.swapaxes(expected.regions["class"], 1, 2)[:, :2], atol=1e-4)
    np.testing.assert_allclose(void, expected.void, atol=1e-4)


def test_errors():
    with pytest.raises(UserError, match=r"unknown keys of config\.model: colour"):
        method(colour=1)
    held = ClassList((("cat",),), (0,), (True,), {"unseen": (0,)})
    with pytest.raises(UserError, match="mask2former: the training data has no class outside"):
        method(held)
