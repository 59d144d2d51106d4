"""UMG-CLIP's pre-training: eq. 3 against float64 NumPy, on devices, in parts, with padding; and its config."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ovseg_jax.configs import umg_clip
from ovseg_jax.data.pipeline import train_iterator
from ovseg_jax.data.sources.build import make_source
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.run import evaluate, train
from ovseg_jax.inference.export import export_model
from ovseg_jax.inference.segmenter import Segmenter
from ovseg_jax.methods import build, training_rows
from ovseg_jax.methods.umg_clip import UMGClip
from ovseg_jax.towers.clip import SPACE
from ovseg_jax.train.checkpoints import load_variables
from ovseg_jax.train.optimizer import make_optimizer
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList
from tests import reference
from tests.extras import require
from tests.methods.steps import take_steps

B, SIZE, PATCH, D = 8, 32, 8, 16
KEY, CLASSES = jax.random.key(0), ClassList((), (), ())
EVA = dict(name="eva", patch=PATCH, grid=4, width=16, depth=1, heads=2, hidden=24, embed_dim=D, rope_grid=4)
VIT = dict(name="vit", patch=PATCH, grid=(4, 4), width=16, depth=1, heads=2, mlp_dim=24, embed_dim=D)


def config_of(arg="adapt=none", image=EVA, **changes):
    config = umg_clip.get_config(arg)
    config.towers.image = image
    config.towers.text = dict(name="clip", width=16, heads=2, layers=1, embed_dim=D, length=20)
    config.towers.image_size = config.data.image_size = SIZE
    config.update(dict(batch_size=B, steps=4))
    config.data.train = [dict(name="scenes", split="train", num_examples=24, image_size=SIZE, size="tiny")]
    config.data.update(dict(max_boxes=4, max_tags=3, max_box_tags=2, max_box_tokens=8, max_tag_tokens=4))
    config.update_from_flattened_dict(changes)
    return config


def made(config):
    """The method and a batch of scenes, of which one example is padding."""
    source = make_source(config.data.train)
    words = WordList(UMGClip.vocabulary(config, source))
    method = build(config, words, source.classes)
    batch = next(train_iterator(config, training_rows(config, method, words), source=source))
    return method, dict(batch, example_mask=np.arange(B) != 3)


@pytest.fixture(scope="module")
def whole():
    config = config_of()
    method, batch = made(config)
    return config, method, batch, jax.jit(method.init)(KEY)


def random_like(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), tree)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def both_ways(x, y, scale):
    """CLIP's loss of matching rows, and its gradients in x and y."""
    g = scale * x @ y.T
    share = lambda axis: (
        np.exp(g - g.max(axis, keepdims=True))
        / np.exp(g - g.max(axis, keepdims=True)).sum(axis, keepdims=True)
    )
    value = -(np.log(np.diag(share(0))) + np.log(np.diag(share(1)))).mean() / 2
    slope = scale * (share(0) + share(1) - 2 * np.eye(len(g))) / (2 * len(g))
    return value, slope @ y, slope.T @ x


def test_the_loss_is_equation_3(whole):
    """Values and gradients of the caption losses over all images and all boxes, given the embeddings; then the sum."""
    _, method, batch, variables = whole
    rows, sums, _ = jax.jit(method._forward)(variables, batch, KEY)
    scale = float(method.logit_scale(variables))
    here = batch["example_mask"]
    want = 0.0
    for kind, exists in (("image", here), ("region", here[:, None] & batch["box_valid"])):
        valid = np.asarray(exists)
        np.testing.assert_array_equal(
            rows[f"{kind}_captions_valid"], valid
        )  # each image and box of `scenes` has a caption
        x, y = (np.float64(rows[name]) for name in (kind, f"{kind}_captions_text"))
        for one in (x, y):
            np.testing.assert_allclose(np.linalg.norm(one[valid], axis=-1), 1, atol=1e-5)
        value, *slopes = both_ways(x[valid], y[valid], scale)

        given = jnp.asarray(valid)

        def loss(x, y, given=given):
            out = method._contrast(x, y, given, jnp.float32(scale))
            return out.loss / 2 / out.pairs

        got, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(rows[kind], rows[f"{kind}_captions_text"])
        np.testing.assert_allclose(got, value, rtol=1e-5)
        for grad, slope in zip(grads, slopes, strict=True):
            np.testing.assert_allclose(np.asarray(grad)[valid], slope, atol=1e-5)
            assert not np.asarray(grad)[~valid].any()
        summed, count = (float(x) for x in sums[f"{kind}_tags"])
        assert count == valid.sum()
        want += {"image": 0.7, "region": 1.3}[kind] * (value + summed / count)
    weighted = build(
        config_of(**{"loss.image_weight": 0.7, "loss.region_weight": 1.3}), WordList([]), CLASSES
    )
    weighted.clip = method.clip
    loss, aux = jax.jit(weighted.loss)(variables, batch, KEY)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert aux.metrics["region_accuracy"][1] == (here[:, None] & batch["box_valid"]).sum()


def test_contrastive_tags_are_captions_of_one_drawn_tag(whole):
    """Every tag is drawn at some time, unused ones never; the loss is that of captions in float64."""
    _, plain, batch, variables = whole
    method = build(config_of("adapt=none,tags=contrastive"), WordList([]), CLASSES)
    method.clip = method._trained_clip = plain.clip
    batch = jax.tree.map(jnp.asarray, batch)
    scale, drawn, forward = float(method.logit_scale(variables)), {}, jax.jit(method._forward)
    tags = {term: method._embed_texts(variables, batch, term) for term in ("image_tags", "region_tags")}
    for draw in range(12):
        rows, sums, _ = forward(variables, batch, jax.random.key(draw))
        assert not sums
        for term, (texts, spoken) in tags.items():
            valid, found = np.asarray(rows[f"{term}_valid"]), np.asarray(rows[f"{term}_text"])
            same = np.abs(found[..., None, :] - unit(np.asarray(texts))).max(-1) < 1e-5
            assert (same & np.asarray(spoken)).any(-1)[valid].all()
            drawn[term] = drawn.get(term, False) | same
    for term, (_, spoken) in tags.items():
        spoken, kept = np.asarray(spoken), np.asarray(rows[f"{term}_valid"])
        assert drawn[term][kept][spoken[kept]].mean() > 0.95
    loss, aux = jax.jit(method.loss)(variables, batch, jax.random.key(11))
    want = 0.0
    for term in ("image_captions", "image_tags", "region_captions", "region_tags"):
        valid = np.asarray(rows[f"{term}_valid"])
        x, y = np.float64(rows[term.split("_")[0]])[valid], np.float64(rows[f"{term}_text"])[valid]
        value = both_ways(x, y, scale)[0]
        np.testing.assert_allclose(
            aux.metrics[f"{term}_loss"][0] / aux.metrics[f"{term}_loss"][1], value, rtol=1e-4
        )
        want += value
    np.testing.assert_allclose(loss, want, rtol=1e-4)


@pytest.mark.parametrize("normalise", ["pooled", "pixels"])
@pytest.mark.parametrize("image", [EVA, VIT])
def test_boxes_are_embedded_by_their_patches(image, normalise):
    """Two samples on each axis of a box, each between four patches, in NumPy."""
    method, batch = made(config_of(image=image, **{"dense.normalise": normalise, "dense.sampling": 2}))
    variables = jax.jit(method.init)(jax.random.key(1))
    box = np.array([[8, 0, 24, 16], [3, 9, 8, 16], [0, 0, 0, 0], [5, 7, 5, 9]], np.float32)
    boxes, valid = np.broadcast_to(box, (B, 4, 4)), np.array([[True, True, False, True]] * B)
    weights = method._weights(variables)
    patches = method.clip.embed_patches(weights, jnp.asarray(batch["image"]), "")
    got = method._embed_boxes(patches, jnp.asarray(boxes), jnp.asarray(valid))
    patches = np.float64(patches)
    if normalise == "pixels":
        patches = unit(patches)

    def between(at):
        """The weight of each of four patches at a place in pixels; the border's beyond its centre."""
        return np.maximum(0, 1 - np.abs(np.clip(at / PATCH - 0.5, 0, 3) - np.arange(4)))

    for k in (0, 1, 3):
        x0, y0, x1, y1 = box[k]
        rows = sum(between(y0 + share * (y1 - y0)) for share in (0.25, 0.75)) / 2
        columns = sum(between(x0 + share * (x1 - x0)) for share in (0.25, 0.75)) / 2
        mean = np.einsum("h,w,bhwc->bc", rows, columns, patches)
        np.testing.assert_allclose(got[:, k], unit(mean), atol=1e-5)
    assert np.isfinite(got).all()


def test_padding_has_no_influence(whole):
    _, method, batch, variables = whole
    loss = jax.jit(jax.value_and_grad(lambda params, batch: method.loss({"params": params}, batch, KEY)[0]))
    value, grads = loss(variables["params"], batch)
    rng, other = np.random.default_rng(0), {k: np.array(v) for k, v in batch.items()}
    off = ~other["box_valid"] | ~other["example_mask"][:, None]
    other["boxes"][off] = rng.uniform(-9, 50, (off.sum(), 4))
    other["box_tokens"][off], other["box_token_valid"][off] = 3, True
    other["box_tags"][off], other["box_tag_valid"][off] = 2, True
    other["image"][3], other["tokens"][3], other["tags"][3], other["tag_valid"][3] = 200, 1, 1, True
    changed, other_grads = loss(variables["params"], other)
    np.testing.assert_allclose(changed, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, other_grads)
    # Twice as many boxes and examples, all of them padding.
    more = {k: np.pad(v, [(0, B)] + [(0, 0)] * (v.ndim - 1)) for k, v in batch.items()}
    more |= {
        k: np.pad(x, [(0, 0), (0, 4)] + [(0, 0)] * (x.ndim - 2))
        for k, x in more.items()
        if k.startswith("box")
    }
    np.testing.assert_allclose(loss(variables["params"], more)[0], value, rtol=1e-5)
    silent = dict(batch, box_valid=np.zeros_like(batch["box_valid"]), example_mask=np.zeros(B, bool))
    value, grads = loss(variables["params"], silent)
    assert value == 0 and all(np.isfinite(x).all() and not x.any() for x in jax.tree.leaves(grads))


def test_devices_and_parts_make_no_difference(whole):
    config, method, batch, _ = whole
    parts = build(ConfigDict(config.to_dict() | {"accumulate": 2}), method.clip._words, CLASSES)
    batch = {k: np.concatenate([v, v[::-1]]) for k, v in batch.items()}
    sgd = dict(name="sgd", learning_rate=0.3, schedule="constant", momentum=0.0)
    ends = [take_steps(m, batch, devices, 3, sgd)[1:] for m, devices in ((method, 1), (parts, 8))]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), *ends)
    assert ends[0][1][-1] < ends[0][1][0]


def test_clusters_and_value_features_are_used_in_training():
    """Clusters only in training; value features there and in the features of pixels."""
    changes = {"clusters.ratio": 0.25, "towers.image.depth": 2}
    config = config_of(**changes)
    config.clusters.update(dict(after=1, neighbours=3))
    plain, batch = made(config_of(**{"towers.image.depth": 2}))
    words = plain.clip._words
    clustered = build(config, words, CLASSES)
    config = config_of(**{"towers.image.depth": 2, "dense.features": "value"})
    valued = build(config, words, CLASSES)
    variables = jax.jit(plain.init)(KEY)
    loss = lambda method: float(jax.jit(method.loss)(variables, batch, KEY)[0])
    want = loss(plain)
    assert abs(loss(clustered) - want) > 1e-4 < abs(loss(valued) - want)
    assert clustered.clip.image == plain.clip.image != clustered._trained_clip.image
    image, size = jnp.asarray(batch["image"]), jnp.full((B, 2), SIZE)
    seen = [jax.jit(method.predict)(variables, image, size).pixels["clip"] for method in (plain, valued)]
    assert np.abs(seen[0] - seen[1]).max() > 1e-3


def test_the_papers_rates_reach_all_parameters():
    """5.1 and EVA-CLIP's layer decay: block i of n at rate * decay^(n - i), the embeddings one further down."""
    config = umg_clip.get_config("data=umg41m,data_dir=x,paths=captions:c.text;tags:")
    assert dict(config.data.train[0]["paths"]) == {"captions": "c.text", "tags": ""}
    config.towers.update(dict(init="", tokenizer="words"))
    method = build(config, WordList(["a"]), CLASSES)
    params = jax.eval_shape(method.init, KEY)["params"]
    sgd = dict(name="sgd", learning_rate=5e-4, schedule="constant", momentum=0.0)
    sgd["multipliers"] = config.optimizer.multipliers
    optimizer = make_optimizer(ConfigDict(sgd), params, 10)
    ones = jax.tree.map(lambda x: jnp.ones(x.shape[:1]), params)  # rates are told apart by path alone
    update, _ = optimizer.transform.update(ones, optimizer.transform.init(ones), ones)
    rate = lambda tree: {float(f"{-x.ravel()[0]:.4g}") for x in jax.tree.leaves(tree)}
    image, text = update["image"], update["text"]
    shown = lambda rate: float(f"{rate:.4g}")
    assert rate([image["head"], image["norm"]]) == {4e-4} and rate(text["head"]) == {4e-5}
    assert rate([image["blocks_11"]]) == {shown(4e-4 * 0.75)}
    assert rate([image["blocks_0"]]) == {shown(4e-4 * 0.75**12)}
    assert rate([image[key] for key in ("cls", "pos_embedding", "embedding")]) == {shown(4e-4 * 0.75**13)}
    assert rate(text["Encoder_0"]["encoderblock_3"]) == {shown(4e-5 * 0.75**9)}
    assert rate([text["Embed_0"], text["pos_embedding"]]) == {shown(4e-5 * 0.75**13)}
    assert rate(text["Encoder_0"]["encoder_norm"]) == {4e-5} and rate(update["scale"]) == {5e-4}


@pytest.mark.parametrize(
    ("arg", "fields"),
    [
        ("adapt=none,losses=image_captions", "image tokens"),
        ("adapt=none,losses=captions", "image boxes tokens box_tokens"),
        ("adapt=none,losses=image_tags", "image boxes tokens tags box_tokens"),
        ("adapt=none", "image boxes tokens tags box_tokens box_tags"),
    ],
)
def test_a_row_of_table_7_reads_its_own_texts(arg, fields):
    assert UMGClip.fields(umg_clip.get_config(arg)) == tuple(fields.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense.normalise": "none"}, "dense.normalise='none' is not one of pooled, pixels"),
        ({"loss.tag_loss": "l2"}, "loss.tag_loss='l2' is not one of smooth_l1, contrastive"),
        ({"loss.tag_reduction": "max"}, "loss.tag_reduction='max' is not one of sum, mean"),
        ({"loss.terms": ("image_words",)}, "loss.terms: 'image_words' is not one of image_captions"),
        ({"loss.terms": ()}, "loss.terms: empty is not one of"),
        ({"dense.features": "values"}, "dense.features='values' is not one of plain, value"),
        (
            {"clusters.ratio": 0.5, "towers.image": dict(EVA, scan=1)},
            "towers.image.scan=1 is less than clusters.after=2",
        ),
        ({"clusters.ratio": 0.5}, "clusters.after=2 leaves no block of the 1"),
        (
            {"towers.image": dict(name="small", width=16, embed_dim=D)},
            "name='small' has no features of patches",
        ),
    ],
)
def test_a_wrong_config_is_a_sentence(changes, message):
    config = config_of()
    for key, value in changes.items():
        section, name = key.split(".")
        with config[section].ignore_type():
            config[section][name] = value
    with pytest.raises(UserError, match=message):
        build(config, WordList(["a"]), CLASSES)


def test_a_source_without_regions_is_a_sentence():
    config = config_of()
    config.data.train[0]["fields"] = ("image", "captions", "tags")
    with pytest.raises(UserError, match="no boxes and no region_captions, which the term 'region_captions'"):
        UMGClip.vocabulary(config, make_source(config.data.train))


def test_a_run_goes_on_where_it_was_and_scores_all_granularities(tmp_path):
    config = config_of(**{"checkpoint.every": 2, "checkpoint.keep": 2})
    scored, config.final_evals = config.final_evals, {}
    run = tmp_path / "run"
    train(config, run)
    whole, _ = load_variables(run)
    shutil.rmtree(run / "checkpoints/4")
    (run / "summary.json").unlink()
    train(config, run)
    jax.tree.map(np.testing.assert_array_equal, load_variables(run)[0], whole)
    config.final_evals = scored
    for evaluation in scored.values():
        evaluation.batch_size, evaluation.limit = 4, 8
        evaluation.source.update(dict(image_size=SIZE, size="tiny"))
    scored.retrieval.source.split = "train"  # no other words than those of the training
    assert {"classification/accuracy", "retrieval/R@1", "test/miou"} <= evaluate(config, run).keys()
    result = Segmenter.from_checkpoint(run).segment(np.full((20, 30, 3), 90, np.uint8), "red ball; grass")
    assert result.label_map.shape == (20, 30)


@pytest.mark.parametrize(
    ("image", "changes"),
    [
        (EVA, {}),
        (EVA | dict(swiglu=True, attn_norm=True, mlp_norm=True), {"dense.features": "value"}),
        (VIT, {"towers.adapter": umg_clip.adapter()}),
    ],
)
def test_a_trained_clip_in_pytorch_gives_the_same_features_and_labels(image, changes, tmp_path):
    torch = require("torch")
    import ovseg_jax.torch

    config = config_of(image=image, **changes)
    method, batch = made(config)
    variables = random_like(jax.eval_shape(method.init, KEY))
    segmenter = Segmenter(method, variables, config, CLASSES)
    export_model(lambda: segmenter, "torch", str(tmp_path))
    loaded = ovseg_jax.torch.load(tmp_path)
    pixels, sizes = np.asarray(batch["image"][:2]), np.array([[SIZE, SIZE], [SIZE, SIZE // 2]], np.int32)
    expected = jax.jit(method.predict)(variables, pixels, sizes)
    with torch.no_grad():
        found = loaded.net(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(sizes))
    inside = np.s_[:, :, : SIZE // PATCH // 2]
    error = reference.relative_error(
        found.pixel_embed.permute(0, 2, 3, 1)[inside], expected.pixels[SPACE][inside]
    )
    assert error < 1e-4
    source = make_source(config.data.train)
    labels = "; ".join(dict.fromkeys(tag for k in range(4) for tag in source[k]["tags"]))
    ours, theirs = segmenter.segment(pixels[0], labels), loaded.segment(pixels[0], labels)
    assert ours.label_map.min() >= 0 and ours.confidence.std() > 0
    assert (ours.label_map == theirs.label_map).mean() > 0.999
    np.testing.assert_allclose(theirs.confidence, ours.confidence, atol=1e-4)


def test_padding_beside_an_image_has_no_influence_on_its_patches(whole):
    _, method, batch, variables = whole
    image, sizes = np.asarray(batch["image"][:1]).copy(), np.array([[SIZE, SIZE // 2]], np.int32)
    other = image.copy()
    other[:, :, SIZE // 2 :] = 255 - other[:, :, SIZE // 2 :]
    run = jax.jit(method.predict)
    ours, theirs = (
        run(variables, x, sizes).pixels[SPACE][:, :, : SIZE // PATCH // 2] for x in (image, other)
    )
    np.testing.assert_array_equal(ours, theirs)
