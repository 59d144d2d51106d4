"""The places of the shared block: beside its branches, and between two blocks."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.models.backbones import build_backbone
from ovseg_jax.models.eva import Eva
from ovseg_jax.models.text_towers import Bert, CLIPText, SiglipText
from ovseg_jax.models.transformer import Places, rotate
from ovseg_jax.models.vit import ViT
from ovseg_jax.pretrained.to_torch import describe
from ovseg_jax.towers.packed_text import Packed, encode_packed
from tests import reference

SHAPE: dict[str, Any] = dict(patch=8, width=16, depth=3, heads=2, taps=(0, 2))
TOWERS: dict[str, Any] = {
    "vit": ViT(**SHAPE, grid=(2, 3), mlp_dim=24),
    "vit, map": ViT(**SHAPE, grid=(2, 3), mlp_dim=24, cls="none", pool="map"),
    "eva02": Eva(
        **SHAPE, grid=2, hidden=24, embed_dim=8, rope_grid=2, swiglu=True, attn_norm=True, mlp_norm=True
    ),
    "e14": Eva(**SHAPE, grid=2, hidden=24, embed_dim=8, post_norm=True),
}
IMAGE = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 24, 3)), jnp.float32)


class Adapter(nn.Module):
    """A linear map that starts as zeros."""

    @nn.compact
    def __call__(self, x, places):
        assert places.grid == (2, 3) and x.shape[1] == places.first + places.count
        return nn.Dense(x.shape[-1], name="out")(x)


def draw(tower, adapters=0.0, inputs=IMAGE):
    """Random variables; those of adapters times a factor."""
    shapes = jax.eval_shape(tower.init, jax.random.key(0), inputs)

    def leaf(path, shape):
        of_adapter = any(str(key.key).startswith("adapter") for key in path)
        # By its own name: an adapter more does not change the others' numbers.
        rng = np.random.default_rng(sum(map(ord, jax.tree_util.keystr(path))))
        return rng.normal(0, 0.3, shape.shape).astype(np.float32) * (adapters if of_adapter else 1)

    return jax.tree.map_with_path(leaf, shapes)


def adapters_of(variables):
    tree = variables["params"]
    tree = tree.get("Transformer", tree)
    return {
        (block, name): x[name] for block, x in tree.items() for name in x if str(name).startswith("adapter")
    }


@pytest.mark.parametrize("kind", TOWERS)
def test_adapters_of_zeros_change_nothing_and_others_add_their_share(kind):
    plain = TOWERS[kind]
    adapted = plain.clone(adapter=Adapter, adapter_scale=0.1)
    expected = jax.jit(plain.apply)(draw(plain), IMAGE)
    variables, apply = draw(adapted), jax.jit(adapted.apply)
    assert len(adapters_of(variables)) == 6  # two beside each of three blocks
    # Another program may round another way: the last bits differ.
    same = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    jax.tree.map(same, apply(variables, IMAGE), expected)
    last = next(block for block, _ in adapters_of(variables) if block.endswith("_2"))
    adapters_of(variables)[last, "adapter_mlp"]["out"]["bias"] += 2
    moved = apply(variables, IMAGE).taps[2] - expected.taps[2]
    np.testing.assert_allclose(moved, 0.2, atol=1e-4)


@pytest.mark.parametrize("kind", ["vit", "e14"])
def test_an_adapter_gets_what_its_branch_gets(kind):
    """The norm's output; without a norm in front, the block's input."""
    seen = {}

    def spy(name):
        class Spy(nn.Module):
            @nn.compact
            def __call__(self, x, places):
                seen.setdefault(name, x)
                return jnp.zeros_like(x)

        return Spy(name=name)

    variables = draw(TOWERS[kind])
    TOWERS[kind].clone(adapter=spy, depth=1, taps=()).apply(jax.tree.map(jnp.asarray, variables), IMAGE)
    norm = variables["params"].get("Transformer", variables["params"])
    norm = norm[min(k for k in norm if "block" in k)]
    norm = norm.get("LayerNorm_0", norm.get("norm1"))
    centred = (np.asarray(seen["adapter_attention"]) - norm["bias"]) / norm["scale"]
    assert (np.abs(centred.mean(-1)).max() < 1e-3) == (kind == "vit")


def keep_some(i, x, places):
    """Behind the first block leaves places 5, 1 and 3, which stand for two places each."""
    if i > 0:
        return x, places
    kept = jnp.broadcast_to(jnp.array([5, 1, 3]), (len(x), 3))
    owner = jnp.broadcast_to(jnp.array([1, 1, 2, 2, 0, 0]), (len(x), 6))
    return jnp.take_along_axis(x, kept[..., None], 1), places.replace(kept=kept, owner=owner)


def turn_round(i, x, places):
    """Leaves all tokens in the opposite order."""
    order = jnp.broadcast_to(jnp.arange(6)[::-1], (len(x), 6))
    kept = order if places.kept is None else places.kept[:, ::-1]
    owner = order if places.owner is None else 5 - places.owner
    return x[:, ::-1], places.replace(kept=kept, owner=owner)


@pytest.mark.parametrize("kind", TOWERS)
def test_tokens_are_dropped_between_blocks_and_unfolded_at_the_end(kind):
    tower = TOWERS[kind]
    variables = draw(tower)
    expected = jax.jit(tower.apply)(variables, IMAGE)
    out = jax.jit(tower.clone(between=keep_some).apply)(variables, IMAGE)
    assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, expected)
    np.testing.assert_allclose(out.taps[0], expected.taps[0], atol=1e-5)  # in front of the hook
    tokens = np.asarray(out.tokens).reshape(2, 6, -1)
    np.testing.assert_array_equal(tokens, tokens[:, [1, 1, 3, 3, 5, 5]])
    assert not np.allclose(tokens[:, 1], tokens[:, 3])
    # Attention asks for no order: where the angles follow the places, nothing changes.
    turned = jax.jit(tower.clone(between=turn_round).apply)(variables, IMAGE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), turned, expected)


def test_rotary_angles_are_those_of_the_kept_places():
    tower = TOWERS["eva02"]
    variables = draw(tower)

    def elsewhere(i, x, places):
        x, places = keep_some(i, x, places)
        return x, places.replace(kept=places.kept - (i == 0))

    out, moved = (
        jax.jit(tower.clone(between=hook).apply)(variables, IMAGE).tokens for hook in (keep_some, elsewhere)
    )
    assert np.abs(out - moved).max() > 1e-3


def test_rotate_takes_a_table_for_each_image():
    rng = np.random.default_rng(0)
    x, angles = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 5, 3, 4), (2, 2, 5, 4)))
    out = rotate(x, angles)
    for i in range(2):
        np.testing.assert_array_equal(out[i : i + 1], rotate(x[i : i + 1], angles[:, i]))


@pytest.mark.parametrize("kind", ["vit", "eva02"])
def test_rematerialisation_keeps_hooks(kind):
    hooked = TOWERS[kind].clone(adapter=Adapter, between=keep_some)
    variables = draw(hooked, adapters=1.0)

    def gradient(remat):
        tower = hooked.clone(remat=remat)
        return jax.jit(jax.grad(lambda v: jnp.mean(tower.apply(v, IMAGE).tokens ** 2)))(variables)

    reference.assert_trees_agree(gradient("all"), gradient("none"))


TEXT: dict[str, Any] = dict(vocab_size=40, length=7, width=16, layers=3, heads=2)
TEXTS = {
    "clip": CLIPText(**TEXT, embed_dim=8),
    "siglip": SiglipText(**TEXT, embed_dim=8),
    "bert": Bert(**TEXT, pool="mean"),
}
IDS = jnp.asarray(np.random.default_rng(1).integers(1, 40, (3, 7)))


class TextAdapter(nn.Module):
    """A linear map without positions on a grid."""

    @nn.compact
    def __call__(self, x, places):
        assert places is None and x.shape == (3, 7, 16)
        return nn.Dense(x.shape[-1], name="out")(x)


@pytest.mark.parametrize("kind", TEXTS)
def test_text_towers_have_adapters(kind):
    plain = TEXTS[kind]
    adapted = plain.clone(adapter=TextAdapter, adapter_scale=0.1)
    expected = jax.jit(plain.apply)(draw(plain, inputs=IDS), IDS)
    variables, apply = draw(adapted, inputs=IDS), jax.jit(adapted.apply)
    blocks = variables["params"]["Encoder_0"]
    assert sum("adapter" in name for i in range(3) for name in blocks[f"encoderblock_{i}"]) == 6
    same = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    jax.tree.map(same, apply(variables, IDS), expected)
    # Behind the last norm, tokens with one channel far above all others are alike.
    blocks["encoderblock_2"]["adapter_mlp"]["out"]["bias"][3] += 1e5
    alike = lambda x: np.abs(x - x[:1, :1]).max() < 1e-2
    assert alike(apply(variables, IDS).tokens) and not alike(expected.tokens)


@pytest.mark.parametrize("kind", TEXTS)
def test_text_towers_change_tokens_between_blocks(kind):
    """Zeros behind the second of three blocks: all texts are then alike, and as the third block maps zeros."""
    tower, called = TEXTS[kind], []

    def clear(i, x):
        called.append(i)
        return jnp.zeros_like(x) if i == 1 else x

    variables = draw(tower, inputs=IDS)
    tokens = jax.jit(tower.clone(between=clear).apply)(variables, IDS).tokens
    assert called == [0, 1]
    np.testing.assert_allclose(tokens, jnp.broadcast_to(tokens[:1, :1], tokens.shape), atol=1e-5)
    assert np.abs(jax.jit(tower.apply)(variables, IDS).tokens - tokens).max() > 0.1
    with pytest.raises(ValueError, match=r"`between` returned tokens \(3, 6, 16\) for \(3, 7, 16\)"):
        tower.clone(between=lambda i, x: x[:, 1:]).apply(variables, IDS)


def test_packed_texts_pass_no_hooks():
    tower = TEXTS["clip"].clone(adapter=TextAdapter)
    zeros = jnp.zeros((1, 16))
    with pytest.raises(ValueError, match="packed texts"):
        encode_packed(tower, {}, zeros, zeros, Packed(*[jnp.zeros(1, int)] * 4), 1)


def test_places_without_a_hook():
    places, x = Places((2, 3), 1), jnp.arange(18.0).reshape(1, 9, 2)
    np.testing.assert_array_equal(places.unfold(x), x[:, :7])
    assert places.count == 6


def test_hooks_come_from_no_config_and_go_into_no_export():
    with pytest.raises(UserError, match="has no 'between'"):
        build_backbone({"name": "vit", "between": "x"})
    assert not {"adapter", "between", "adapter_scale"} & describe(TOWERS["vit"]).keys()
    with pytest.raises(UserError, match="a ViT with 'between' cannot be exported to PyTorch"):
        describe(TOWERS["vit"].clone(between=keep_some))
