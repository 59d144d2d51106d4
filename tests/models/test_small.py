import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.models import convnext, eva, vit
from ovseg_jax.models.backbones import BACKBONES, build_backbone
from ovseg_jax.models.efficientnet import EfficientNet
from ovseg_jax.models.resnet import ResNet
from ovseg_jax.models.small import STEMS, GroupNorm, SmallBackbone, space_to_depth
from ovseg_jax.models.tower_pyramid import TowerPyramid
from ovseg_jax.models.vit import ViT
from tests import reference
from tests.reference import images


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("size", [(64, 96), (37, 70)])
def test_strides_and_channels(size, stem):
    model = SmallBackbone(width=32, levels=4, stem=stem)
    out = jax.eval_shape(lambda k, x: model.init_with_output(k, x)[0], jax.random.key(0), images(2, *size))
    assert list(out) == ["c2", "c3", "c4", "c5"]
    for key, stride, channels in zip(out, (4, 8, 16, 32), (32, 48, 64, 96), strict=True):
        assert out[key].shape == (2, -(-size[0] // stride), -(-size[1] // stride), channels)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_levels_beyond_are_left_out(levels):
    x = images(1, 32, 32)
    model = SmallBackbone(width=16, levels=levels)
    out, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    assert list(out) == ["c2", "c3", "c4"][:levels]
    assert set(variables) == {"params"}  # no running statistics to keep
    assert len([name for name in variables["params"] if name.startswith("down")]) == levels - 1


def test_space_to_depth_keeps_every_pixel_and_pads_with_zeros():
    x = jnp.arange(1, 3 * 5 * 2 + 1, dtype=jnp.float32).reshape(1, 3, 5, 2)
    out = space_to_depth(x, 2)
    assert out.shape == (1, 2, 3, 8)
    np.testing.assert_array_equal(out[0, 0, 1], x[0, 0:2, 2:4].reshape(-1))
    np.testing.assert_array_equal(out[0, 1, 2], [*x[0, 2, 4], 0, 0, 0, 0, 0, 0])
    assert out.sum() == x.sum()


def test_group_norm_equals_flax_and_its_gradients():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(2, 3, size=(3, 5, 7, 24)), jnp.float32)
    params = {"params": {k: jnp.asarray(rng.normal(size=24), jnp.float32) for k in ("scale", "bias")}}
    weight = jnp.asarray(rng.normal(size=x.shape), jnp.float32)

    def loss(module):
        return lambda params, x: jnp.sum(weight * module.apply(params, x))

    ours, flax = GroupNorm(), nn.GroupNorm(8)
    np.testing.assert_allclose(ours.apply(params, x), flax.apply(params, x), atol=2e-5)
    got = jax.grad(loss(ours), (0, 1))(params, x)
    expected = jax.grad(loss(flax), (0, 1))(params, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_group_norm_of_a_constant_image_is_finite():
    x = jnp.full((1, 8, 8, 16), 1234.567)
    model = GroupNorm()
    variables = reference.init(model, x)
    out, gradient = jax.value_and_grad(lambda x: jnp.sum(model.apply(variables, x) ** 2))(x)
    assert np.isfinite(out) and np.isfinite(gradient).all()


def test_examples_do_not_depend_on_each_other_nor_on_train():
    model = SmallBackbone(width=16)
    x = images(3, 32, 32)
    variables = reference.init(model, x)
    apply = jax.jit(model.apply, static_argnums=2)
    both, alone = apply(variables, x, False), apply(variables, x[1:2], False)
    train = apply(variables, x, True)
    for key in both:
        np.testing.assert_allclose(both[key][1:2], alone[key], atol=1e-5)
        np.testing.assert_array_equal(both[key], train[key])


def test_every_parameter_gets_a_gradient():
    model = SmallBackbone(width=16, levels=4, blocks=2)
    x = images(2, 64, 64)
    params = reference.init(model, x)
    gradient = jax.jit(jax.grad(lambda p: sum(jnp.sum(f**2) for f in model.apply(p, x).values())))(params)
    for path, g in jax.tree.leaves_with_path(gradient):
        assert np.isfinite(g).all() and np.abs(g).max() > 0, path


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    x = images(2, 32, 32)
    full, half = SmallBackbone(width=16), SmallBackbone(width=16, dtype=jnp.bfloat16)
    variables = reference.init(half, x)
    assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(variables))
    expected, out = jax.jit(full.apply)(variables, x), jax.jit(half.apply)(variables, x)
    for key in expected:
        assert out[key].dtype == jnp.bfloat16
        error = jnp.abs(out[key].astype(jnp.float32) - expected[key]).max() / jnp.abs(expected[key]).max()
        assert 0 < error < 0.05


@pytest.mark.parametrize("options", [{"width": 40}, {"levels": 5}, {"stem": "deep"}])
def test_impossible_options(options):
    ((key, value),) = options.items()
    with pytest.raises(UserError, match=f"{key}(=| is ){value!r}"):
        jax.eval_shape(SmallBackbone(**options).init, jax.random.key(0), images(1, 32, 32))


def test_build_by_name():
    cfg = ml_collections.ConfigDict({"name": "small", "width": 32, "levels": 4})
    assert build_backbone(cfg) == SmallBackbone(width=32, levels=4)
    resnet = build_backbone({"name": "resnet101", "norm": "frozen"}, jnp.bfloat16)
    assert resnet == ResNet(stage_sizes=(3, 4, 23, 3), norm="frozen", dtype=jnp.bfloat16)
    b7 = build_backbone({"name": "efficientnet_b7", "remat": "all"})
    assert b7 == EfficientNet(width=2.0, depth=3.1, remat="all")
    efficientnets = {f"efficientnet_b{i}" for i in range(9)} | {f"efficientnet_lite{i}" for i in range(5)}
    clip = {f"clip_{name}" for name in ("rn50", "rn101", "rn50x4", "rn50x16", "rn50x64")}
    swin = {f"swin_{name}" for name in ("tiny", "small", "base", "base_384", "large", "large_384")}
    towers = {"vit", *vit.PRESETS, *eva.PRESETS, *convnext.PRESETS}
    assert set(BACKBONES) == {"small", "resnet50", "resnet101"} | efficientnets | clip | swin | towers
    tower = ViT(**vit.PRESETS["clip_vitb16"], remat="all", dtype=jnp.bfloat16)
    built = build_backbone({"name": "clip_vitb16", "remat": "all", "init": "hf:x"}, jnp.bfloat16)
    assert built == TowerPyramid(tower, jnp.bfloat16)


def test_build_says_what_is_known():
    with pytest.raises(UserError, match=r"'vgg16' is not one of small, resnet50, .*efficientnet_b7"):
        build_backbone({"name": "vgg16"})
    with pytest.raises(UserError, match=r"None is not one of small"):
        build_backbone({})
    with pytest.raises(
        UserError, match=r"'resnet50' has no 'depth', 'stage_sizes'; known attributes: norm, remat"
    ):
        build_backbone({"name": "resnet50", "depth": 2, "stage_sizes": (1, 1, 1, 1)})
