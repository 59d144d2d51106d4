"""The grounding loss against eq. 2-4 written out in float64 NumPy, dense, in groups and sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.kernels.grounding import caption_scores, grounding_loss
from ovseg_jax.parallel.sharding import AXES, make_mesh, put_batch

B, N, K, D = 16, 5, 3, 8
TAU, TAU2 = 0.07, 0.11


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make(seed=0):
    rng = np.random.default_rng(seed)
    valid = rng.random((B, K)) < 0.7
    valid[3] = False  # an image whose caption has no word
    example = np.ones(B, bool)
    example[-2:] = False  # padding
    return {
        "regions": unit(rng.normal(size=(B, N, D))).astype(np.float32),
        "words": unit(rng.normal(size=(B, K, D))).astype(np.float32),
        "word_valid": valid,
        "example_mask": example,
    }


def reference(regions, words, word_valid, example_mask):
    """Eq. 2-4 with loops, over the pairs that count."""
    keep = [b for b in range(len(regions)) if example_mask[b] and word_valid[b].any()]
    scores = np.zeros((len(keep), len(keep)))
    for i, a in enumerate(keep):
        for j, c in enumerate(keep):
            per_word = []
            for word in words[c][word_valid[c]].astype(np.float64):
                g = regions[a].astype(np.float64) @ word
                weight = np.exp(g / TAU) / np.exp(g / TAU).sum()
                per_word.append((weight * g).sum())
            scores[i, j] = np.mean(per_word) / TAU2
    log_softmax = lambda x, axis: x - np.log(np.exp(x).sum(axis, keepdims=True))
    loss = -(np.diag(log_softmax(scores, 0)) + np.diag(log_softmax(scores, 1))).sum()
    return loss, (scores.argmax(0) == np.arange(len(keep))).sum(), len(keep)


def loss_of(data, **kwargs):
    data = jax.tree.map(jnp.asarray, data)
    return grounding_loss(
        **data, region_temperature=jnp.array(TAU), pair_temperature=jnp.array(TAU2), **kwargs
    )


@pytest.mark.parametrize("how", [{}, {"form": "ring"}, {"form": "ring", "block": (4, 8)}], ids=str)
def test_whole_batch_equals_the_reference(how):
    data = make()
    out = jax.jit(lambda d: loss_of(d, group=None, **how))(data)
    loss, correct, count = reference(**data)
    np.testing.assert_allclose(out.loss, loss, rtol=1e-5)
    assert (out.correct, out.pairs) == (correct, count)


def test_the_log_says_which_form_was_picked(caplog):
    caplog.set_level("INFO", "ovseg_jax")
    jax.eval_shape(lambda d: loss_of(d, group=None), make())
    jax.eval_shape(lambda d: loss_of(d, group=None, form="ring", block=(4, 8)), make())
    assert caplog.messages == [
        "grounding loss of the whole batch: dense",
        "grounding loss of the whole batch: ring in blocks of 4 x 8",
    ]


def test_groups_equal_the_reference_on_each_group():
    data = make()
    out = loss_of(data, group=4)
    parts = [reference(**{k: v[i : i + 4] for k, v in data.items()}) for i in range(0, B, 4)]
    np.testing.assert_allclose(out.loss, sum(p[0] for p in parts), rtol=1e-5)
    assert out.pairs == sum(p[2] for p in parts)


@pytest.mark.parametrize(
    "how",
    [{"group": None, "form": "gather"}, {"group": None, "form": "ring"}, {"group": 2}, {"group": 4}],
    ids=str,
)
@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 2, "fsdp": 4}])
def test_eight_devices_equal_one_in_value_and_gradient(how, shape):
    data = make(1)
    mesh = make_mesh(shape)

    def mean(regions, words, rest, axes):
        out = loss_of({"regions": regions, "words": words, **rest}, **how, batch_axes=axes)
        return out.loss / out.pairs

    rest = {k: data[k] for k in ("word_valid", "example_mask")}
    grad = jax.value_and_grad(mean, argnums=(0, 1))
    one = jax.jit(lambda r, w, x: grad(r, w, x, ()))(data["regions"], data["words"], rest)
    sharded = put_batch(data, mesh)
    with jax.set_mesh(mesh):
        rest = {k: sharded[k] for k in rest}
        many = jax.jit(lambda r, w, x: grad(r, w, x, AXES))(sharded["regions"], sharded["words"], rest)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_padding_changes_nothing():
    data = make()
    data["words"] = np.where(data["word_valid"][..., None], data["words"], 7.0).astype(np.float32)
    data["regions"][~data["example_mask"]] = 3.0
    np.testing.assert_allclose(loss_of(data, group=None).loss, reference(**data)[0], rtol=1e-5)


def test_a_batch_without_words_has_zero_loss_and_finite_gradients():
    data = make()
    data["word_valid"] = np.zeros_like(data["word_valid"])

    def loss(regions):
        return loss_of({**data, "regions": regions}, group=None).loss

    value, grad = jax.value_and_grad(loss)(data["regions"])
    assert value == 0
    assert np.all(np.asarray(grad) == 0)


def test_a_group_that_does_not_divide_the_batch_is_an_error():
    with pytest.raises(ValueError, match="the group 5"):
        loss_of(make(), group=5)


def test_one_hot_attention_at_low_temperature_is_the_best_region():
    data = make()
    regions, words = data["regions"], data["words"]
    scores = caption_scores(*map(jnp.asarray, (regions, words, np.ones((B, K), bool))), jnp.array(1e-4))
    best = np.einsum("bnd,ckd->bckn", regions, words).max(-1).mean(-1)
    np.testing.assert_allclose(scores, best, rtol=1e-4)
