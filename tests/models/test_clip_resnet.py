from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.models.clip_resnet import PRESETS, AttentionPool, ClipResNet, average_pool
from ovseg_jax.pretrained.clip_resnet import from_openai_clip_resnet, from_timm_clip_resnet
from ovseg_jax.pretrained.rename import fit, rename
from tests import reference
from tests.extras import require
from tests.reference import images

TINY: dict[str, Any] = dict(stage_sizes=(1, 2, 1, 1), width=8, embed=24, grid=3)
SMALL: dict[str, Any] = dict(stage_sizes=(1, 1), width=8, embed=24, grid=12)  # c2 and c3 alone
MAPS = ("c2", "c3", "c4", "c5")


def randomise(model):
    """With queries and keys of more than scale 1, for attention that is far from uniform."""
    import torch

    generator = torch.Generator().manual_seed(1)
    reference.randomise(model)
    for name, parameter in model.named_parameters():
        if name.endswith(("positional_embedding", "pos_embed")):
            parameter.data.normal_(0, 1, generator=generator)
        elif name.endswith(
            ("attnpool.q_proj.weight", "attnpool.k_proj.weight", "head.q.weight", "head.k.weight")
        ):
            parameter.data.mul_(2)
    return model


def interpolate(table, size):
    """The rows of a table [1+g*g c], as dense predictors resize them: PyTorch's bicubic."""
    import torch

    grid = int((len(table) - 1) ** 0.5)
    places = table[1:].T.reshape(1, -1, grid, grid)
    places = torch.nn.functional.interpolate(places, size=size, mode="bicubic", align_corners=False)
    return torch.cat([table[:1], places.reshape(table.shape[1], -1).T])


# At sides that are no multiples of 32 the reference rounds up too, once its pools do.
@pytest.mark.parametrize("size", [(96, 96), (64, 160), (75, 109)])
def test_equals_open_clip(size):
    torch, open_clip = require("torch"), require("open_clip")
    original = randomise(
        open_clip.modified_resnet.ModifiedResNet((1, 2, 1, 1), 24, 4, image_size=96, width=8)
    )
    x = images(2, *size)
    model = ClipResNet(**TINY)
    variables = reference.load(model, original, from_openai_clip_resnet(""), x)
    for module in original.modules():
        if isinstance(module, torch.nn.AvgPool2d):
            module.ceil_mode = True
    pool = original.attnpool
    grid = [-(-side // 32) for side in size]
    pool.positional_embedding.data = interpolate(pool.positional_embedding.data, grid)
    with torch.no_grad():
        expected = original.forward_intermediates(reference.torch_images(x))
        c5 = expected["image_intermediates"][-1]
        dense = pool.c_proj(pool.v_proj(c5.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
    out = jax.jit(model.apply)(variables, x)
    maps = {key: out[key] for key in (*MAPS, "dense")}
    reference.assert_maps_agree(maps, [*expected["image_intermediates"][1:], dense], f"open_clip {size}")
    pooled = reference.relative_error(out["pooled"], expected["image_features"].numpy())
    print(f"open_clip {size} pooled max relative error {pooled:.1e}")
    assert pooled < 1e-4


def test_equals_timm():
    torch, timm = require("torch"), require("timm")
    byobnet = timm.models.byobnet
    config = byobnet.model_cfgs["resnet50_clip"]
    blocks = [byobnet.ByoBlockCfg(**{**vars(block), "d": 1}) for block in config.blocks]
    config = byobnet.replace(config, blocks=blocks, width_factor=0.125)
    original = randomise(byobnet.ByobNet(config, num_classes=24, img_size=96, drop_path_rate=0.0))
    model, x = ClipResNet(**{**TINY, "stage_sizes": (1, 1, 1, 1)}), images(2, 96, 96)
    variables = reference.load(model, original, from_timm_clip_resnet(), x)
    with torch.no_grad():
        last, expected = original.forward_intermediates(reference.torch_images(x))
        pooled = original.forward_head(last)
    out = jax.jit(model.apply)(variables, x)
    reference.assert_maps_agree({key: out[key] for key in MAPS}, expected[1:], "timm")
    error = reference.relative_error(out["pooled"], pooled.numpy())
    print(f"timm pooled max relative error {error:.1e}")
    assert error < 1e-4


@pytest.mark.parametrize(
    "name,theirs",
    [
        ("clip_rn50", "RN50"),
        ("clip_rn101", "RN101"),
        ("clip_rn50x4", "RN50x4"),
        ("clip_rn50x16", "RN50x16"),
        ("clip_rn50x64", "RN50x64"),
    ],
)
def test_presets_have_the_shapes_of_open_clip(name, theirs):
    """The whole of CLIP, with its text tower, as OpenAI published it."""
    torch, open_clip = require("torch"), require("open_clip")
    config = open_clip.get_model_config(theirs)
    with torch.device("meta"):
        original = open_clip.model.CLIP(**config)
    state = {k: np.broadcast_to(np.float32(0), tuple(v.shape)) for k, v in original.state_dict().items()}
    state |= {
        "input_resolution": np.array(224),
        "context_length": np.array(77),
        "vocab_size": np.array(49408),
    }
    model = ClipResNet(**PRESETS[name])
    shapes = jax.eval_shape(model.init, jax.random.key(0), images(1, 64, 64))
    fit(rename(state, from_openai_clip_resnet()), shapes)
    ours = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    assert ours == sum(p.numel() for p in original.visual.parameters())
    timm = require("timm")
    with torch.device("meta"):
        original = timm.create_model(f"resnet{theirs[2:].lower()}_clip", pretrained=False)
    state = {k: np.broadcast_to(np.float32(0), tuple(v.shape)) for k, v in original.state_dict().items()}
    fit(rename(state, from_timm_clip_resnet()), shapes)


def test_average_pool_of_odd_sides():
    x = jnp.arange(15.0).reshape(1, 3, 5, 1)
    np.testing.assert_allclose(average_pool(x)[0, ..., 0], [[3, 5, 6.5], [10.5, 12.5, 14]])


def test_dense_of_one_place_is_pooled_without_positions():
    """With a map of one place the mean is the place, so that attention has one value only."""
    pool, x = AttentionPool(embed=24, grid=1), images(2, 1, 1).repeat(64, axis=-1)[..., :128]
    variables = reference.init(pool, x)
    variables["params"]["positions"] *= 0
    pooled, dense = jax.jit(pool.apply)(variables, x)
    np.testing.assert_allclose(dense[:, 0, 0], pooled, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 96), (37, 70)])
def test_strides_and_channels(size):
    model = ClipResNet(**TINY)
    out = jax.eval_shape(lambda k, x: model.init_with_output(k, x)[0], jax.random.key(0), images(1, *size))
    assert set(out) == {*MAPS, "pooled", "dense"}
    for i, key in enumerate(MAPS):
        stride = 4 * 2**i
        assert out[key].shape == (1, -(-size[0] // stride), -(-size[1] // stride), 32 * 2**i)
    assert out["pooled"].shape == (1, 24) and out["dense"].shape == (*out["c5"].shape[:3], 24)


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_statistics(norm):
    """Only "batch" in training moves them, and only then does an example depend on the others."""
    model, x = ClipResNet(**SMALL, norm=norm), images(2, 64, 64)
    variables = reference.init(model, x)
    apply = jax.jit(lambda v, x: model.apply(v, x, True, mutable=["batch_stats"]))
    both, mutated = apply(variables, x)
    alone, _ = apply(variables, x[:1])
    assert np.allclose(both["c3"][:1], alone["c3"], atol=1e-4) == (norm == "frozen")
    moved = jax.tree.leaves(
        jax.tree.map(lambda a, b: not np.array_equal(a, b), variables["batch_stats"], mutated["batch_stats"])
    )
    assert all(moved) if norm == "batch" else not any(moved)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    x = images(2, 64, 96)
    full, half = ClipResNet(**SMALL), ClipResNet(**SMALL, dtype=jnp.bfloat16)
    variables = reference.init(half, x)
    assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(variables))
    expected, out = jax.jit(full.apply)(variables, x), jax.jit(half.apply)(variables, x)
    for key in expected:
        assert out[key].dtype == jnp.bfloat16
        assert 0 < reference.relative_error(out[key].astype(jnp.float32), expected[key]) < 0.05


def test_remat_changes_nothing_but_memory():
    x = images(2, 64, 64)
    variables = reference.init(ClipResNet(**SMALL), x)

    def gradient(policy):
        model = ClipResNet(**SMALL, remat=policy)

        def loss(params):
            out, mutated = model.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
            return jnp.mean(out["pooled"] ** 2), mutated

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    expected, expected_mutated = gradient("none")
    for policy in ("dots", "all"):
        grads, mutated = gradient(policy)
        reference.assert_trees_agree(grads, expected)
        reference.assert_trees_agree(mutated, expected_mutated)


def test_errors():
    with pytest.raises(UserError, match="width of the CLIP ResNet is 7, but must be even"):
        reference.init(ClipResNet(**{**TINY, "width": 7}), images(1, 64, 64))
    with pytest.raises(UserError, match="'layer'"):
        reference.init(ClipResNet(**TINY, norm="layer"), images(1, 64, 64))
