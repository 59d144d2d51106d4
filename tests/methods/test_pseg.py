"""P-Seg as a method: its loss by hand, what moves what, and what must not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy.optimize import linear_sum_assignment

from ovseg_jax.data.source_base import Source
from ovseg_jax.errors import UserError
from ovseg_jax.methods import build
from ovseg_jax.methods.pseg import PSeg
from ovseg_jax.parallel.sharding import make_mesh, put_batch
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList
from tests.methods.steps import check_devices

S, B, M, L = 32, 4, 3, 6
WORDS = WordList(["red", "blue", "ball", "grass"])
CLASSES = ClassList((("red ball",), ("grass",)), (0, 1), (True, False), {})
PAPER = dict(mask_weight=1.0, matching="hungarian", aggregation="mean")
SMALL = dict(mask_weight=2.0, matching="best", aggregation="words", group=2)


def make(small=False, text=None, loss=None, pseudo_masks=None, **model):
    net = dict(network="openseg", num_queries=5, width=16, embed_dim=24, decoder_layers=1, head_convs=1)
    net |= dict(position_grid=4, mask_bias=-1.0)
    if not small:
        net = dict(network="maskformer", num_queries=5, width=32, mask_dim=16, layers=1, heads=2, ffn=32)
        net |= dict(dropout=0.0, embed_dim=24, projection_hidden=32, projection_norm=False)
    losses = dict(contrastive_weight=1.0, average=False, focal=20.0, dice=1.0, form="auto")
    losses |= dict(temperature=0.1, temperature_bounds=(0.01, 1.0))
    transformer = dict(tokenizer="words", vocab_size=0, length=L, width=16, layers=1, heads=2)
    transformer |= dict(projection_hidden=16, projection_norm=False, prompt="{}")
    backbone = dict(name="small", width=16, levels=2)
    config = ConfigDict(
        dict(
            method="pseg",
            batch_size=B,
            model=dict(backbone=backbone, mean=(0.5,) * 3, std=(0.25,) * 3, **net) | model,
            text=(dict(learned=True, layers=0) if small else transformer) | (text or {}),
            loss=losses | (SMALL if small else PAPER) | (loss or {}),
            data=dict(image_size=S),
            **({"pseudo_masks": pseudo_masks} if pseudo_masks else {}),
        )
    )
    return build(config, WORDS, CLASSES)


def texts(rng, length):
    """Token rows of some lengths [n 1]."""
    tokens = np.where(np.arange(L) < length - 1, rng.integers(1, 5, (len(length), L)), 0)
    np.put_along_axis(tokens, length - 1, 6, 1)  # the end, which has the highest id
    return tokens.astype(np.int32)


def batch(small=False, seed=0, prompts=0):
    rng = np.random.default_rng(seed)
    length = np.arange(B)[:, None] % 4 + 2
    tokens = texts(rng, length)
    row = {
        "image": rng.integers(0, 256, (B, S, S, 3), np.uint8),
        "image_size": np.full((B, 2), S, np.int32),
        "masks": rng.integers(0, 2, (B, M, S // 2, S // 2), np.uint8) * np.uint8(255),
        "mask_valid": np.arange(B * M).reshape(B, M) % 3 < 2,
        "mask_weight": np.ones(B, np.float32),
        "example_mask": np.ones(B, bool),
    }
    if prompts:
        made = [texts(rng, (length + k) % 4 + 2) for k in range(prompts)]
        row |= {"prompts": np.stack(made, 1), "prompt_valid": np.ones((B, prompts, L), bool)}
    if small:
        row |= {"word_ids": rng.integers(1, 5, (B, L)).astype(np.int32), "word_valid": np.arange(L) < length}
    else:
        row |= {"tokens": tokens, "token_valid": np.arange(L) < length}
    return jax.tree.map(jnp.asarray, row)


_compiled = {}


def grads(data, small=False, accumulate=1, **changes):
    """Loss and gradients of `make(small, **changes)`, which is compiled once for all tests."""
    key = str((small, accumulate, changes))
    if key not in _compiled:
        method = make(small, **changes)
        method.config.accumulate = accumulate
        variables = jax.jit(method.init)(jax.random.key(0))
        rest = {k: v for k, v in variables.items() if k != "params"}
        loss = lambda params, data: method.loss({"params": params, **rest}, data, jax.random.key(1))
        _compiled[key] = jax.jit(jax.value_and_grad(loss, has_aux=True)), variables["params"]
    function, params = _compiled[key]
    return function(params, data)


def test_the_papers_loss_is_eq_1_to_4_in_float64():
    method, data = make(), batch()
    variables = jax.jit(method.init)(jax.random.key(0))
    (loss, aux), _ = grads(data)
    own = lambda part: {"params": variables["params"][part]}
    out = jax.jit(method.net.apply)(own("image"), data["image"], data["image_size"])
    text = np.asarray(jax.jit(method.text.net.apply)(own("text"), data["tokens"]), np.float64)
    image = np.asarray(out.image, np.float64)
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (image, text))
    logits = x @ y.T / 0.1  # eq. 2 and 3
    log_softmax = lambda axis: logits - np.log(np.exp(logits).sum(axis, keepdims=True))
    contrast = -np.diag(log_softmax(1)).mean() - np.diag(log_softmax(0)).mean()
    np.testing.assert_allclose(
        float(aux.metrics["contrastive_loss"][0]) / B, contrast, rtol=1e-4
    )  # their sum, 3.3.2

    total = count = 0
    for logit, masks, valid in zip(out.mask_logits[:, 0], data["masks"], data["mask_valid"], strict=True):
        fine = np.asarray(jax.image.resize(logit, (5, S // 2, S // 2), "bilinear"), np.float64)
        part = lambda x, t: focal_and_dice(x, t, 20.0, 1.0)
        t = np.asarray(masks, np.float64)[np.asarray(valid)] / 255
        coarse = t[:, ::2, ::2]  # nearest pixels at the size of the logits, as MaskFormer matches
        cost = np.array([[part(np.asarray(x, np.float64), m) for m in coarse] for x in logit])
        rows, columns = linear_sum_assignment(cost)
        total += sum(part(fine[i], t[j]) for i, j in zip(rows, columns, strict=True))
        count += len(t)
    np.testing.assert_allclose(float(loss), contrast + total / count, rtol=1e-4)  # eq. 4


def test_prompts_add_groupvits_multi_label_loss():
    """In float64: an image's soft target is 1/M for each of its prompts, a prompt's its image; halved."""
    weight, m = 0.7, 2
    method, data = make(loss=dict(multi_label_weight=weight)), batch(prompts=m)
    assert method.fields(method.config) == ("image", "masks", "tokens", "prompts")
    variables = jax.jit(method.init)(jax.random.key(0))
    variables["params"]["temperature"]["prompts"] += 0.5  # another temperature than that of captions
    sigma = float(method._temperature(variables["params"], "prompts"))
    loss, aux = jax.jit(method.loss)(variables, data, jax.random.key(1))
    own = lambda part: {"params": variables["params"][part]}
    image = jax.jit(method.net.apply)(own("image"), data["image"], data["image_size"]).image
    flat = jax.jit(method.text.net.apply)(own("text"), data["prompts"].reshape(B * m, L))
    x, y = (np.float64(v) / np.linalg.norm(np.float64(v), axis=1, keepdims=True) for v in (image, flat))
    g = x @ y.T / sigma
    own_text = np.arange(B * m) // m == np.arange(B)[:, None]
    log_softmax = lambda axis: g - np.log(np.exp(g).sum(axis, keepdims=True))
    of_images = -(own_text / m * log_softmax(1)).sum() / B
    of_prompts = -(own_text * log_softmax(0)).sum() / (B * m)
    want = (of_images + of_prompts) / 2
    total, count = aux.metrics["multi_label_loss"]
    np.testing.assert_allclose(total / count, want, rtol=1e-4)
    plain, _ = make().loss(variables, data, jax.random.key(1))
    np.testing.assert_allclose(loss, plain + weight * want, rtol=1e-5)


def test_prompts_in_parts_with_padding_and_on_four_devices_give_one_loss():
    changes = dict(loss=dict(multi_label_weight=1.0))
    data = batch(prompts=3)
    data["prompt_valid"] = data["prompt_valid"].at[2].set(False)  # an image without a caption
    data["example_mask"] = jnp.arange(B) != 1
    (loss, aux), grad = grads(data, **changes)
    assert aux.metrics["multi_label_loss"][1] == 2
    noisy = dict(data) | {"prompts": data["prompts"].at[1:3].set(5)}
    for (same, _), same_grad in (grads(data, accumulate=2, **changes), grads(noisy, **changes)):
        np.testing.assert_allclose(loss, same, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grad, same_grad)
    mesh = make_mesh({"data": -1}, jax.devices()[:4])
    for form in ("gather", "ring"):
        method = make(loss=dict(multi_label_weight=1.0, form=form))
        variables = jax.jit(method.init)(jax.random.key(0))
        with jax.set_mesh(mesh):
            loss = lambda p, d, method=method: method.loss({"params": p}, d, jax.random.key(1))
            step = jax.jit(jax.grad(loss, has_aux=True))
            parts, shared = step(variables["params"], put_batch(jax.device_get(data), mesh))
        np.testing.assert_allclose(*(x.metrics["multi_label_loss"][0] for x in (aux, shared)), rtol=1e-4)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4), grad, parts)


def make_vit(small, **pseudo_masks):
    """Baseline 2: its masks are the pseudo-masks."""
    config = make(small).config.to_dict()
    vit = dict(
        name="vit", patch=8, width=16, depth=1, heads=2, mlp_dim=16, grid=(4, 4), cls="none", pool="mean"
    )
    config["model"] = dict(network="segment_vit", backbone=vit, mean=(0.4,) * 3, std=(0.2,) * 3, embed_dim=24)
    config["model"] |= dict(projection_hidden=20, projection_norm=False)
    config["loss"]["mask_weight"] = 0.0
    made = dict(features="colour", clusters=M, stride=4, mask_stride=4) | pseudo_masks
    return build(ConfigDict(config | {"pseudo_masks": made}), WORDS, CLASSES)


@pytest.mark.parametrize("small", [False, True])
def test_baseline_2_pools_the_tokens_of_each_pseudo_mask(small):
    method = make_vit(small)
    data = {key: x for key, x in batch(small).items() if not key.startswith("mask")}
    assert method.fields(method.config) == ("image", "words" if small else "tokens")
    data["image"] = data["image"].at[1].set(7)  # one colour: clusters by place alone
    data["image"] = data["image"].at[2, :, 16:].set(200)
    size = data["image_size"].at[3].set(jnp.array([20, 28]))
    variables = jax.jit(method.init)(jax.random.key(0))
    params = variables["params"]["image"]
    out = jax.jit(method.net.apply)({"params": params}, data["image"], size)
    masks, valid = (np.asarray(x) for x in jax.jit(method.net.generator.apply)({}, data["image"], size))
    pixels = (np.asarray(data["image"]) / 255 - 0.4) / 0.2
    pixels[3, 20:], pixels[3, :, 28:] = 0, 0
    tower = jax.jit(method.net.tower.apply)({"params": params["tower"]}, jnp.asarray(pixels, jnp.float32))
    tokens, dense = np.float64(tower.tokens), params["projection"]

    def project(x):
        linear = lambda x, p: x @ np.float64(p["kernel"]) + np.float64(p["bias"])
        return linear(np.maximum(linear(x, dense["Dense_0"]), 0), dense["Dense_1"])

    for b in range(B):
        pooled = []
        for k in np.flatnonzero(valid[b]):
            cell = np.float64(masks[b, k] > 0).reshape(4, 2, 4, 2).mean((1, 3))  # of each patch
            pooled.append((cell[..., None] * tokens[b]).sum((0, 1)) / cell.sum())
            np.testing.assert_allclose(out.regions[b, k], project(pooled[-1]), atol=1e-4)
        assert not np.any(out.regions[b][~valid[b]])
        np.testing.assert_allclose(out.image[b], project(np.mean(pooled, 0)), atol=1e-4)
    np.testing.assert_array_equal(np.asarray(out.mask_logits[:, 0]) > 0, masks > 0)
    loss, aux = jax.jit(method.loss)(variables, data, jax.random.key(1))
    total, count = aux.metrics["contrastive_loss"]
    assert "mask_loss" not in aux.metrics and np.isclose(loss, total / count)
    learn = jax.jit(jax.grad(lambda p: method.loss({"params": p}, data, jax.random.key(1))[0]))
    grad = jax.jit(learn)(variables["params"])
    assert all(np.any(np.asarray(x)) for x in jax.tree.leaves(grad["image"]["projection"]))


def test_the_tower_of_baseline_2s_masks_is_frozen_and_starts_from_weights(monkeypatch):
    tower = dict(name="vit", patch=8, width=16, depth=1, heads=2, mlp_dim=16, grid=(4, 4), cls="plain")
    config = make_vit(True).config
    config.pseudo_masks = dict(features="tower", backbone=tower, clusters=M, mask_stride=4)
    method = build(config, WORDS, CLASSES)
    variables = jax.jit(method.init)(jax.random.key(0))
    assert variables["params"]["image"]["generator"] and "^image/generator/" in method.frozen
    grad = jax.jit(jax.grad(lambda p: method.loss({"params": p}, batch(True), jax.random.key(1))[0]))(
        variables["params"]
    )
    assert not any(np.any(np.asarray(x)) for x in jax.tree.leaves(grad["image"]["generator"]))
    with pytest.raises(UserError, match=r"need backbone\.init"):
        method.pretrained()
    config.pseudo_masks.backbone.init = "here"
    monkeypatch.setattr(
        "ovseg_jax.pretrained.generator.load",
        lambda init, module, shapes, pixels: jax.tree.map(lambda x: np.full(x.shape, 0.25), dict(shapes)),
    )
    loaded = method.pretrained()["params"]["image"]["generator"]
    assert jax.tree.map(np.shape, loaded) == jax.tree.map(np.shape, variables["params"]["image"]["generator"])


def make_groups(**model):
    """GroupViT's grouping in place of P-Seg's masks."""
    config = make(True).config.to_dict()
    fields = dict(
        patch=8, width=16, heads=2, mlp_dim=16, grid=(4, 4), depths=(1, 1), tokens=(3, 0), groups=(3, 3)
    )
    fields |= dict(embed_dim=24, projection=20, projection_norm=False, mean=(0.4,) * 3, std=(0.2,) * 3)
    config["model"] = dict(network="groupvit", **(fields | model))
    config["loss"]["mask_weight"] = 0.0
    config.pop("pseudo_masks", None)
    return build(ConfigDict(config), WORDS, CLASSES)


def test_groupvits_groups_take_the_place_of_masks():
    method = make_groups()
    assert method.fields(method.config) == ("image", "words")
    data = {key: x for key, x in batch(True).items() if not key.startswith("mask")}
    size = data["image_size"].at[3].set(jnp.array([20, 28]))
    variables = jax.jit(method.init)(jax.random.key(0))
    params = variables["params"]["image"]["groups"]
    pixels = (np.asarray(data["image"]) / 255 - 0.4) / 0.2
    pixels[3, 20:], pixels[3, :, 28:] = 0, 0
    alone = jax.jit(method.net.groups.apply)({"params": params}, jnp.asarray(pixels, jnp.float32))
    found = jax.jit(method.predict)(variables, data["image"], size)
    share = np.float64(alone.assignment)
    np.testing.assert_allclose(found.mask_logits, 20 * (share - 0.5), atol=1e-4)
    regions = np.float64(alone.groups)
    regions /= np.linalg.norm(regions, axis=-1, keepdims=True)
    np.testing.assert_allclose(found.regions["text"], regions, atol=1e-5)
    expected = np.einsum("bghw,bgd->bhwd", share, regions)
    np.testing.assert_allclose(found.pixels["text"], expected, atol=1e-5)
    learn = jax.jit(jax.value_and_grad(lambda p, rng: method.loss({"params": p}, data, rng)[0]))
    (one, grad), (two, _) = (learn(variables["params"], jax.random.key(k)) for k in (1, 2))
    assert one != two  # the assignment is drawn
    assign = grad["image"]["groups"]["stage_0"]["assign"]
    assert all(np.any(np.asarray(assign[name]["kernel"])) for name in ("query", "key", "value"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model=dict(num_queries=3)), "groupvit has no key 'num_queries'"),
        (dict(loss=dict(mask_weight=1.0)), "learns no masks: set loss.mask_weight=0"),
        (dict(pseudo_masks=dict(features="colour", clusters=M)), "leave out the section pseudo_masks"),
    ],
)
def test_a_bad_value_of_the_grouping_is_named(change, message):
    config = make_groups().config.to_dict()
    for key, value in change.items():
        config[key] = config.get(key, {}) | value
    with pytest.raises(UserError, match=message):
        build(ConfigDict(config), WORDS, CLASSES)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.num_queries", 3, "segment_vit has no key 'num_queries'"),
        ("model.backbone.init", "x", "starts from random weights"),
        ("loss.mask_weight", 1.0, "learns none: set loss.mask_weight=0"),
        ("pseudo_masks", {}, "has the masks of the section pseudo_masks"),
        ("model.backbone", dict(name="small"), "'small' of the network segment_vit is no Vision Transformer"),
    ],
)
def test_a_bad_value_of_baseline_2_is_named(key, value, message):
    config = make_vit(False).config
    with config.unlocked():
        section, _, name = key.rpartition(".")
        target = config
        for part in filter(None, section.split(".")):
            target = target[part]
        target[name] = value
    with pytest.raises(UserError, match=message):
        build(config, WORDS, CLASSES)


def focal_and_dice(x, t, focal, dice):
    p = 1 / (1 + np.exp(-x))
    entropy = -(0.25 * t * (1 - p) ** 2 * np.log(p) + 0.75 * (1 - t) * p**2 * np.log(1 - p)).mean()
    return focal * entropy + dice * (1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))


@pytest.mark.parametrize("small", [False, True])
def test_an_augmentations_mask_weight_is_a_factor_of_the_mask_loss(small):
    """Also where all images of a batch have it, as they do: a weighted mean would not change."""
    data = batch(small)
    mean = lambda data: np.divide(*grads(data, small)[0][1].metrics["mask_loss"])
    some = data | {"mask_weight": jnp.full(B, 0.1)}
    np.testing.assert_allclose(mean(some), 0.1 * mean(data), rtol=1e-5)


@pytest.mark.parametrize("small", [False, True])
def test_every_parameter_learns(small):
    _, grad = grads(batch(small), small)
    flat = jax.tree_util.tree_leaves_with_path(grad)
    still = ["/".join(str(k.key) for k in path) for path, leaf in flat if not np.any(np.asarray(leaf))]
    # A key's bias adds the same to every logit of a softmax, and the first self-attention sees equal values.
    assert not [name for name in still if "key" not in name and "layer_0/self" not in name]


def test_deep_supervision_adds_the_loss_of_each_layer():
    deep = dict(layers=2, deep_supervision=True)
    method, data = make(**deep), batch()
    (_, aux), _ = grads(data, **deep)
    out = jax.jit(method.net.apply)(
        {"params": jax.jit(method.init)(jax.random.key(0))["params"]["image"]},
        data["image"],
        data["image_size"],
    )
    layers = [method._mask_loss(out.mask_logits[:, i : i + 1], data) for i in range(2)]
    np.testing.assert_allclose(aux.metrics["mask_loss"][0], sum(total for total, _ in layers), rtol=1e-4)
    assert layers[0][0] != layers[1][0]


def test_figure_17_halves_the_loss_of_eq_4():
    for average in (False, True):
        method, data = make(True, loss=dict(average=average)), batch(True)
        loss, aux = jax.jit(method.loss)(jax.jit(method.init)(jax.random.key(0)), data, jax.random.key(1))
        parts = {name: float(total / count) for name, (total, count) in aux.metrics.items()}
        both = parts["contrastive_loss"] + 2 * parts["mask_loss"]
        np.testing.assert_allclose(loss, both / 2 if average else both, rtol=1e-5)


@pytest.mark.parametrize("small", [False, True])
def test_padding_and_accumulation_change_nothing(small):
    data = batch(small)
    data["example_mask"] = jnp.arange(B) < 2
    (loss, _), grad = grads(data, small)
    other = batch(small, seed=1)
    noisy = {k: jnp.concatenate([data[k][:2], other[k][2:]]) for k in data} | {
        "example_mask": data["example_mask"]
    }
    (same, _), same_grad = grads(noisy, small)
    np.testing.assert_allclose(loss, same, rtol=1e-5)
    (parts, _), parts_grad = grads(data, small, accumulate=2)
    np.testing.assert_allclose(loss, parts, rtol=1e-5)
    for changed in (same_grad, parts_grad):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grad, changed)


def test_pixels_outside_of_an_image_change_no_prediction():
    for small in (False, True):
        method = make(small)
        variables = jax.jit(method.init)(jax.random.key(0))
        size = jnp.array([[20, 28]])
        image = np.random.default_rng(0).integers(0, 256, (2, 1, S, S, 3), np.uint8)
        image[1, :, :20, :28] = image[0, :, :20, :28]
        a, b = (jax.jit(method.predict)(variables, jnp.asarray(x), size) for x in image)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a.regions, b.regions
        )
        np.testing.assert_allclose(a.mask_logits[:, :, :5, :7], b.mask_logits[:, :, :5, :7], atol=1e-4)


def test_pseudo_masks_of_the_step_are_those_of_their_generator():
    made = dict(features="colour", clusters=M, stride=4, mask_stride=4)
    method, data = make(True, pseudo_masks=made), batch(True)
    variables = jax.jit(method.init)(jax.random.key(0))
    assert "masks" not in method.fields(method.config)
    masks, valid = jax.jit(method.generator.apply)({}, data["image"], data["image_size"])
    given = data | {"masks": masks, "mask_valid": valid}
    without = {k: v for k, v in data.items() if not k.startswith("mask")}
    found = jax.jit(method.loss)(variables, without, jax.random.key(1))[1].metrics["mask_loss"]
    expected = make(True).loss(variables, given, jax.random.key(1))[1].metrics["mask_loss"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_generators_tower_is_frozen():
    tower = dict(name="vit", patch=8, width=16, depth=1, heads=2, mlp_dim=16, grid=(4, 4), cls="plain")
    made = dict(features="tower", backbone=tower, clusters=M, mask_stride=4)
    method, data = make(True, pseudo_masks=made), batch(True)
    variables = jax.jit(method.init)(jax.random.key(0))
    assert variables["params"]["generator"] and "^generator/" in method.frozen
    grad = jax.jit(jax.grad(lambda p: method.loss({"params": p}, data, jax.random.key(1))[0]))(
        variables["params"]
    )
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(grad["generator"]))
    with pytest.raises(UserError, match=r"need backbone\.init"):  # random tokens would be no pseudo-masks
        method.pretrained()


def test_a_detached_mask_learns_from_masks_alone():
    for detach in (True, False):
        _, grad = grads(batch(True), True, loss=dict(mask_weight=0.0), detach_masks=detach)
        assert np.any(np.asarray(grad["image"]["decoder"]["queries"])) == (not detach)


def test_batch_statistics_are_of_the_means_and_serve_single_masks():
    norm = dict(projection_norm=True)
    method, data = make(text=norm, **norm), batch()
    variables = jax.jit(method.init)(jax.random.key(0))
    _, aux = jax.jit(method.loss)(variables, data, jax.random.key(1))
    for part in ("image", "text"):
        before, after = (jax.tree.leaves(tree["batch_stats"][part]) for tree in (variables, aux.mutated))
        assert len(after) == 2 and all(np.any(a != b) for a, b in zip(before, after, strict=True))
    one = jax.jit(method.predict)(variables, data["image"][:1], data["image_size"][:1])
    np.testing.assert_allclose(
        jax.jit(method.predict)(variables, data["image"], data["image_size"]).regions["text"][:1],
        one.regions["text"],
        atol=1e-5,
    )


@pytest.mark.parametrize("small", [False, True])
def test_four_devices_compute_the_steps_of_one(small):
    check_devices(make(small), jax.device_get(batch(small)), 4)


def test_texts_of_word_pieces_need_no_pass_over_captions():
    class Unread(Source):
        provides = frozenset({"image", "captions", "segments"})
        name = "unread"

        def __init__(self):
            self.classes = ClassList((), (), (), {})

        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise AssertionError("an example was read")

    config = ConfigDict(dict(text=dict(layers=2, tokenizer="clip"), loss=dict(mask_weight=1.0)))
    assert PSeg.vocabulary(config, Unread()) == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(loss=dict(matching="greedy")), "loss.matching='greedy' is not one of hungarian, best"),
        (dict(loss=dict(aggregation="words")), "text.layers=0"),
        (
            dict(small=True, loss=dict(multi_label_weight=1)),
            "multi_label_weight=1.0 needs a text transformer",
        ),
        (dict(network="detr"), "model.network='detr' is not one of maskformer, openseg"),
        (dict(small=True, num_queries=0), "P-Seg needs masks"),
        (dict(depth=2), "unknown keys of config.model: depth"),
        (dict(text=dict(tokenizer="")), "text.tokenizer is missing"),
        (dict(text=dict(tokenizer="no/folder")), "no/folder"),
        (dict(text=dict(vocab_size=3)), "text.vocab_size=3, but the tokeniser words has 7 pieces"),
    ],
)
def test_a_bad_value_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes).init(jax.random.key(0))


@pytest.mark.parametrize("small", [False, True])
def test_names_are_embedded_as_unit_vectors_whatever_their_number(small):
    method = make(small)
    variables = jax.jit(method.init)(jax.random.key(0))
    found = method.embed_text(variables, ["red ball", "grass", "blue ball"])["text"]
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(found[1:2], method.embed_text(variables, ["grass"])["text"], atol=1e-5)
    with pytest.raises(UserError, match="label"):
        method.embed_text(variables, [""])
