"""Mask2Former against transformers' with the same random weights: deformable attention, outputs, gradients; padding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.models.deformable import PixelFeatures, deformable
from ovseg_jax.models.mask2former import Mask2FormerHead, Mask2FormerNet, MaskedDecoder
from ovseg_jax.models.maskformer import MaskFormer, QueryClassifier
from ovseg_jax.models.small import SmallBackbone
from ovseg_jax.models.swin import Swin
from ovseg_jax.pretrained.mask2former import from_hf_mask2former
from ovseg_jax.pretrained.rename import fit, rename
from tests import reference
from tests.extras import require
from tests.models.test_maskformer import Patches

CLASSES, QUERIES, LAYERS = 5, 9, 4
HEAD: dict[str, Any] = dict(
    num_queries=QUERIES,
    width=64,
    mask_dim=32,
    layers=LAYERS,
    heads=4,
    ffn=48,
    encoder_layers=2,
    encoder_ffn=40,
)
# Pixels are normalised to themselves, in [0, 1].
PIXELS = ((0.0,) * 3, (1.0,) * 3)


def config(transformers):
    backbone = transformers.SwinConfig(
        embed_dim=16,
        depths=[1, 2, 1, 1],
        num_heads=[1, 2, 2, 4],
        window_size=3,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return transformers.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=64,
        mask_feature_size=32,
        hidden_dim=64,
        encoder_feedforward_dim=40,
        dim_feedforward=48,
        encoder_layers=2,
        decoder_layers=LAYERS + 1,
        num_attention_heads=4,
        num_queries=QUERIES,
        num_labels=CLASSES,
        train_num_points=64,
    )


def randomised(transformers):
    """Offsets reach beyond the borders."""
    import torch

    model = reference.randomise(transformers.Mask2FormerForUniversalSegmentation(config(transformers)))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith(("relative_position_bias_table", "level_embed", "level_embed.weight")):
            parameter.data.normal_(0, 1, generator=generator)
        elif "queries_" in name:
            parameter.data.normal_(0, 2, generator=generator)
        elif name.endswith("in_proj_bias"):
            parameter.data.normal_(0, 0.3, generator=generator)
        elif name.endswith("sampling_offsets.bias"):
            parameter.data.normal_(0, 3, generator=generator)
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
    return model


def our_model():
    backbone = Swin(
        width=16, depths=(1, 2, 1, 1), heads=(1, 2, 2, 4), window=3, window_rule="always", drop_rate=0.0
    )
    net = Mask2FormerNet(backbone, *PIXELS, Mask2FormerHead(**HEAD))
    return MaskFormer(net, QueryClassifier(CLASSES))


def test_deformable_attention_equals_hugging_face():
    """Values and gradients; places beyond the borders, levels that are not square."""
    torch, _ = require("torch"), require("transformers")
    from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention

    rng, shapes = np.random.default_rng(0), ((3, 2), (5, 7))
    values = rng.normal(size=(2, 41, 3, 4)).astype(np.float32)
    shares = rng.uniform(-0.3, 1.3, (2, 6, 3, 2, 5, 2)).astype(np.float32)
    weights = rng.normal(size=(2, 6, 3, 2, 5)).astype(np.float32)
    factor = rng.normal(size=(2, 6, 12)).astype(np.float32)
    sides = np.array([(w, h) for h, w in shapes])[:, None]
    counts = jnp.broadcast_to(jnp.array(shapes), (2, 2, 2))

    def ours(values, shares, weights):
        found = deformable(values, shares * sides - 0.5, weights, shapes, counts)
        return (found * factor).sum(), found

    gradient, found = jax.jit(jax.grad(ours, (0, 1, 2), has_aux=True))(values, shares, weights)
    inputs = [torch.tensor(x, requires_grad=True) for x in (values, shares, weights)]
    expected = multi_scale_deformable_attention(inputs[0], shapes, *inputs[1:])
    (expected * torch.from_numpy(factor)).sum().backward()
    errors = [reference.relative_error(found, expected.detach())]
    errors += [reference.relative_error(a, b.grad) for a, b in zip(gradient, inputs, strict=True)]
    print("deformable attention, and gradients of values, places, weights:", errors)
    assert max(errors) < 1e-5


def their_layers(original, x):
    """Logits of masks and classes, [L b ...], of the learned queries and after each layer; and mask features."""
    import torch

    out = original(x, output_auxiliary_logits=True)
    of = lambda name: torch.stack([layer[name] for layer in out.auxiliary_logits] + [out[name]])
    pixels = out.pixel_decoder_last_hidden_state
    return of("masks_queries_logits"), of("class_queries_logits"), pixels


@pytest.mark.parametrize("height,width", [(96, 128), (104, 72)])
def test_equals_hugging_face(height, width):
    """All predictions, and for the first size gradients; odd sizes pad windows and maps."""
    torch, transformers = require("torch"), require("transformers")
    original, model = randomised(transformers), our_model()
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    x, size = jnp.asarray(image), jnp.asarray([image.shape[1:3]] * 2)
    variables = reference.load(model, original, from_hf_mask2former(model.net), x, size)
    masks, classes, pixels = their_layers(original, reference.torch_images(image / np.float32(255)))
    assert 0.1 < (masks > 0).float().mean() < 0.9
    factors = [rng.normal(size=t.shape).astype(np.float32) for t in (masks, classes)]

    def score(variables):
        out, logits = model.apply(variables, x, size, True)
        found = (jnp.swapaxes(out.mask_logits, 0, 1), jnp.swapaxes(logits, 0, 1))
        total = sum((a * b).mean() for a, b in zip(found, factors, strict=True))
        return total, (*found, out)

    deep = (height, width) == (96, 128)
    compute = jax.grad(score, has_aux=True) if deep else lambda v: (None, score(v)[1])
    gradient, (our_masks, our_classes, out) = jax.jit(compute)(variables)
    assert our_masks.shape[0] == LAYERS + 1
    errors = [
        reference.relative_error(our_masks, masks.detach()),
        reference.relative_error(our_classes, classes.detach()),
        reference.relative_error(out.pixels, pixels.detach().numpy().transpose(0, 2, 3, 1)),
    ]
    print("Mask2Former: mask logits, class logits, pixels:", errors)
    assert max(errors) < 1e-4
    if not deep:
        last = jax.jit(lambda v: model.apply(v, x, size)[0])(variables)
        assert reference.relative_error(last.mask_logits[:, 0], masks[-1].detach()) < 1e-4
        return
    sum((a * torch.from_numpy(b)).mean() for a, b in zip((masks, classes), factors, strict=True)).backward()
    theirs = {
        name: np.zeros(tuple(p.shape), np.float32) if p.grad is None else p.grad.numpy()
        for name, p in original.named_parameters()
    }
    theirs = fit(rename(theirs, from_hf_mask2former(model.net)), variables)
    reference.assert_trees_agree(gradient, theirs)


def test_a_query_with_an_empty_mask_attends_to_the_whole_image():
    rng = np.random.default_rng(0)
    decoder = MaskedDecoder(num_queries=3, width=32, mask_dim=4, layers=2, heads=2, ffn=16)
    maps = {name: rng.normal(size=(1, *size, 32)) for name, size in (("c3", (4, 6)), ("c4", (2, 3)))}
    maps = {name: jnp.asarray(x, jnp.float32) for name, x in maps.items()}
    size, ones = jnp.asarray([[32, 48]]), np.ones((1, 8, 12, 4), np.float32)
    variables = reference.init(decoder, PixelFeatures(jnp.asarray(ones), maps), size)
    variables = jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape).astype(np.float32), variables)
    variables["params"]["mask_mlp_2"] = dict(
        kernel=np.zeros((32, 4), np.float32), bias=np.ones(4, np.float32)
    )
    queries = jax.jit(lambda pixels: decoder.apply(variables, PixelFeatures(pixels, maps), size).queries)
    whole, none = queries(ones), queries(-ones)
    np.testing.assert_array_equal(whole, none)
    half = np.where(np.arange(12)[:, None] < 6, ones, -ones)
    assert reference.relative_error(queries(half), whole) > 1e-2


def test_padding_of_the_canvas_changes_nothing():
    """Sizes that no stride divides; on the canvas beside another image, and one of size 0."""
    net = Mask2FormerNet(Patches(), *PIXELS, Mask2FormerHead(**HEAD))
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (1, 75, 109, 3), dtype=np.uint8)
    canvas = rng.integers(0, 256, (3, 160, 128, 3), dtype=np.uint8)
    canvas[0, :75, :109] = image[0]
    size = jnp.asarray([[75, 109]])
    variables = reference.init(net, jnp.asarray(image), size)
    variables = jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape).astype(np.float32), variables)
    apply = jax.jit(lambda *inputs: net.apply(variables, *inputs, True))
    alone = apply(jnp.asarray(image), size)
    padded = apply(jnp.asarray(canvas), jnp.asarray([[75, 109], [160, 128], [0, 0]]))
    h, w = alone.pixels.shape[1:3]
    assert (h, w) == (19, 28)
    for ours, expected in (
        (padded.queries[:1], alone.queries),
        (padded.mask_logits[:1, ..., :h, :w], alone.mask_logits),
        (padded.pixels[:1, :h, :w], alone.pixels),
    ):
        assert reference.relative_error(ours, expected) < 1e-5
    assert all(np.isfinite(x).all() for x in padded)


def test_remat_and_bfloat16():
    rng = np.random.default_rng(0)
    image, size = jnp.asarray(rng.integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)), jnp.asarray([[64, 64]])

    def net(**changes):
        return Mask2FormerNet(Patches(), *PIXELS, Mask2FormerHead(**HEAD | dict(layers=1) | changes))

    variables = reference.init(net(), image, size)
    variables = jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32), variables)

    def gradient(policy):
        apply = lambda v: net(remat=policy).apply(v, image, size, True)
        return jax.jit(jax.grad(lambda v: jnp.mean(apply(v).mask_logits ** 2)))(variables)

    reference.assert_trees_agree(gradient("all"), gradient("none"))
    full = jax.jit(net().apply)(variables, image, size)
    half = jax.jit(net(dtype=jnp.bfloat16).apply)(variables, image, size)
    assert half.queries.dtype == jnp.bfloat16 and half.mask_logits.dtype == jnp.float32
    assert 0 < reference.relative_error(half.mask_logits, full.mask_logits) < 0.1


def test_errors():
    image, size = jnp.zeros((1, 64, 64, 3), jnp.uint8), jnp.asarray([[64, 64]])
    for changes, message in (
        (dict(width=40), "width=40 must be a multiple of 32"),
        (dict(layers=0), "layers=0"),
    ):
        net = Mask2FormerNet(Patches(), *PIXELS, Mask2FormerHead(**HEAD | changes))
        with pytest.raises(UserError, match=message):
            reference.init(net, image, size)
    net = Mask2FormerNet(SmallBackbone(levels=1), *PIXELS, Mask2FormerHead(**HEAD))
    with pytest.raises(UserError, match="at least two maps"):
        reference.init(net, image, size)
