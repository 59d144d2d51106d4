"""UPerNet against transformers: over BEiT's backbone, whose blocks are MAE's, and over Swin."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.models.backbones import build_backbone
from ovseg_jax.models.swin import Swin
from ovseg_jax.models.upernet import UPerNet, enlarge, pool_weights
from ovseg_jax.pretrained.load import load
from tests import reference
from tests.extras import require

SIZE, CLASSES = (64, 96), 5
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
VIT = dict(name="vit", patch=8, width=32, depth=6, heads=2, mlp_dim=48, grid=(8, 8), taps=(1, 2, 3, 5))


def image():
    return jnp.asarray(np.random.default_rng(1).integers(0, 256, (2, *SIZE, 3), np.uint8))


def pixels():
    x = (np.asarray(image()) / 255.0 - MEAN) / STD
    return reference.torch_images(x.astype(np.float32))


def net(backbone=None, **fields):
    fields = dict(classes=CLASSES, width=24, aux_width=8) | fields
    return UPerNet(build_backbone(VIT) if backbone is None else backbone, MEAN, STD, **fields)


def original(kind="beit", pools=(1, 2, 3, 6)):
    transformers, torch = require("transformers"), require("torch")
    if kind == "beit":
        # The output of block 6, the last, is hidden state 6: hidden state 0 is the input of the first block.
        config = dict(hidden_size=32, num_hidden_layers=6, num_attention_heads=2, intermediate_size=48)
        config |= dict(image_size=64, patch_size=8, use_absolute_position_embeddings=True)
        config |= dict(layer_scale_init_value=0.0, drop_path_rate=0.0, add_fpn=True)
        backbone = transformers.BeitConfig(**config, out_indices=[2, 3, 4, 6])
    else:
        stages = ["stage1", "stage2", "stage3", "stage4"]
        sizes = dict(embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], window_size=4, image_size=64)
        backbone = transformers.SwinConfig(**sizes, drop_path_rate=0.0, out_features=stages)
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=24, auxiliary_channels=8, num_labels=CLASSES, pool_scales=pools
    )
    torch.manual_seed(0)  # of what `randomise` leaves; a few draws have a gradient that jumps with rounding
    model = reference.randomise(transformers.UperNetForSemanticSegmentation(config))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "cls_token" in name or "position" in name or "conv_transpose" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    return model


def loaded(module, model, folder):
    """The variables of our module from the files that transformers writes."""
    model.save_pretrained(folder)
    sizes = jnp.full((1, 2), 64)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3), jnp.uint8), sizes)
    found = load(str(folder), module, shapes)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    merge = lambda a, b: {
        k: merge(v, b.get(k, {})) if isinstance(v, dict) else b.get(k, v) for k, v in a.items()
    }
    return merge(zeros, found)


def both_logits(model):
    """Both heads of the original at the image's size, as [b h w k]."""
    from torch.nn.functional import interpolate

    maps = model.backbone(pixels()).feature_maps
    heads = (model.decode_head(maps), model.auxiliary_head(maps))
    resized = (interpolate(x, size=SIZE, mode="bilinear", align_corners=False) for x in heads)
    return [x.permute(0, 2, 3, 1) for x in resized]


@pytest.mark.parametrize("kind", ["beit", "swin"])
def test_logits_equal_transformers(kind, tmp_path):
    torch = require("torch")
    model = original(kind)
    swin = Swin(width=16, depths=(1, 1, 1, 1), heads=(1, 2, 2, 4), window=4, window_rule="always")
    module = net() if kind == "beit" else net(swin)
    variables = loaded(module, model, tmp_path)
    out = jax.jit(module.apply)(variables, image(), jnp.full((2, 2), jnp.array(SIZE)))
    with torch.no_grad():
        expected = both_logits(model)
        torch.testing.assert_close(model(pixels()).logits.permute(0, 2, 3, 1), expected[0])
    for name, ours, theirs in zip(("logits", "auxiliary"), out, expected, strict=True):
        error = reference.relative_error(enlarge(ours, SIZE), theirs.numpy())
        print(f"UPerNet over {kind}, {name} {ours.shape}: max relative error {error:.1e}")
        assert error < 1e-4


def test_training_equals_transformers(tmp_path):
    """Loss, gradients and updated statistics, with the statistics of the batch."""
    torch = require("torch")
    # Not a single cell: the norm of one number of each of two images has gradients that are rounding errors.
    model = original(pools=(2, 3, 6)).train()
    module = net(dropout=0.0, pools=(2, 3, 6))
    variables = loaded(module, model, tmp_path)
    labels = np.random.default_rng(2).integers(0, CLASSES, (2, *SIZE))
    labels[:, :5] = 255
    loss = model(pixels(), labels=torch.from_numpy(labels)).loss
    loss.backward()

    def ours(params):
        size = jnp.full((2, 2), jnp.array(SIZE))
        state = {**variables, "params": params}
        rngs = {"dropout": jax.random.key(0)}
        out, mutated = module.apply(state, image(), size, train=True, mutable=["batch_stats"], rngs=rngs)
        valid = labels < 255
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(enlarge(x, SIZE), np.where(valid, labels, 0))
            for x in out
        ]
        means = [jnp.where(valid, x, 0).sum() / valid.sum() for x in losses]
        return means[0] + 0.4 * means[1], mutated

    (value, mutated), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(variables["params"])
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    theirs = dict(model.named_parameters())
    for path, name in (
        (
            "backbone/tower/Transformer/encoderblock_0/MlpBlock_0/Dense_0/bias",
            "backbone.beit.layers.0.mlp.fc1.bias",
        ),
        ("backbone/tower/cls", "backbone.beit.embeddings.cls_token"),
        ("backbone/up_c2_0/kernel", "backbone.fpn.fpn1.conv_transpose1.weight"),
        ("backbone/norm_c2/scale", "backbone.fpn.fpn1.normalization.weight"),
        ("backbone/up_c3/kernel", "backbone.fpn.fpn2.weight"),
        ("head/pool_2/norm/scale", "decode_head.psp_modules.2.1.batch_norm.weight"),
        ("head/context/norm/bias", "decode_head.bottleneck.batch_norm.bias"),
        ("aux_head/norm/scale", "auxiliary_head.convs.0.batch_norm.weight"),
        ("aux_classifier/bias", "auxiliary_head.classifier.bias"),
    ):
        found = grads
        for part in path.split("/"):
            found = found[part]
        expected = theirs[name].grad.numpy()
        if path.endswith("kernel"):
            expected = expected.transpose(2, 3, 1, 0)
        assert np.abs(expected).max() > 1e-4, path
        error = np.abs(np.asarray(found) - expected).max()
        assert error < 1e-3 * np.abs(expected).max(), (path, error)
    updated = mutated["batch_stats"]["head"]["fusion"]["norm"]["mean"]
    assert np.abs(updated - variables["batch_stats"]["head"]["fusion"]["norm"]["mean"]).max() > 1e-3


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    require("torch")
    original().save_pretrained(tmp_path)
    sizes = jnp.full((1, 2), 64)

    def read(module):
        shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3), jnp.uint8), sizes)
        return load(str(tmp_path), module, shapes)

    with pytest.raises(UserError, match=r"taps is \[2, 3, 4, 6\], but this model's is \[1, 3, 4, 6\]"):
        read(net(build_backbone(VIT | dict(taps=(0, 2, 3, 5)))))
    with pytest.raises(UserError, match="its heads is 2, but this model's is 4"):
        read(net(build_backbone(VIT | dict(heads=4))))
    with pytest.raises(UserError, match=r"its pools is \[1, 2, 3, 6\]"):
        read(net(pools=(1, 2, 3, 4)))
    with pytest.raises(UserError, match=r"has a wrong shape: .*classifier/bias"):
        read(net(classes=7))
    config = json.loads((tmp_path / "config.json").read_text())
    config["backbone_config"]["use_relative_position_bias"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="use_relative_position_bias"):
        read(net())


def test_a_pyramid_needs_four_taps():
    with pytest.raises(UserError, match=r"taps=\(3, 5\) of a pyramid are not four blocks"):
        build_backbone(VIT | dict(taps=(3, 5))).init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))


@pytest.mark.parametrize("length", [1, 2, 5, 6, 16])
def test_pooling_equals_pytorch(length):
    torch = require("torch")
    x = torch.arange(length, dtype=torch.float64)[None, None] ** 2
    for cells in (1, 2, 3, 6):
        expected = torch.nn.functional.adaptive_avg_pool1d(x, cells)[0, 0].numpy()
        np.testing.assert_allclose(pool_weights(length, cells) @ x[0, 0].numpy(), expected, rtol=1e-12)


def test_stochastic_depth_drops_whole_branches():
    """A fully dropped block passes its input on; deeper blocks are dropped more often; never outside of training."""
    fields = {k: v for k, v in VIT.items() if k not in ("name", "depth", "taps")}
    from ovseg_jax.models.vit import ViT

    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 16, 16, 3)), jnp.float32)
    module = ViT(**fields, depth=3, taps=(0, 1, 2), drop_rate=0.8)
    variables = jax.tree.map(jnp.asarray, reference.init(module, x))
    dropped = module.apply(variables, x, True, rngs={"dropout": jax.random.key(0)}).taps
    kept = module.apply(variables, x, False).taps
    np.testing.assert_allclose(dropped[0], kept[0], atol=1e-5)  # the first block has the rate 0
    same = [np.mean(np.all(dropped[i] == dropped[i - 1], axis=(1, 2, 3))) for i in (1, 2)]
    # Both branches of an example are dropped with probability 0.4² and 0.8².
    assert abs(same[0] - 0.16) < 0.15 and abs(same[1] - 0.64) < 0.2
    assert not np.any(np.all(kept[2] == kept[1], axis=(1, 2, 3)))
