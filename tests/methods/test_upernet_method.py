"""The method on tiny networks: its loss, its scores, its names, and where its weights come from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from ovseg_jax.decisions.maps import vocabulary_of
from ovseg_jax.decisions.rules import decide
from ovseg_jax.errors import UserError
from ovseg_jax.evals.registry import make_evaluators
from ovseg_jax.methods.upernet import SPACE, UPerNetMethod, scores_of
from ovseg_jax.models.upernet import enlarge
from ovseg_jax.parallel.sharding import make_mesh
from ovseg_jax.protocols import Prediction
from ovseg_jax.vocab.classes import ClassList, parse_labels
from ovseg_jax.vocab.words import WordList
from tests.extras import require

CLASSES = parse_labels("sky; cat,kitten; grass")
VIT = dict(name="vit", patch=8, width=16, depth=4, heads=2, mlp_dim=16, grid=(4, 4), taps=(0, 1, 2, 3))


def config(**model):
    fields = dict(backbone=VIT, mean=(0.5,) * 3, std=(0.5,) * 3, width=8, pools=(1, 2), aux_width=4)
    fields |= dict(dropout=0.0, norm="batch")
    return ConfigDict(
        dict(
            method="upernet",
            accumulate=1,
            model=fields | model,
            loss=dict(auxiliary_weight=0.4),
            data=dict(image_size=32, mask_stride=1),
        )
    )


def method(classes=CLASSES, **model):
    return UPerNetMethod(config(**model), WordList([]), classes)


def batch():
    rng = np.random.default_rng(0)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (4, 32, 32, 3), np.uint8)),
        "image_size": jnp.full((4, 2), 32),
        "pixel_classes": jnp.asarray(rng.integers(-1, 3, (4, 32, 32)), jnp.int32),
        "example_mask": jnp.array([True, True, True, False]),
    }


@pytest.fixture(scope="module")
def state():
    made = method()
    return made, jax.jit(made.init)(jax.random.key(0))


def test_the_loss_is_the_cross_entropy_of_both_heads(state):
    made, variables = state
    loss, aux = jax.jit(made.loss)(variables, batch(), jax.random.key(1))
    out, _ = made.net.apply(
        {**variables, "params": variables["params"]["image"]},
        batch()["image"],
        batch()["image_size"],
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(1)},
    )
    target = np.asarray(batch()["pixel_classes"])[:3]
    means = []
    for logits in out:
        x = np.asarray(enlarge(logits, (32, 32)), np.float64)[:3]
        nll = np.log(np.exp(x).sum(-1)) - np.take_along_axis(x, np.maximum(target, 0)[..., None], -1)[..., 0]
        means.append(nll[target >= 0].mean())
        if len(means) == 1:
            correct = (x.argmax(-1) == target)[target >= 0].mean()
    assert float(loss) == pytest.approx(means[0] + 0.4 * means[1], rel=1e-5)
    total, count = aux.metrics["pixel_accuracy"]
    assert float(total / count) == pytest.approx(correct, abs=1e-6) and count == (target >= 0).sum()
    moved = aux.mutated["batch_stats"]["head"]["fusion"]["norm"]["mean"]
    assert np.abs(moved - variables["batch_stats"]["head"]["fusion"]["norm"]["mean"]).max() > 0


def test_withheld_classes_are_not_trained(state):
    made, variables = state
    withheld = method(dataclasses.replace(CLASSES, groups={"held_out": (1,)}))
    void = batch() | {"pixel_classes": jnp.where(batch()["pixel_classes"] == 1, -1, batch()["pixel_classes"])}
    losses = [m.loss(variables, b, jax.random.key(1))[0] for m, b in ((withheld, batch()), (made, void))]
    assert losses[0] == losses[1]


def test_every_parameter_learns_but_the_unused_norm(state):
    made, variables = state
    rest = {k: v for k, v in variables.items() if k != "params"}
    loss = lambda p: made.loss({"params": p, **rest}, batch(), jax.random.key(1))[0]
    grads = jax.jit(jax.grad(loss))(variables["params"])
    still = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree.leaves_with_path(grads)
        if not np.abs(leaf).max() > 1e-9
    }
    norm = "image/backbone/tower/Transformer/encoder_norm"
    assert {f"{norm}/scale", f"{norm}/bias"} <= still
    # A softmax ignores the bias of keys, and a batch norm those of the layers before it.
    others = {p for p in still if not p.endswith("key/bias") and not p.startswith(norm)}
    assert others <= {f"image/backbone/{name}/bias" for name in ("up_c2_0", "up_c2_1", "up_c3")}
    assert made.frozen == ("/tower/Transformer/encoder_norm/",)
    assert method(backbone=dict(name="small", width=16, levels=4)).frozen == ()


def test_the_best_class_is_that_of_the_interpolated_logits(state):
    made, _ = state
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 3, (2, 8, 8, 3)), jnp.float32)
    vocabulary = vocabulary_of(CLASSES)
    names = CLASSES.flat()[0]
    prediction = Prediction(None, {}, {SPACE: scores_of(logits)})
    text = made.embed_text({}, names)
    size = jnp.full((2, 2), 32)
    views = jnp.ones((2, 1, len(names)), bool)
    found = decide(
        made, prediction, text, vocabulary, size, size, views, canvas=32, shape=(32, 32), mode="none"
    )
    expected = np.asarray(enlarge(logits, (32, 32)).argmax(-1))
    np.testing.assert_array_equal(found.category[:, 0], expected)
    p = np.exp(np.asarray(logits, np.float64))
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(scores_of(logits), 1 + np.log(p) / np.log(3), atol=1e-5)
    np.testing.assert_allclose(scores_of(jnp.zeros((1, 1, 1, 3))), 0, atol=1e-6)


def linear(n, m):
    """Bilinear interpolation from n to m values, without aligned corners, as a matrix."""
    at = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(n)))


def enlarged(x, height, width):
    return np.einsum("ih,khw,jw->kij", linear(x.shape[1], height), x, linear(x.shape[2], width))


def test_sliding_windows_as_mmsegmentation(state, tmp_path):
    """`slide_inference` in float64: logits averaged over windows of 32 by 21, the last ones moved back."""
    made, variables = state
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32), variables)
    apply, own = jax.jit(made.net.apply), lambda: {**variables, "params": variables["params"]["image"]}
    image = jnp.asarray(rng.integers(0, 256, (8, 32, 32, 3)), jnp.uint8)
    mean = apply(own(), image, jnp.full((8, 2), 32)).logits.mean((0, 1, 2))
    # No class has the larger bias, so that all are predicted.
    variables = jax.tree.map(lambda x: x - mean if x.shape == (3,) else x, variables)
    sizes = [(40, 70), (66, 50), (32, 32)]
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "classes.txt").write_text("1:sky\n2:cat\n3:grass\n")
    right, shares = 0, np.zeros(4)
    windows = dict(stride=21, short=48, longest=80)
    for i, (height, width) in enumerate(sizes):
        image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        label = rng.integers(1, 4, (height, width)).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / f"images/{i}.png")
        Image.fromarray(label).save(tmp_path / f"masks/{i}.png")
        scale = min(80 / max(height, width), 48 / min(height, width))
        h, w = (int(n * scale + 0.5) for n in (height, width))
        resized = Image.fromarray(image).transform(
            (w, h), Image.EXTENT, (0, 0, width, height), Image.BILINEAR
        )
        sums, count = np.zeros((3, h, w)), np.zeros((h, w))
        for y in range(-(-max(h - 32, 0) // 21) + 1):
            for x in range(-(-max(w - 32, 0) // 21) + 1):
                top, left = min(21 * y, h - 32), min(21 * x, w - 32)
                crop = np.asarray(resized)[None, top : top + 32, left : left + 32]
                logits = apply(own(), jnp.asarray(crop), jnp.full((1, 2), 32)).logits[0]
                part = enlarged(np.float64(logits).transpose(2, 0, 1), 32, 32)
                sums[:, top : top + 32, left : left + 32] += part
                count[top : top + 32, left : left + 32] += 1
        assert count.min() == 1 and count.max() >= 4
        found = enlarged(sums / count, height, width).argmax(0) + 1
        right, shares = right + (found == label).sum(), shares + np.bincount(found.ravel(), minlength=4)
    total = shares.sum()
    assert shares.max() < 0.98 * total  # not one class everywhere
    source = dict(name="folder", data_dir=str(tmp_path), kind="semantic")
    evaluation = dict(type="segmentation", source=source, batch_size=2)
    run = config().to_dict() | {
        "final_evals": {"slide": evaluation | {"windows": windows}, "whole": evaluation}
    }
    slide, fitted = make_evaluators(ConfigDict(run), made, make_mesh(), "final_evals")
    assert slide.run(variables)["pacc"] == pytest.approx(100 * right / total, abs=0.05)
    assert abs(fitted.run(variables)["pacc"] - 100 * right / total) > 0.1


def test_names_are_those_of_its_classes(state):
    made, _ = state
    np.testing.assert_array_equal(made.embed_text({}, ["grass", "kitten"])[SPACE], [[0, 0, 1], [0, 1, 0]])
    with pytest.raises(UserError, match="no text side and knows 3 classes, but none is called 'dog'"):
        made.embed_text({}, ["cat", "dog"])


def test_wrong_configs():
    with pytest.raises(UserError, match="at least two classes to train, but the data has 1"):
        method(ClassList((("a",), ("b",)), (0, 1), (True, True), {"unseen": (1,)}))
    with pytest.raises(UserError, match=r"config\.model has no key 'wide'"):
        method(wide=3)
    with pytest.raises(UserError, match="needs the levels c2, c3, c4, c5, but the backbone has no c5"):
        method(backbone=dict(name="small", width=16, levels=3)).init(jax.random.key(0))
    with pytest.raises(UserError, match=r"model\.init and model\.backbone\.init are both given"):
        method(init="/a", backbone=VIT | dict(init="/b")).pretrained()


def test_it_starts_from_mae(tmp_path):
    """The encoder of a pretraining checkpoint; its decoder is not read, and the pyramid is new."""
    transformers = require("transformers")
    sizes = dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16)
    original = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(**sizes, image_size=32, patch_size=8, decoder_num_hidden_layers=1)
    )
    original.save_pretrained(tmp_path)
    made = method(backbone=VIT | dict(init=str(tmp_path)))
    found = made.pretrained()
    tower = found["params"]["image"]["backbone"]["tower"]
    expected = original.vit.embeddings.position_embeddings.numpy()
    np.testing.assert_array_equal(tower["pos_embedding"], expected)
    assert set(found["params"]["image"]) == {"backbone"}
    assert set(found["params"]["image"]["backbone"]) == {"tower"}
    shapes = jax.eval_shape(made.init, jax.random.key(0))["params"]["image"]["backbone"]["tower"]
    assert jax.tree.map(np.shape, tower) == jax.tree.map(lambda x: x.shape, shapes)
