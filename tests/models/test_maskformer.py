"""MaskFormer against transformers' with the same random weights: outputs, matching, losses, gradients."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.losses.matching import matched_losses
from ovseg_jax.models.maskformer import MaskFormer, MaskFormerNet, QueryClassifier, sine_positions
from ovseg_jax.models.swin import Swin
from ovseg_jax.pretrained.maskformer import from_hf_maskformer
from ovseg_jax.pretrained.rename import fit, rename
from tests import reference
from tests.extras import require

CLASSES, QUERIES, LAYERS = 5, 9, 2
NET: dict[str, Any] = dict(num_queries=QUERIES, width=64, mask_dim=32, layers=LAYERS, heads=4, ffn=48)
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
    decoder = transformers.DetrConfig(
        d_model=64,
        decoder_layers=LAYERS,
        decoder_attention_heads=4,
        encoder_attention_heads=4,
        decoder_ffn_dim=48,
        num_queries=QUERIES,
    )
    return transformers.MaskFormerConfig(
        backbone_config=backbone,
        decoder_config=decoder,
        fpn_feature_size=64,
        mask_feature_size=32,
        num_labels=CLASSES,
    )


def randomised(transformers):
    import torch

    model = transformers.MaskFormerForInstanceSegmentation(config(transformers))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table") or "queries_embedder" in name:
            parameter.data.normal_(0, 1, generator=generator)
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
    return reference.randomise(model)


def our_model(deep):
    backbone = Swin(
        width=16, depths=(1, 2, 1, 1), heads=(1, 2, 2, 4), window=3, window_rule="always", drop_rate=0.0
    )
    net = MaskFormerNet(backbone, *PIXELS, **NET, dropout=0.0, deep_supervision=deep)
    return MaskFormer(net, QueryClassifier(CLASSES))


def data(height=96, width=128, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    # Rectangles, two in the first image and four in the second, of which five slots remain.
    masks = np.zeros((2, 5, height, width), np.uint8)
    for b, count in enumerate((2, 4)):
        for m in range(count):
            y, x = rng.integers(0, height // 2), rng.integers(0, width // 2)
            masks[b, m, y : y + height // 3, x : x + width // 3] = 255
    masks[0, 3] = 255  # in a slot that is not valid
    valid = np.arange(5) < np.array([[2], [4]])
    classes = np.where(valid, rng.integers(0, CLASSES, (2, 5)), -1)
    return image, masks, valid, classes


def their_layers(original, x):
    """Logits of masks and classes after each layer, [L b ...], by its own norm, as the authors' code has them.

    transformers' own auxiliary logits are of outputs without the norm.
    """
    import torch

    states = []
    hooks = [
        layer.register_forward_hook(
            lambda _, inputs, out: states.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in original.model.transformer_module.decoder.layers
    ]
    out = original(x)
    for hook in hooks:
        hook.remove()
    queries = original.model.transformer_module.decoder.layernorm(torch.stack(states))
    embedded = original.mask_embedder(queries)
    pixels = out.pixel_decoder_last_hidden_state
    masks = torch.einsum("lbqc,bchw->lbqhw", embedded, pixels)
    return queries, masks, original.class_predictor(queries), pixels, out


@pytest.mark.parametrize("deep", [False, True])
def test_equals_hugging_face(deep):
    """Deep supervision covers all layers, otherwise the last one; odd sizes pad the windows."""
    torch, transformers = require("torch"), require("transformers")
    original, model = randomised(transformers), our_model(deep)
    image, masks, valid, classes = data(*((96, 128) if deep else (104, 72)))
    x, size = jnp.asarray(image), jnp.asarray([image.shape[1:3]] * 2)
    variables = reference.load(model, original, from_hf_maskformer(model.net), x, size)
    queries, mask_logits, class_logits, pixels, whole = their_layers(
        original, reference.torch_images(image / np.float32(255))
    )
    torch.testing.assert_close(mask_logits[-1], whole.masks_queries_logits)
    last = slice(None) if deep else slice(LAYERS - 1, None)
    expected = [t[last].detach().numpy().swapaxes(0, 1) for t in (queries, mask_logits, class_logits)]

    def loss(variables):
        out, logits = model.apply(variables, x, size, True)
        losses = matched_losses(
            out.mask_logits,
            jnp.asarray(masks),
            jnp.asarray(valid),
            jnp.ones(2),
            class_logits=logits,
            classes=jnp.asarray(classes),
        )
        return losses.total(), (out, logits, losses)

    compute = jax.value_and_grad(loss, has_aux=True) if deep else lambda v: (loss(v), None)
    (total, (out, logits, losses)), gradient = jax.jit(compute)(variables)
    errors = [
        reference.relative_error(a, b)
        for a, b in zip((out.queries, out.mask_logits, logits), expected, strict=True)
    ]
    errors.append(reference.relative_error(out.pixels, pixels.detach().numpy().transpose(0, 2, 3, 1)))
    print("queries, mask logits, class logits, pixels:", errors)
    assert max(errors) < 1e-4

    labels = [torch.from_numpy(masks[b][valid[b]] / np.float32(255)) for b in range(2)]
    names = [torch.from_numpy(classes[b][valid[b]]) for b in range(2)]
    for i, layer in enumerate(range(LAYERS)[last]):
        pairs = original.matcher(mask_logits[layer], class_logits[layer], labels, names)
        for b, (rows, columns) in enumerate(pairs):
            found = losses.query[b, i][columns.numpy()]
            np.testing.assert_array_equal(found, rows.numpy())
    layers = list(range(LAYERS))[last]
    auxiliary = [
        dict(masks_queries_logits=mask_logits[n], class_queries_logits=class_logits[n]) for n in layers[:-1]
    ]
    parts = original.get_loss_dict(
        mask_logits[-1], class_logits[-1], labels, names, auxiliary if deep else None
    )
    for i in range(len(layers)):
        suffix = "" if i == len(layers) - 1 else f"_{i}"
        ours = (
            20 * losses.mask / losses.masks,
            losses.dice / losses.masks,
            losses.label / losses.label_weight,
        )
        for name, value in zip(("mask", "dice", "cross_entropy"), ours, strict=True):
            np.testing.assert_allclose(value[i], parts[f"loss_{name}{suffix}"].item(), rtol=1e-4)
    np.testing.assert_allclose(total, sum(v.item() for v in parts.values()), rtol=1e-4)
    if not deep:
        return
    sum(parts.values()).backward()
    theirs = {
        name: np.zeros(tuple(p.shape), np.float32) if p.grad is None else p.grad.numpy()
        for name, p in original.named_parameters()
    }
    theirs = fit(rename(theirs, from_hf_maskformer(model.net)), variables)
    reference.assert_trees_agree(gradient, theirs)


def test_costs_of_pairs_equal_hugging_face():
    """Fewer queries than masks: as many masks as queries get one."""
    torch, _ = require("torch"), require("transformers")
    from transformers.models.maskformer.modeling_maskformer import MaskFormerHungarianMatcher

    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, (1, 1, 3, 8, 12)).astype(np.float32)
    masks = (rng.random((1, 5, 16, 36)) < 0.3).astype(np.float32)
    names, classes = rng.normal(size=(1, 1, 3, 4)).astype(np.float32), np.array([[0, 2, 1, 2, 0]])
    matcher = MaskFormerHungarianMatcher(1.0, 20.0, 1.0)
    ((rows, columns),) = matcher(
        *(torch.from_numpy(x[0]) for x in (logits, names, masks[None], classes[None]))
    )
    call = lambda logits, masks, names, classes: matched_losses(
        logits,
        masks,
        jnp.ones((1, 5), bool),
        jnp.ones(1),
        class_logits=names,
        classes=classes,
    )
    ours = jax.jit(call)(*map(jnp.asarray, (logits, masks, names, classes)))
    expected = np.full(5, 3)
    expected[columns.numpy()] = rows.numpy()
    np.testing.assert_array_equal(ours.query[0, 0], expected)


class Patches(nn.Module):
    """A backbone without context: every cell sees its own pixels alone."""

    @nn.compact
    def __call__(self, x, train=False):
        pad = lambda n, s: (0, -n % s)
        maps = {}
        for level, stride in enumerate((4, 8, 16, 32), start=2):
            y = jnp.pad(x, ((0, 0), pad(x.shape[1], stride), pad(x.shape[2], stride), (0, 0)))
            maps[f"c{level}"] = nn.Conv(16, (stride, stride), stride, name=f"patch{level}")(y)
        return maps


def small_net(**changes):
    options = dict(num_queries=4, width=32, mask_dim=8, layers=2, heads=2, ffn=16, deep_supervision=True)
    return MaskFormerNet(Patches(), *PIXELS, **{**options, **changes})


def test_padding_of_the_canvas_changes_nothing():
    net, rng = small_net(), np.random.default_rng(0)
    image = rng.integers(0, 256, (1, 75, 109, 3), dtype=np.uint8)
    canvas = rng.integers(0, 256, (2, 160, 128, 3), dtype=np.uint8)
    canvas[0, :75, :109] = image[0]
    size = jnp.asarray([[75, 109]])
    variables = reference.init(net, jnp.asarray(image), size)
    variables = jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape), variables)
    alone = jax.jit(net.apply)(variables, jnp.asarray(image), size)
    padded = jax.jit(net.apply)(variables, jnp.asarray(canvas), jnp.asarray([[75, 109], [160, 128]]))
    h, w = alone.pixels.shape[1:3]
    assert (h, w) == (19, 28)
    for ours, expected in zip(
        (padded.queries[:1], padded.mask_logits[:1, ..., :h, :w], padded.pixels[:1, :h, :w]),
        alone,
        strict=True,
    ):
        assert reference.relative_error(ours, expected) < 1e-5


def test_positions_equal_hugging_face():
    torch, _ = require("torch"), require("transformers")
    from transformers.models.maskformer.modeling_maskformer import MaskFormerSinePositionEmbedding

    valid = np.zeros((2, 5, 7), bool)
    valid[0], valid[1, :3, :4] = True, True
    embed = MaskFormerSinePositionEmbedding(16, normalize=True)
    expected = embed((2, 32, 5, 7), "cpu", torch.float32, torch.from_numpy(valid)).permute(0, 2, 3, 1).numpy()
    ours = np.asarray(sine_positions(jnp.asarray(valid), 32))
    np.testing.assert_allclose(ours[valid], expected[valid], atol=1e-5)


def test_remat_and_bfloat16():
    rng = np.random.default_rng(0)
    image, size = jnp.asarray(rng.integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)), jnp.asarray([[64, 64]])
    variables = reference.init(small_net(layers=1), image, size)

    def gradient(policy):
        net = small_net(layers=1, dropout=0.3, remat=policy)
        apply = lambda v: net.apply(v, image, size, True, rngs={"dropout": jax.random.key(1)})
        return jax.jit(jax.grad(lambda v: jnp.mean(apply(v).mask_logits ** 2)))(variables)

    expected = gradient("none")
    reference.assert_trees_agree(gradient("all"), expected)
    full = jax.jit(small_net(layers=1).apply)(variables, image, size)
    half = jax.jit(small_net(layers=1, dtype=jnp.bfloat16).apply)(variables, image, size)
    assert half.queries.dtype == jnp.bfloat16 and half.mask_logits.dtype == jnp.float32
    assert 0 < reference.relative_error(half.mask_logits, full.mask_logits) < 0.1


def test_errors():
    image, size = jnp.zeros((1, 64, 64, 3), jnp.uint8), jnp.asarray([[64, 64]])
    with pytest.raises(UserError, match="width=40 must be a multiple of 32"):
        reference.init(small_net(width=40), image, size)
    with pytest.raises(UserError, match="layers=0"):
        reference.init(small_net(layers=0), image, size)
