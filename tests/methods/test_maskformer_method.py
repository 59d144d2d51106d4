"""The method MaskFormer: its loss on padded and split batches, its closed vocabulary, its inference, a short run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.configs import maskformer
from ovseg_jax.decisions.maps import vocabulary_of
from ovseg_jax.decisions.rules import decide
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.keys import check_config
from ovseg_jax.experiment.run import train
from ovseg_jax.inference import export
from ovseg_jax.inference.segmenter import Segmenter
from ovseg_jax.methods import build
from ovseg_jax.methods.maskformer import SPACE
from ovseg_jax.methods.zsseg import CROPS, Rules, TwoStage
from ovseg_jax.pretrained.files import read_arrays
from ovseg_jax.protocols import Classifier
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList
from tests import reference
from tests.extras import require

CLASSES = ClassList(
    (("cat", "kitten"), ("sky",), ("dog",)), (1, 2, 3), (True, False, True), {"held_out": (2,)}
)


def config(**changes):
    found = maskformer.get_config()
    found.model.update(dict(num_queries=4, width=32, mask_dim=16, layers=2, heads=2, ffn=16, **changes))
    found.model.backbone.width = 16
    found.update(dict(batch_size=4, log_every=2))
    found.data.image_size = 32
    return found


def method(**changes):
    return build(config(**changes), WordList(["cat"]), CLASSES)


def batch(count=4, seed=0):
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, 3, 32, 32), np.uint8)
    masks[:, 0, :16], masks[:, 1, 16:, :16], masks[:, 2, 16:, 16:] = 255, 255, 255
    return {
        "image": rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
        "image_size": np.full((count, 2), 32, np.int32),
        "masks": masks,
        "mask_valid": np.array([[True, True, k % 2 == 0] for k in range(count)]),
        "mask_classes": np.array([[0, 1, 2 if k % 2 == 0 else -1] for k in range(count)], np.int32),
        "example_mask": np.ones(count, bool),
    }


@pytest.fixture(scope="module")
def drawn():
    shapes = jax.eval_shape(method().init, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), shapes)


def loss_of(found, variables, data):
    return jax.jit(lambda v, b: found.loss(v, b, jax.random.key(0)))(
        variables, jax.tree.map(jnp.asarray, data)
    )


def test_padding_withheld_classes_and_parts_change_nothing(drawn):
    data = batch()
    value, aux = loss_of(method(), drawn, data)
    assert {"loss", "focal_loss", "dice_loss", "class_loss"} == set(aux.metrics)
    assert aux.metrics["dice_loss"][1] == 8  # the third masks are of a held-out class
    other = {k: x.copy() for k, x in data.items()}
    other["masks"][:, 2] = 255 - other["masks"][:, 2]
    padded = {k: np.concatenate([x, batch(4, seed=1)[k]]) for k, x in other.items()}
    padded["example_mask"][4:], padded["image_size"][4:] = False, 0
    split = config()
    split.accumulate = 2
    again, _ = loss_of(build(split, WordList(["cat"]), CLASSES), drawn, padded)
    np.testing.assert_allclose(again, value, rtol=1e-5)


def test_inference_is_the_sum_of_class_probability_times_mask(drawn):
    found, image = method(), batch(1)["image"]
    size = jnp.full((1, 2), 32)
    prediction = jax.jit(found.predict)(drawn, jnp.asarray(image), size)
    text = found.embed_text(drawn, CLASSES.flat()[0])
    out, logits = jax.jit(found.model.apply)(drawn, jnp.asarray(image), size)
    share = np.exp(np.float64(logits[0, -1]))
    share = share / share.sum(-1, keepdims=True)
    np.testing.assert_allclose(prediction.void[0], share[:, 3], rtol=1e-4)
    masks = 1 / (1 + np.exp(-np.float64(out.mask_logits[0, -1])))
    expected = np.einsum("nk,nhw->khw", share[:, :3], masks).argmax(0)
    vocabulary = vocabulary_of(CLASSES)
    decided = decide(
        found,
        prediction,
        text,
        vocabulary,
        size,
        jnp.full((1, 2), 8),
        jnp.ones((1, 1, 4), bool),
        canvas=32,
        shape=(8, 8),
    )
    np.testing.assert_array_equal(decided.category[0, 0], expected)
    # A name means its class, in any order.
    np.testing.assert_array_equal(found.embed_text(drawn, ["sky", "kitten"])[SPACE], [[0, 1, 0], [1, 0, 0]])


def test_the_vocabulary_is_closed(drawn):
    with pytest.raises(UserError, match=r"this MaskFormer has no text side and.*'horse'"):
        method().embed_text(drawn, ["cat", "horse"])


class Fixed(Classifier):
    def score_images(self, image, text):
        return image @ text["x"].T


def test_two_stages_take_probabilities_as_they_are(drawn):
    """With w = 1 for seen classes a class scores its share among the classes and "no object"."""
    found = method()
    both = TwoStage(found, Fixed(), Rules(crop_size=8, ensemble=1.0))
    prediction = jax.tree.map(
        lambda x: x[0], jax.jit(found.predict)(drawn, jnp.asarray(batch(1)["image"]), jnp.full((1, 2), 32))
    )
    prediction = prediction._replace(regions={**prediction.regions, CROPS: jnp.ones((4, 2))})
    text = {**found.embed_text(drawn, ["cat", "sky", "dog"]), CROPS + "x": jnp.ones((3, 2))}
    vocabulary = vocabulary_of(
        ClassList((("cat",), ("sky",), ("dog",)), (0, 1, 2), (True,) * 3), {"cat", "sky", "dog"}
    )
    # With all names asked for nothing is normalised again.
    scores = both.score_regions(prediction, text, vocabulary).names
    np.testing.assert_allclose(scores, prediction.regions[SPACE].T, rtol=1e-4)


def test_errors():
    with pytest.raises(UserError, match=r"unknown keys of config\.model: colour"):
        method(colour=1)
    both = config(init="x")
    both.model.backbone.init = "y"
    with pytest.raises(UserError, match=r"model\.init and model\.backbone\.init are both set"):
        build(both, WordList(["cat"]), CLASSES)
    held = ClassList((("cat",),), (0,), (True,), {"unseen": (0,)})
    with pytest.raises(UserError, match="no class outside of the groups"):
        build(config(), WordList(["cat"]), held)


def test_pytorch_gives_the_same_labels_and_outputs(drawn, tmp_path):
    torch = require("torch")
    import ovseg_jax.torch

    segmenter = Segmenter(method(), jax.tree.map(np.asarray, drawn), config(), CLASSES)
    export.to_folder(segmenter, tmp_path, np.dtype("float32"))
    loaded = ovseg_jax.torch.load(tmp_path)
    image = np.random.default_rng(3).integers(0, 256, (53, 71, 3), dtype=np.uint8)
    for labels in ("kitten; sky", None):
        ours, theirs = segmenter.segment(image, labels), loaded.segment(image, labels)
        assert (ours.label_map == theirs.label_map).mean() > 0.999
        np.testing.assert_allclose(theirs.confidence, ours.confidence, atol=1e-4)
    pixels, size = batch(2)["image"], np.array([[32, 32], [20, 27]], np.int32)
    expected = jax.jit(method().predict)(drawn, jnp.asarray(pixels), jnp.asarray(size))
    with torch.no_grad():
        found = loaded.net(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(size))
    assert reference.relative_error(found.mask_logits, expected.mask_logits) < 1e-4
    np.testing.assert_allclose(found.regions, expected.regions[SPACE], atol=1e-4)
    np.testing.assert_allclose(found.void, expected.void, atol=1e-4)
    with pytest.raises(UserError, match=r"no text side and.*'zebra'"):
        loaded.segment(image, "zebra")
    with pytest.raises(UserError, match="vectors have no effect"):
        loaded.segment(image, "sky", vectors=np.ones((1, 3)))
    both = torch.export.export(
        loaded.net,
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.full((2, 2), 32)),
        dynamic_shapes=({0: torch.export.Dim("batch")}, {0: torch.export.Dim("batch")}),
    )
    three = torch.from_numpy(batch(3)["image"]).permute(0, 3, 1, 2), torch.full((3, 2), 32)
    with torch.no_grad():
        torch.testing.assert_close(both.module()(*three).regions, loaded.net(*three).regions)


def test_stablehlo_gives_the_same_outputs(drawn, tmp_path):
    require("flatbuffers")
    segmenter = Segmenter(method(), jax.tree.map(np.asarray, drawn), config(), CLASSES)
    export.to_stablehlo(segmenter, tmp_path, np.dtype("float32"))
    exported = jax.export.deserialize(bytearray((tmp_path / "model.stablehlo").read_bytes()))
    image, size = batch(3)["image"], np.full((3, 2), 32, np.int32)
    logits, scores, void = exported.call(read_arrays(tmp_path), image, size, np.eye(3, dtype=np.float32)[:2])
    expected = jax.jit(method().predict)(drawn, jnp.asarray(image), jnp.asarray(size))
    np.testing.assert_allclose(logits, expected.mask_logits, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(scores, jnp.swapaxes(expected.regions[SPACE], 1, 2)[:, :2], atol=1e-4)
    np.testing.assert_allclose(void, expected.void, atol=1e-4)


@pytest.mark.parametrize(
    "arg",
    [
        "data=prepared,data_dir=x,val_dir=y,backbone=swin_small,evals=panoptic",
        "data=coco,data_dir=x,backbone=swin_base_384,published=hf:a/b",
        "data=folder,data_dir=x,kind=semantic,weights=scratch",
        "classes=text,data=prepared,data_dir=x,prompt=y",
        "classes=text,data=folder,data_dir=x,unseen=voc,backbone=resnet101",
    ],
)
def test_configs_have_no_unknown_key(arg):
    check_config(maskformer.get_config(arg))


def test_a_short_run(tmp_path):
    found = config()
    found.steps, found.batch_size, found.evals = 2, 8, {}
    found.data.train = [dict(name="scenes", split="train", num_examples=8, image_size=32)]
    own = dict(source=dict(name="scenes", split="test", num_examples=8, image_size=32), batch_size=8)
    found.final_evals = dict(
        test=dict(own, type="segmentation", masks=("predicted",)), panoptic=dict(own, type="panoptic")
    )
    train(found, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 0 <= summary["test/miou"] <= 100 and "panoptic/pq" in summary and "test/recall@0.5" in summary
    segmenter, image = Segmenter.from_checkpoint(tmp_path), batch(1)["image"][0]
    result = segmenter.segment(image, "grass; water")
    assert set(np.unique(result.label_map)) <= {-1, 0, 1}
    with pytest.raises(UserError, match=r"no text side and.*'zebra'"):
        segmenter.segment(image, "zebra")


def text_config(**changes):
    found = maskformer.get_config("classes=text")
    own = config(**changes)
    for key in own.model:
        found.model[key] = own.model[key]
    found.update(dict(batch_size=4, log_every=2))
    found.data.image_size = 32
    found.model.update(dict(embed_dim=6, embed_hidden=8))
    return found


def test_classes_as_texts_take_any_name_and_do_not_train_those_withheld():
    """Scores against NumPy: a softmax of cosines over the classes by their best names, and "no object"."""
    words = WordList("cat kitten sky dog cow".split())
    found = build(text_config(), words, CLASSES)
    variables = jax.tree.map(
        lambda x: x + jax.random.normal(jax.random.key(1), x.shape) * 0.1, found.init(jax.random.key(0))
    )
    image, size = jnp.asarray(batch(1)["image"]), jnp.full((1, 2), 32)
    prediction = jax.tree.map(lambda x: x[0], jax.jit(found.predict)(variables, image, size))
    names = ["cat", "kitten", "cow"]
    text = found.embed_text(variables, names)
    vocabulary = vocabulary_of(ClassList((("cat", "kitten"), ("cow",)), (0, 1), (True, True)))
    scores = found.score_regions(prediction, text, vocabulary)
    logits = 20 * np.float64(text["text"]) @ np.float64(prediction.regions["text"]).T
    void = 20 * np.float64(prediction.void)
    total = np.exp(logits[:2].max(0)) + np.exp(logits[2]) + np.exp(void)
    np.testing.assert_allclose(scores.names, np.exp(logits) / total, rtol=1e-3)
    np.testing.assert_allclose(scores.void, np.exp(void) / total, rtol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(prediction.regions["text"], axis=-1), 1, rtol=1e-4)
    # In two stages with w = 1, the same; the logarithm gives the logits back up to a constant.
    both = TwoStage(found, Fixed(), Rules(crop_size=8, ensemble=1.0))
    joined = prediction._replace(regions={**prediction.regions, CROPS: jnp.ones((4, 2))})
    seen = vocabulary._replace(seen=jnp.ones(3, bool))
    again = both.score_regions(joined, {**text, CROPS + "x": jnp.ones((3, 2))}, seen).names
    np.testing.assert_allclose(again, scores.names, rtol=1e-3)

    loss = lambda v: found.loss(v, jax.tree.map(jnp.asarray, batch()), jax.random.key(0))[0]
    table = jax.jit(jax.grad(loss))(variables)["params"]["text"]["table"]
    moved = np.abs(table).max(1) > 0
    assert [moved[words.id(word)] for word in ("cat", "sky", "dog", "cow")] == [True, True, False, False]


def test_text_errors():
    with pytest.raises(UserError, match=r"model\.init has no effect with maskformer_text"):
        build(text_config(init="x"), WordList(["cat"]), CLASSES)
    split = text_config()
    split.loss.unseen = "zebra"
    with pytest.raises(UserError, match="the unseen class 'zebra' is not one of the 3"):
        build(split, WordList(["cat"]), CLASSES)
