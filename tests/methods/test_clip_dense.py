"""Dense CLIP against the last block in NumPy's float64; its configs on `scenes`, on sets, and with proposals."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ovseg_jax.configs import clip_dense
from ovseg_jax.decisions.maps import vocabulary_of
from ovseg_jax.decisions.rules import decide
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.keys import check_config
from ovseg_jax.experiment.run import train
from ovseg_jax.inference.export import export_model
from ovseg_jax.methods import build
from ovseg_jax.pretrained.published import pixels_of
from ovseg_jax.towers.clip import SPACE
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList
from tests.methods import torch_clip

WORDS = WordList("cat kitten dog sky emu sea".split())
CLASSES = ClassList((("cat",), ("sky",)), (0, 1), (True, False))


def config(features, image=None):
    found = torch_clip.config("clip_dense", {})
    found.update(dict(steps=0, dense=dict(features=features, prompt="{}")))
    found.towers.image = image or dict(
        name="vit",
        patch=4,
        width=8,
        depth=2,
        heads=2,
        mlp_dim=12,
        grid=(2, 2),
        embed_dim=torch_clip.D,
        pre_norm=True,
    )
    return found


def filled(colour):
    found = config("pseudo_masks")
    found.dense.update(dict(crop=False, fill=colour))
    return found


def drawn(method):
    """Random weights, with the positions and norms away from their start."""
    rng = np.random.default_rng(0)
    variables = {"params": {}, "towers": method.init(jax.random.key(0))["towers"]}
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.3, np.shape(x)), jnp.float32), variables)


def norm(x, p, epsilon=1e-6):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return x * np.float64(p["scale"]) + np.float64(p["bias"])


def dense(x, p):
    return x @ np.float64(p["kernel"]) + np.float64(p.get("bias", 0))


def gelu(x):
    from scipy.special import erf

    return x * (1 + erf(x / np.sqrt(2))) / 2


def test_features_of_patches_are_those_of_the_last_block():
    methods = {kind: build(config(kind), WORDS, CLASSES) for kind in ("value", "activation")}
    variables = drawn(methods["value"])
    image = np.random.default_rng(1).integers(0, 256, (2, 12, 12, 3)).astype(np.uint8)
    clip, weights = methods["value"].clip, variables["towers"]["image"]
    params = weights["params"]
    x = (image / 255 - np.array(clip._pixels()[0])) / np.array(clip._pixels()[1])
    out = jax.jit(clip.image.clone(taps=(0,)).apply)(weights, jnp.asarray(x, jnp.float32))
    size = jnp.array([[12, 12]] * 2)
    got = {
        kind: np.asarray(jax.jit(method.predict)(variables, jnp.asarray(image), size).pixels[SPACE])
        for kind, method in methods.items()
    }
    np.testing.assert_allclose(got["activation"], dense(np.float64(out.tokens), params["head"]), atol=1e-4)
    tokens, block = np.float64(out.taps[0]), params["Transformer"]["encoderblock_1"]
    attention = block["MultiHeadDotProductAttention_0"]
    y = norm(tokens, block["LayerNorm_0"])
    value = (
        np.einsum("bhwd,dnk->bhwnk", y, np.float64(attention["value"]["kernel"])) + attention["value"]["bias"]
    )
    mixed = (
        np.einsum("bhwnk,nkd->bhwd", value, np.float64(attention["out"]["kernel"])) + attention["out"]["bias"]
    )
    y = tokens + mixed
    mlp, z = block["MlpBlock_0"], norm(y, block["LayerNorm_1"])
    y = y + dense(gelu(dense(z, mlp["Dense_0"])), mlp["Dense_1"])
    want = dense(norm(y, params["Transformer"]["encoder_norm"]), params["head"])
    assert got["value"].shape == (2, 3, 3, torch_clip.D)
    np.testing.assert_allclose(got["value"], want, atol=1e-4)
    assert np.abs(got["value"] - got["activation"]).max() > 0.1


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            config("values"),
            "dense.features='values' is not one of activation, value, sclip, clearclip, pseudo_masks",
        ),
        (filled("grey"), "dense.fill='grey' is not one of mean, zero"),
        (
            config("value", dict(name="small", width=16, levels=2, embed_dim=torch_clip.D)),
            "name='small' has no features",
        ),
        (
            ConfigDict({**config("value").to_dict(), "steps": 3}),
            "steps=3: the method clip_dense is not trained",
        ),
    ],
)
def test_a_wrong_config_is_a_sentence(found, message):
    with pytest.raises(UserError, match=message):
        build(found, WORDS, CLASSES)


def keys_bicubic(image, size):
    """Bicubic interpolation without antialiasing to `size` x `size`, as in PyTorch: Keys' cubic with a = -0.75."""

    def matrix(pixels):
        out = np.zeros((size, pixels))
        for z in range(size):
            at = (z + 0.5) * pixels / size - 0.5
            for tap in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
                x = abs(at - tap)
                near = 1.25 * x**3 - 2.25 * x**2 + 1
                far = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
                out[z, min(max(tap, 0), pixels - 1)] += near if x <= 1 else far if x < 2 else 0
        return out

    made = np.einsum("yh,hwc,xw->yxc", matrix(image.shape[0]), image, matrix(image.shape[1]))
    return np.clip(np.round(made), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("crop", [False, True])
def test_pseudo_masks_are_shown_to_clip_one_by_one(crop):
    """Baseline 1 of papers/002: each cluster of the image alone, the best class of CLIP for all of its pixels."""
    found = config("pseudo_masks")
    found.dense.update(dict(crop=crop, fill="mean" if crop else "zero"))
    found.pseudo_masks = dict(features="colour", clusters=4, stride=2, mask_stride=1)
    method = build(found, WORDS, CLASSES)
    variables = drawn(method)
    rng, size = np.random.default_rng(2), np.array([[16, 16], [12, 10]])
    image = rng.integers(0, 40, (2, 16, 16, 3)).astype(np.uint8)
    image[:, :7] += np.uint8(200)
    image[:, :, 9:] += np.array([90, 0, 10], np.uint8)
    segment = jax.jit(lambda *x: method.generator.apply({}, *x, method="segments"))
    segments = np.asarray(segment(jnp.asarray(image), jnp.asarray(size)))
    alone, of = [], []
    for b, (h, w) in enumerate(size):
        for k in range(1, 5):
            mask = segments[b, :h, :w] == k
            fill = 255 * np.array(pixels_of("clip_vitb16").mean) if crop else np.zeros(3)
            shown = np.where(mask[..., None], image[b, :h, :w], fill)
            if crop:
                rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
                shown = shown[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            alone.append(keys_bicubic(shown, torch_clip.SIZE))
            of.append((b, mask))
    features = np.float64(jax.jit(method.embed_image)(variables, jnp.asarray(np.stack(alone))))
    text = features - features.mean(0)  # texts that tell the segments apart
    want = np.full((2, 16, 16), -1)
    for (b, mask), scores in zip(of, features @ text.T, strict=True):
        want[b, : mask.shape[0], : mask.shape[1]][mask] = scores.argmax()
    names = tuple((f"text {k}",) for k in range(8))
    vocabulary = vocabulary_of(ClassList(names, tuple(range(8)), (True,) * 8), frozenset())

    @jax.jit
    def category(image, size):
        seen = method.predict(variables, image, size)
        given = method, seen, {SPACE: jnp.asarray(text, jnp.float32)}, vocabulary, size, size
        return decide(*given, jnp.ones((2, 1, 8), bool), canvas=16, shape=(16, 16)).category[:, 0]

    np.testing.assert_array_equal(category(jnp.asarray(image), jnp.asarray(size)), want)
    assert len(np.unique(want)) > 4


def test_a_generators_tower_is_frozen_and_loaded(monkeypatch):
    found = config("pseudo_masks")
    found.dense.update(dict(crop=False, fill="zero"))
    tower = dict(
        name="vit", patch=8, width=16, depth=1, heads=2, mlp_dim=16, grid=(2, 2), cls="plain", init="here"
    )
    found.pseudo_masks = dict(features="tower", backbone=tower, clusters=2, mask_stride=4)
    method = build(found, WORDS, CLASSES)
    variables = method.init(jax.random.key(0))
    assert "^generator/" in method.frozen and not variables["params"]
    monkeypatch.setattr(
        "ovseg_jax.pretrained.generator.load",
        lambda init, module, shapes, pixels: jax.tree.map(lambda x: np.full(x.shape, 0.25), dict(shapes)),
    )
    loaded = method.pretrained()["generator"]
    assert jax.tree.map(np.shape, loaded) == jax.tree.map(np.shape, variables["generator"])
    assert all(np.all(x == 0.25) for x in jax.tree.leaves(loaded))


def test_an_export_that_there_is_not_is_refused(tmp_path):
    found = clip_dense.get_config("features=pseudo_masks")
    segmenter = SimpleNamespace(method=build(found, WORDS, CLASSES), config=found)
    with pytest.raises(UserError, match="--to=torch cannot hold clip_dense with features=pseudo_masks"):
        export_model(lambda: segmenter, "torch", str(tmp_path / "out"))


@pytest.mark.parametrize("features", ["activation", "proposals"])
def test_a_run_without_steps_is_scored(tmp_path, features):
    found = clip_dense.get_config(f"features={features}")
    check_config(found)
    for stage in found.stages:
        stage["config"].update(dict(steps=1, batch_size=8))
        own = dict(cache=False) | (dict(shots=1) if stage["config"].method == "clip" else {})
        stage["config"].data.train[0].update(own)
    if features == "proposals":
        teacher = found.stages[1]["config"]
        teacher.model.update(dict(width=16, embed_dim=16, num_queries=4, decoder_layers=1, position_grid=4))
        teacher.model.backbone.width, teacher.loss.group, teacher.data.image_size = 16, 8, 32
        teacher.data.train[0].update(dict(num_examples=8, image_size=32))
    found.final_evals.test.update(dict(batch_size=4))
    found.final_evals.test.source.update(dict(num_examples=4))
    summary = train(found, tmp_path)
    assert summary["steps"] == 0 and 0 <= summary["test/miou"] <= 100
    assert ("test/recall@0.5" in summary) == (features == "proposals")


def test_the_sets_of_figure_5():
    out = clip_dense.get_config("data=sets,eval_sets=s,features=activation,sets_are=prepared")
    check_config(out)
    assert set(out.final_evals) == {*("A-847", "PC-459", "A-150", "PC-59")}
    assert (out.data.image_size, out.dense.features, out.steps) == (640, "activation", 0)
    with_masks = clip_dense.get_config("data=sets,eval_sets=s,features=proposals,proposals=runs/o,sets=PC-59")
    check_config(with_masks)
    (evaluation,) = with_masks.final_evals.values()
    assert (evaluation.type, evaluation.proposals, evaluation.ensemble) == ("transfer", "runs/o", 0.0)
    for arg, message in (
        ("data=sets", "data=sets needs eval_sets"),
        ("data=sets,eval_sets=s,features=proposals", "features=proposals needs proposals"),
        ("data=sets,eval_sets=s,proposals=x", "proposals=x has no effect"),
        ("eval_sets=s", "eval_sets=s has no effect with data=scenes"),
    ):
        with pytest.raises(UserError, match=message):
            clip_dense.get_config(arg)


def test_the_sets_of_pseg_by_windows():
    check_config(clip_dense.get_config("features=pseudo_masks,crop=True"))
    out = clip_dense.get_config("data=sets,eval_sets=s,protocol=groupvit")
    check_config(out)
    assert set(out.final_evals) == {"VOC", "Context", "COCO-Object"} and out.data.image_size == 448
    voc = out.final_evals.VOC
    assert (voc.protocol, voc.background, voc.decision.threshold) == ("voc", "background", 0.2)
    masks = clip_dense.get_config("data=sets,eval_sets=s,protocol=groupvit,features=pseudo_masks,dino=d")
    check_config(masks)
    assert masks.final_evals == out.final_evals and masks.pseudo_masks.backbone.init == "d"
    assert masks.dense.to_dict() == dict(features="pseudo_masks", prompt="imagenet", crop=False, fill="zero")
    without = clip_dense.get_config("data=sets,eval_sets=s,protocol=groupvit,background=False,sets=VOC")
    voc = without.final_evals.VOC
    assert (voc.protocol, voc.ignore, voc.decision.type) == ("voc_foreground", "background", "argmax")
    for arg, message in (
        ("protocol=groupvit,features=proposals,proposals=x", "leave out features=proposals"),
        ("protocol=groupvit,image_size=64", "image_size=64 has no effect"),
        ("background=False", "background=False has no effect"),
        ("crop=True", "crop=True has no effect"),
    ):
        with pytest.raises(UserError, match=message):
            clip_dense.get_config(f"data=sets,eval_sets=s,{arg}")
