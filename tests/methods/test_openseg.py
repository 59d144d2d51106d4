"""OpenSeg and its baseline as methods: what moves what, and what must not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.methods import build, openseg
from ovseg_jax.protocols import only
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList
from tests.methods.steps import check_devices, take_steps

S, B, M, K = 32, 4, 3, 5
WORDS = WordList(["red", "blue", "ball", "grass"])
CLASSES = ClassList(
    (("red ball",), ("blue ball",), ("grass",)), (0, 1, 2), (True, True, False), {"held_out": (1,)}
)


def make(method="openseg", backbone=None, loss=None, text=None, **model):
    config = ConfigDict(
        dict(
            method=method,
            batch_size=B,
            model=dict(
                dict(
                    backbone=backbone or dict(name="small", width=16, levels=3),
                    mean=(0.5,) * 3,
                    std=(0.25,) * 3,
                    width=16,
                    embed_dim=24,
                    num_queries=6,
                    decoder_layers=1,
                    head_convs=1,
                    position_grid=4,
                    mask_scale=0.25,
                    mask_bias=0.0,
                ),
                **model,
            ),
            text=text or dict(learned=True),
            loss=dict(
                dict(
                    mask_weight=2.0,
                    grounding_weight=1.0,
                    contrast="unsync",
                    group=2,
                    form="auto",
                    temperature=0.1,
                    temperature_bounds=(0.01, 1.0),
                    shared_temperature=True,
                ),
                **(loss or {}),
            ),
            data=dict(image_size=S),
        )
    )
    return build(config, WORDS, CLASSES)


def batch(seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        jnp.asarray,
        {
            "image": rng.integers(0, 256, (B, S, S, 3), np.uint8),
            "image_size": np.full((B, 2), S, np.int32),
            "masks": rng.integers(0, 2, (B, M, S // 2, S // 2), np.uint8) * np.uint8(255),
            "mask_valid": np.arange(B * M).reshape(B, M) % 3 < 2,
            "mask_weight": np.ones(B, np.float32),
            "word_ids": rng.integers(1, 5, (B, K)).astype(np.int32),
            "word_valid": np.arange(K)[None] < np.array([[2], [3], [1], [4]]),
            "pixel_classes": rng.integers(-1, 3, (B, S // 2, S // 2)).astype(np.int32),
            "example_mask": np.ones(B, bool),
        },
    )


_compiled = {}


def grads(data, accumulate=1, **changes):
    """Loss and gradients of `make(**changes)`, which is compiled once for all tests."""
    key = str((accumulate, changes))
    if key not in _compiled:
        method = make(**changes)
        method.config.accumulate = accumulate
        variables = jax.jit(method.init)(jax.random.key(0))
        rest = {k: v for k, v in variables.items() if k != "params"}
        loss = lambda params, data: method.loss({"params": params, **rest}, data, jax.random.key(1))
        _compiled[key] = jax.jit(jax.value_and_grad(loss, has_aux=True)), variables["params"]
    function, params = _compiled[key]
    return function(params, data)


def moved(tree):
    return {
        "/".join(str(k.key) for k in path): bool(np.any(np.asarray(leaf)))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_the_loss_is_eq_5_and_every_parameter_learns():
    (loss, aux), grad = grads(batch())
    mean = {k: float(s / c) for k, (s, c) in aux.metrics.items()}
    np.testing.assert_allclose(loss, mean["grounding_loss"] + 2 * mean["mask_loss"], rtol=1e-5)
    assert mean["region_temperature"] == pytest.approx(0.1, rel=1e-4)
    # A key's bias adds the same to every logit of a softmax: it cannot learn.
    still = [name for name, yes in moved(grad).items() if not yes and not ("key_" in name and "bias" in name)]
    assert not still


@pytest.mark.parametrize("detach", [False, True])
def test_detached_masks_learn_from_masks_alone(detach):
    _, grad = grads(batch(), loss=dict(mask_weight=0.0), detach_masks=detach)
    yes = moved(grad["image"])
    assert any(yes[name] for name in yes if name.startswith("decoder")) is not detach
    assert any(yes[name] for name in yes if name.startswith("head_z"))


def test_a_teacher_learns_without_words():
    _, grad = grads(batch(), loss=dict(grounding_weight=0.0))
    yes = moved(grad)
    assert not yes["text/table"]
    assert yes["image/decoder/queries"]


def test_padding_examples_change_nothing():
    data = batch()
    mask = jnp.array([True, True, True, False])
    other = batch(7)
    pad = lambda a, b: jnp.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b)
    results = [grads({**jax.tree.map(pad, data, x), "example_mask": mask})[0][0] for x in (data, other)]
    np.testing.assert_array_equal(*results)


def test_unsync_over_one_group_is_sync():
    one, other = (
        grads(batch(), loss=dict(contrast=contrast, group=B))[0][0] for contrast in ("sync", "unsync")
    )
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_the_canvas_beyond_the_image_is_not_seen():
    method = make()
    variables = jax.jit(method.init)(jax.random.key(0))
    data, size = batch(), jnp.tile(jnp.array([[20, 28]]), (B, 1))
    dark = data["image"].at[:, 20:].set(0).at[:, :, 28:].set(0)
    a, b = (jax.jit(method.predict)(variables, x, size) for x in (data["image"], dark))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert a.mask_logits.shape == (B, 6, S // 4, S // 4)
    assert only(a.regions).shape == (B, 6, 24)
    np.testing.assert_allclose(np.linalg.norm(only(a.regions), axis=-1), 1, rtol=1e-5)


def test_running_statistics_of_a_backbone_are_returned():
    method = make(backbone=dict(name="efficientnet_b0"))
    # Drawn by NumPy: the programs of this backbone's init take longer than all that is tested here.
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(rng.uniform(0.01, 0.1, x.shape), x.dtype)
    variables = jax.tree.map(draw, jax.eval_shape(method.init, jax.random.key(0)))
    loss, aux = jax.jit(method.loss)(variables, batch(), jax.random.key(1))
    assert np.isfinite(loss)
    before, after = variables["batch_stats"], aux.mutated["batch_stats"]
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert any(map(np.any, jax.tree.leaves(jax.tree.map(lambda a, b: np.asarray(a != b), before, after))))


def test_lseg_never_trains_on_held_out_classes():
    (_, aux), grad = grads(batch(), method="lseg")
    target = np.asarray(batch()["pixel_classes"])
    assert aux.metrics["pixel_accuracy"][1] == np.isin(target, (0, 2)).sum()
    table = np.asarray(grad["text"]["table"])
    assert np.any(table[WORDS.index["red"]])
    assert not np.any(table[WORDS.index["blue"]])
    method = make("lseg")
    prediction = jax.jit(method.predict)(
        jax.jit(method.init)(jax.random.key(0)), batch()["image"], batch()["image_size"]
    )
    assert prediction.mask_logits is None


@pytest.mark.parametrize(
    "change",
    [
        dict(loss=dict(contrast="both")),
        dict(loss=dict(form="circle")),
        dict(loss=dict(group=3)),
        dict(widht=3),
        dict(method="fcn"),
    ],
)
def test_a_config_that_cannot_be_is_a_sentence(change):
    with pytest.raises(UserError):
        make(**change)


@pytest.mark.parametrize("policy", ["dots", "all"])
def test_remat_changes_nothing_but_memory(policy):
    (loss, _), grad = grads(batch())
    (again, _), grad_again = grads(batch(), remat=policy)
    assert loss == again
    assert jax.tree.structure(grad) == jax.tree.structure(grad_again)
    for a, b in zip(jax.tree.leaves(grad_again), jax.tree.leaves(grad), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1e-3, np.abs(b).max()))


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0", "clip_rn50", "swin_tiny"])
def test_any_backbone_will_do(name):
    method = make(backbone=dict(name=name))
    variables = jax.eval_shape(method.init, jax.random.key(0))
    assert variables["params"]["image"]["backbone"]
    loss, _ = jax.eval_shape(method.loss, variables, batch(), jax.random.key(1))
    assert loss.shape == ()


def test_given_vectors_stay_while_the_image_side_learns(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(len(WORDS), 8)).astype(np.float32)
    np.savez(tmp_path / "vectors.npz", words=np.array(WORDS.words), vectors=vectors)
    text = dict(learned=False, vectors=str(tmp_path / "vectors.npz"))
    sgd = dict(name="sgd", learning_rate=1e-2, schedule="constant")
    before, after, losses = take_steps(make(text=text, embed_dim=8), batch(), 1, 1, sgd)
    np.testing.assert_array_equal(after["text"]["table"], before["text"]["table"])
    assert np.abs(before["text"]["table"]).sum() > 0 and np.isfinite(losses).all()
    assert np.any(after["image"]["decoder"]["queries"] != before["image"]["decoder"]["queries"])


@pytest.mark.parametrize(
    "changes",
    [
        dict(loss=dict(contrast="sync", group=B)),
        dict(loss=dict(contrast="unsync", group=B)),
        dict(method="lseg"),
    ],
    ids=str,
)
def test_a_batch_in_parts_is_the_whole_batch(changes):
    """Although words, masks and pixels are counted unevenly, and the contrast joins all parts."""
    (value, aux), grad = grads(batch(), **changes)
    (value_of_parts, aux_of_parts), grad_of_parts = grads(batch(), accumulate=2, **changes)
    np.testing.assert_allclose(value_of_parts, value, rtol=1e-5)
    for name, pair in aux.metrics.items():
        np.testing.assert_allclose(aux_of_parts.metrics[name], pair, rtol=1e-5, err_msg=name)
    for a, b in zip(jax.tree.leaves(grad_of_parts), jax.tree.leaves(grad), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1e-3, np.abs(b).max()))


@pytest.mark.parametrize(("contrast", "form"), [("unsync", "auto"), ("sync", "gather"), ("sync", "ring")])
def test_loss_curves_on_one_and_eight_devices_agree(contrast, form):
    data = jax.tree.map(lambda x: np.concatenate([x, x[::-1]]), jax.device_get(batch()))
    check_devices(make(loss=dict(contrast=contrast, form=form, group=4)), data, 8)


def test_the_mask_head_is_a_dot_product_unless_a_config_departs_from_it():
    image, size = jnp.asarray(batch()["image"]), jnp.full((B, 2), S)
    plain = make(mask_scale=1.0, mask_bias=None).net
    variables = jax.jit(plain.init)(jax.random.key(0), image, size)
    assert "mask_bias" not in variables["params"]
    logits = jax.jit(plain.apply)(variables, image, size).mask_logits
    other = make(mask_scale=2.0, mask_bias=-1.0).net
    params = {**variables["params"], "mask_bias": jnp.float32(-1.0)}
    np.testing.assert_allclose(
        jax.jit(other.apply)({**variables, "params": params}, image, size).mask_logits,
        2 * logits - 1,
        rtol=1e-5,
        atol=1e-5,
    )
    # The queries' last layer doubled doubles the logits: nothing divides them.
    doubled = jax.tree.map_with_path(
        lambda path, x: 2 * x if "mask_query" in jax.tree_util.keystr(path) else x, variables
    )
    np.testing.assert_allclose(
        jax.jit(plain.apply)(doubled, image, size).mask_logits, 2 * logits, rtol=1e-5, atol=1e-5
    )
    width = logits.std() / jax.jit(make(mask_bias=None).net.apply)(variables, image, size).mask_logits.std()
    assert width == pytest.approx(4, rel=1e-4)


@pytest.mark.parametrize("bounds", [(), (0.01, 1.0)])
def test_the_temperature_may_have_bounds(bounds):
    method = make(loss=dict(temperature_bounds=bounds))
    for start in (0.02, 0.07):
        raw = openseg.unbounded(start, *bounds)
        tau, _ = method.temperatures({"temperature": {"region": raw}})
        assert float(tau) == pytest.approx(start, rel=1e-4)
    with pytest.raises(UserError, match="outside its bounds"):
        openseg.unbounded(0.0, *bounds)
    far = method.temperatures({"temperature": {"region": jnp.float32(3.0)}})[0]
    assert (far > 1) == (not bounds)
