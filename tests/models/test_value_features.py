"""The value path of the last block against timm's own EVA under a mask, and `pooled` beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.models.eva import Eva
from ovseg_jax.models.tower import project
from ovseg_jax.models.vit import ViT
from ovseg_jax.pretrained.eva import from_timm_eva
from ovseg_jax.pretrained.rename import fit, rename
from ovseg_jax.pretrained.to_torch import describe
from tests import reference
from tests.extras import require
from tests.models.test_eva import HEADS, KINDS, PATCH, TINY, at_size, images, original, shapes, state

SIZES = [(32, 32), (24, 56), (72, 48)]


def sized(kind, x):
    size = x.shape[1:3]
    return original(kind) if size == (32, 32) else at_size(original(kind), *size)


def of_timm(kind, x):
    """timm's embedding and patches through its head, where patches attend to themselves alone in the last block."""
    torch, model = require("torch"), sized(kind, x)
    last, count = model.blocks[-1], 1 + x.shape[1] * x.shape[2] // PATCH**2
    own = torch.eye(count, dtype=torch.bool)
    own[0] = True
    whole = type(last).forward
    last.forward = lambda y, rope=None, attn_mask=None, **_: whole(last, y, rope=rope, attn_mask=own)
    try:
        with torch.no_grad():
            tokens = model.forward_features(reference.torch_images(x))
            return model.forward_head(tokens).numpy(), model.head(tokens)[:, 1:].numpy()
    finally:
        del last.forward


@pytest.mark.parametrize(
    ("kind", "size"), [(kind, SIZES[0]) for kind in KINDS] + [("eva02", size) for size in SIZES[1:]]
)
def test_values_and_embedding_equal_timms(kind, size):
    x = images(2, *size)
    pooled, patches = of_timm(kind, x)
    plain = Eva(**TINY, **KINDS[kind][0])
    variables = fit(rename(state(original(kind)), from_timm_eva(HEADS)), shapes(plain))
    out = jax.jit(plain.clone(last="value").apply)(variables, x)
    ours = project(variables["params"], out.tokens).reshape(patches.shape)
    error = reference.relative_error(ours, patches)
    print(f"EVA {kind} {size} value {error:.1e}")
    assert error < 1e-4
    assert reference.relative_error(out.pooled, pooled) < 1e-4
    expected = jax.jit(plain.apply)(variables, x)
    assert reference.relative_error(out.pooled, expected.pooled) < 1e-5
    assert reference.relative_error(out.tokens, expected.tokens) > 1e-2


def other_of_timm(kind, x, way, monkeypatch):
    """timm's patches through its head, where the last block attends as in SCLIP or ClearCLIP."""
    torch, model = require("torch"), sized(kind, x)
    last, functional = model.blocks[-1], torch.nn.functional

    def itself(q, k, v, **_):
        soft = lambda a: torch.softmax(a @ a.transpose(-1, -2) * a.shape[-1] ** -0.5, -1) @ v
        return soft(q) + soft(k) if way == "sclip" else soft(q)

    whole = type(last).forward

    def forward(y, rope=None, **_):
        with monkeypatch.context() as inside:
            inside.setattr(functional, "scaled_dot_product_attention", itself)
            return whole(last, y, rope=rope) if way == "sclip" else last.attn(last.norm1(y), rope=rope)

    last.forward = forward
    try:
        with torch.no_grad():
            return model.head(model.forward_features(reference.torch_images(x)))[:, 1:].numpy()
    finally:
        del last.forward


@pytest.mark.parametrize("way", ["sclip", "clearclip"])
@pytest.mark.parametrize(("kind", "size"), [("g14", SIZES[0]), *(("eva02", size) for size in SIZES)])
def test_sclip_and_clearclip_equal_timms(kind, size, way, monkeypatch):
    x = images(2, *size)
    patches, (pooled, _) = other_of_timm(kind, x, way, monkeypatch), of_timm(kind, x)
    plain = Eva(**TINY, **KINDS[kind][0])
    variables = fit(rename(state(original(kind)), from_timm_eva(HEADS)), shapes(plain))
    out = jax.jit(plain.clone(last=way).apply)(variables, x)
    ours = project(variables["params"], out.tokens).reshape(patches.shape)
    error = reference.relative_error(ours, patches)
    print(f"EVA {kind} {size} {way} {error:.1e}")
    assert error < 1e-4
    assert reference.relative_error(out.pooled, pooled) < 1e-4


VIT = ViT(patch=8, width=16, depth=2, heads=2, mlp_dim=24, grid=(4, 4), embed_dim=6)


def test_a_vits_embedding_stays_and_its_patches_see_nothing_of_each_other_in_the_last_block():
    x, variables = images(1, 32, 32), reference.init(VIT, images(1, 32, 32))
    values = VIT.clone(last="value", depth=1)
    out, plain = (jax.jit(tower.apply)(variables, x) for tower in (values, VIT.clone(depth=1)))
    np.testing.assert_allclose(out.pooled, plain.pooled, atol=1e-5)
    moved = jax.jit(values.apply)(variables, x.at[0, 0, 0].add(3.0))
    changed = np.abs(moved.tokens - out.tokens).max(-1)[0] > 1e-6
    assert changed[0, 0] and changed.sum() == 1
    without = {"params": {name: tree for name, tree in variables["params"].items() if name != "head"}}
    np.testing.assert_array_equal(project(without["params"], out.tokens), out.tokens)


def test_prompts_and_half_precision_with_values():
    x, variables = images(1, 32, 32), reference.init(VIT, images(1, 32, 32))
    prompts = jnp.ones((1, 3, 16))
    out = jax.jit(VIT.clone(last="value", dtype=jnp.bfloat16).apply)(variables, x, prompts=prompts)
    assert out.tokens.shape == (1, 4, 4, 16) and out.tokens.dtype == jnp.bfloat16
    assert project(variables["params"], out.tokens).dtype == jnp.bfloat16


def test_mistakes():
    with pytest.raises(UserError, match="a ViT with pool='mean' has no value features"):
        jax.eval_shape(VIT.clone(last="value", pool="mean").init, jax.random.key(0), images(1, 32, 32))
    with pytest.raises(UserError, match="a ViT with 'last' cannot be exported to PyTorch"):
        describe(VIT.clone(last="value"))
    assert "last" not in describe(VIT)
