"""The PyTorch network beside the Flax one, with the same parameters."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.models.backbones import build_backbone
from ovseg_jax.models.openseg import OpenSegNet
from ovseg_jax.models.small import SmallBackbone
from ovseg_jax.parallel.sharding import path_name
from tests import reference
from tests.extras import require

MODEL = dict(
    backbone=dict(name="small", width=16, levels=3, blocks=1, stem="full"),
    mean=(0.5, 0.4, 0.3),
    std=(0.25, 0.2, 0.3),
    width=24,
    embed_dim=12,
    num_queries=5,
    decoder_layers=2,
    decoder_heads=3,
    head_convs=2,
    pyramid_output_conv=True,
    position_grid=7,
    mask_scale=0.4,
    mask_bias=-0.5,
    detach_masks=False,
)


TINY_VIT = dict(name="vit", width=32, depth=1, heads=2, mlp_dim=48, grid=(3, 3))


def flax_net(model):
    backbone = {k: v for k, v in model["backbone"].items() if k != "name"}
    rest = {k: v for k, v in model.items() if k != "backbone"}
    return OpenSegNet(SmallBackbone(**backbone), dtype=jnp.dtype("float32"), **rest)


@pytest.mark.parametrize("size", [(64, 64), (75, 109), (24, 20)])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"backbone": MODEL["backbone"] | {"stem": "patch", "levels": 4, "blocks": 2}, "decoder_heads": 1},
        {
            "backbone": MODEL["backbone"] | {"stem": "light"},
            "pyramid_output_conv": False,
            "mask_scale": 1.0,
            "mask_bias": None,
        },
        {"num_queries": 0},
    ],
)
def test_equals_flax(size, change):
    torch = require("torch")
    from ovseg_jax.pretrained.to_torch import describe, to_torch
    from ovseg_jax.torch.openseg import OpenSegNet as TorchNet

    model, rng = MODEL | change, np.random.default_rng(0)
    net = flax_net(model)
    image = rng.integers(0, 256, (2, *size, 3), dtype=np.uint8)
    image_size = np.array([size, (size[0] - 9, size[1] - 6)], np.int32)
    variables = reference.init(net, jnp.asarray(image), jnp.asarray(image_size))
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype(x.dtype), variables["params"])
    out = jax.jit(net.apply)({"params": params}, jnp.asarray(image), jnp.asarray(image_size))

    flat = {path_name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(params)}
    twin = TorchNet(describe(net))
    twin.load_state_dict({name: torch.from_numpy(x) for name, x in to_torch(flat).items()}, strict=True)
    with torch.no_grad():
        got = twin(torch.from_numpy(image).permute(0, 3, 1, 2), torch.from_numpy(image_size))
    assert (out.mask_logits is None) == (got.mask_logits is None)
    pairs = [(out.pixel_embed, got.pixel_embed.permute(0, 2, 3, 1))]
    if out.mask_logits is not None:
        pairs += [(out.mask_logits, got.mask_logits), (out.region_sum, got.region_sum)]
    for expected, found in pairs:
        expected, found = np.asarray(expected), found.numpy()
        assert expected.shape == found.shape
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_backbone_without_a_torch_form_is_named():
    require("torch")
    from ovseg_jax.torch.openseg import OpenSegNet as TorchNet

    with pytest.raises(UserError, match=r"'AlexNet' .*is not one of SmallBackbone"):
        TorchNet(MODEL | {"backbone": {"kind": "AlexNet"}})


def test_the_package_does_not_import_jax():
    require("torch")
    code = "import sys, ovseg_jax.torch, ovseg_jax.pretrained.to_torch; assert not {'jax', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "config",
    [
        {"name": "resnet50"},
        {"name": "resnet50", "norm": "group", "width": 32, "remat": "all"},
        {"name": "efficientnet_b1", "drop_rate": 0.5},
        TINY_VIT | {"patch": 8},
        TINY_VIT | {"patch": 32, "cls": "none", "pool": "map"},
        TINY_VIT | {"patch": 16, "depth": 4, "taps": (0, 1, 2, 3)},
    ],
    ids=str,
)
def test_backbones_equal_flax(config):
    torch = require("torch")
    from ovseg_jax.pretrained.to_torch import describe, to_torch
    from ovseg_jax.torch.openseg import build_backbone as build_torch

    rng = np.random.default_rng(0)
    ours = build_backbone(config)
    theirs = build_torch(json.loads(json.dumps(describe(ours)))).eval()
    x = jnp.asarray(rng.normal(size=(2, 64, 96, 3) if "patch" in config else (2, 75, 106, 3)), jnp.float32)
    variables = reference.init(ours, x)
    variables = jax.tree.map(lambda v: v * rng.uniform(0.7, 1.3, v.shape).astype(v.dtype), variables)
    flat = {
        path_name(path): np.asarray(v)
        for tree in variables.values()
        for path, v in jax.tree.leaves_with_path(tree)
    }
    theirs.load_state_dict({name: torch.from_numpy(v) for name, v in to_torch(flat).items()}, strict=True)
    expected = jax.jit(ours.apply)(variables, x)
    with torch.no_grad():
        found = theirs(torch.from_numpy(np.array(x)).permute(0, 3, 1, 2))
    assert expected.keys() == found.keys() == theirs.channels.keys()
    for name, value in expected.items():
        assert theirs.channels[name] == value.shape[-1]
        assert reference.relative_error(found[name].permute(0, 2, 3, 1).numpy(), value) < 1e-4


@pytest.mark.parametrize(
    "backbone", [TINY_VIT | dict(patch=8, depth=4, taps=(0, 1, 2, 3)), dict(name="small", width=16, levels=4)]
)
def test_upernet_equals_flax(backbone):
    torch = require("torch")
    from ovseg_jax.methods.upernet import scores_of
    from ovseg_jax.models.upernet import UPerNet
    from ovseg_jax.pretrained.to_torch import describe
    from ovseg_jax.torch.upernet import UPerNet as TorchNet
    from tests.models.twin import draw, load

    size = (64, 48)
    net = UPerNet(build_backbone(backbone), (0.5, 0.4, 0.3), (0.2, 0.3, 0.3), classes=5, width=8, aux_width=4)
    image = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    image_size = np.array([size, (50, 41)], np.int32)
    inputs = jnp.asarray(image), jnp.asarray(image_size)
    variables = draw(net, *inputs)
    expected = scores_of(jax.jit(net.apply)(variables, *inputs).logits)
    twin = load(TorchNet(json.loads(json.dumps(describe(net)))), variables)
    with torch.no_grad():
        found = twin(torch.from_numpy(image).permute(0, 3, 1, 2), torch.from_numpy(image_size))
    assert found.mask_logits is None
    assert reference.relative_error(found.pixel_embed.permute(0, 2, 3, 1).numpy(), expected) < 1e-4
