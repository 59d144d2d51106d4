"""The pseudo-mask generator against NumPy and SciPy in float64, and against transformers' ViT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter1d

from ovseg_jax.errors import UserError
from ovseg_jax.models.pseudo_masks import build_generator
from ovseg_jax.pretrained.load import load
from tests.extras import require
from tests.models.test_vit import randomise
from tests.reference import init, relative_error

VIT = dict(name="vit", patch=8, width=32, depth=2, heads=2, mlp_dim=48, grid=(4, 4), resize="dino")
TOWER = dict(features="tower", backbone=VIT, clusters=5)
COLOUR = dict(features="colour", clusters=5)


def pictures(seed: int = 0, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    """Rectangles of different colours on a ground, with some noise: u8 [3 S T 3]."""
    rng = np.random.default_rng(seed)
    out = np.zeros((3, *size, 3))
    for image in out:
        image[:] = rng.integers(0, 256, 3)
        for _ in range(4):
            y, x = rng.integers(0, size[0] - 8), rng.integers(0, size[1] - 8)
            image[y : y + rng.integers(6, 20), x : x + rng.integers(6, 20)] = rng.integers(0, 256, 3)
    return np.clip(out + rng.normal(0, 3, out.shape), 0, 255).astype(np.uint8)


def run(cfg, images, size=None, method="__call__", variables=None):
    generator = build_generator(cfg)
    size = np.broadcast_to(np.int32(images.shape[1:3] if size is None else size), (len(images), 2))
    apply = jax.jit(lambda v, *inputs: generator.apply(v, *inputs, method=method))
    return jax.device_get(apply(variables or {}, jnp.asarray(images), jnp.asarray(size)))


def lloyd(x: np.ndarray, k: int) -> np.ndarray:
    """The labels of 12 steps from farthest points."""
    away = lambda c: np.square(x[:, None] - c).sum(2)
    chosen = [x[away(x.mean(0)[None])[:, 0].argmin()]]
    while len(chosen) < k:
        chosen.append(x[away(np.array(chosen)).min(1).argmax()])
    c = np.array(chosen)
    for _ in range(12):
        labels = away(c).argmin(1)
        c = np.array([x[labels == j].mean(0) for j in range(k)])
    return away(c).argmin(1)


@pytest.mark.parametrize("size", [(32, 32), (17, 26)])
@pytest.mark.parametrize("space, blur, place, stride", [("opponent", 2.0, 0.15, 2), ("rgb", 0.0, 0.0, 4)])
def test_colours_are_clustered_as_in_numpy(size, space, blur, place, stride):
    """Blurred and averaged over the image's own pixels, with the place, then Lloyd's algorithm; padding is noise."""
    images = pictures()
    chosen = {} if space == "opponent" else dict(space=space, blur=blur, position=place, stride=stride)
    got = run({**COLOUR, **chosen}, images, size, "segments")
    rows, columns = (-(-side // stride) for side in size)

    def smooth(a):
        for axis in (0, 1) if blur else ():
            a = gaussian_filter1d(a, blur, axis, mode="constant", radius=int(3 * blur))
        return a.reshape(32 // stride, stride, 32 // stride, stride, -1).mean((1, 3))[:rows, :columns]

    own = (np.arange(32) < size[0])[:, None] & (np.arange(32) < size[1])
    for image, labels in zip(images, got, strict=True):
        r, g, b = np.moveaxis(image.astype(np.float64) / 255, -1, 0)
        x = np.stack([(r + g + b) / 3, r - g, (r + g) / 2 - b] if space == "opponent" else [r, g, b], -1)
        x = smooth(x * own[..., None]) / smooth(own.astype(np.float64))
        at = [(np.arange(n) + 0.5) * stride * 2 / max(size) - 1 for n in (rows, columns)]
        x = np.concatenate([x, place * np.stack(np.meshgrid(*at, indexing="ij"), -1)], -1)
        want = lloyd(x.reshape(-1, 5), 5).reshape(rows, columns).repeat(stride, 0).repeat(stride, 1)
        np.testing.assert_array_equal(labels, np.where(own, np.pad(want + 1, 16)[16:48, 16:48], 0))


def test_masks_are_the_segments_at_the_centres_of_their_cells():
    images, sizes = pictures(), np.int32([(32, 32), (30, 19), (0, 0)])
    segments = run(COLOUR, images, sizes, "segments")
    masks, valid = run({**COLOUR, "mask_stride": 4}, images, sizes)
    assert masks.dtype == np.uint8 and masks.shape == (3, 5, 8, 8)
    want = (segments[:, None, 2::4, 2::4] == np.arange(1, 6)[:, None, None]) * 255
    np.testing.assert_array_equal(masks, want)
    np.testing.assert_array_equal(valid, [[True] * 5, [True] * 5, [False] * 5])
    assert (masks[1].sum(0) == 255).sum() == 7 * 5  # the last centre inside is at 26 of 30, 18 of 19


def test_masks_do_not_depend_on_the_place_in_the_batch():
    images, cfg = pictures(), {**COLOUR, "start": "kmeans++"}
    whole, turned = (run(cfg, x, method="segments") for x in (images, images[::-1]))
    np.testing.assert_array_equal(whole, turned[::-1])


def test_normalised_cuts_separate_stripes():
    image = np.zeros((1, 32, 32, 3), np.uint8)
    image[:, :, 10:20], image[:, :, 20:] = (200, 30, 30), (30, 30, 200)
    plain = dict(features="colour", space="rgb", blur=0.0, position=0.0, clusters=3, gamma=20.0)
    segments = run(plain, image, (32, 30), "segments")
    parts = segments[0, 0, :30].reshape(3, 10)
    assert (parts == parts[:, :1]).all() and set(parts[:, 0]) == {1, 2, 3}
    assert (segments[0, :, :30] == segments[0, 0, :30]).all() and not segments[:, :, 30:].any()


def test_an_image_of_one_colour_is_one_mask():
    cfg = {**COLOUR, "space": "rgb", "blur": 0.0, "position": 0.0}
    _, valid = run(cfg, np.full((2, 32, 32, 3), 90, np.uint8), (32, 20))
    assert (valid.sum(1) == 1).all()


def published(model) -> dict:
    """The state of transformers' ViTModel by the names of facebookresearch/dino's vision_transformer.py."""
    state, out = model.state_dict(), {}
    for name, theirs in {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }.items():
        out[name] = state[theirs]
    for i in range(VIT["depth"]):
        for kind in ("weight", "bias"):
            at = lambda name, i=i, kind=kind: state[f"layers.{i}.{name}.{kind}"]
            qkv = [at(f"attention.{x}_proj") for x in "qkv"]
            out[f"blocks.{i}.attn.qkv.{kind}"] = require("torch").cat(qkv)
            for name, theirs in {
                "norm1": "layernorm_before",
                "norm2": "layernorm_after",
                "attn.proj": "attention.o_proj",
                "mlp.fc1": "mlp.fc1",
                "mlp.fc2": "mlp.fc2",
            }.items():
                out[f"blocks.{i}.{name}.{kind}"] = at(theirs)
    assert sum(x.numel() for x in out.values()) == sum(x.numel() for x in state.values())
    return out


@pytest.mark.parametrize(
    "form, layer, normalise",
    [("transformers", "tokens", False), ("facebookresearch/dino", "keys", True)],
)
def test_tokens_are_those_of_transformers(form, layer, normalise, tmp_path):
    torch, transformers = require("torch"), require("transformers")
    fields = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.ViTConfig(**fields, image_size=32, patch_size=8, layer_norm_eps=1e-6)
    original = randomise(transformers.ViTModel(config, add_pooling_layer=False))
    if form == "transformers":
        original.save_pretrained(tmp_path)
        weights = tmp_path
    else:
        weights = tmp_path / "dino_deitsmall8_pretrain.pth"
        torch.save(published(original), weights)
    # On a grid of its own size, so that DINO's rule for others, which test_vit holds, plays no part.
    images = pictures(1)
    kept = []
    original.layers[-1].attention.k_proj.register_forward_hook(lambda *call: kept.append(call[-1]))
    with torch.no_grad():
        pixels = (images / 255.0 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
        out = original(torch.from_numpy(pixels).float().permute(0, 3, 1, 2))
    tokens = {"tokens": out.last_hidden_state, "keys": kept[0]}[layer][:, 1:]
    expected = tokens.numpy().reshape(3, 4, 4, 32)
    if normalise:
        expected = expected / np.linalg.norm(expected, axis=-1, keepdims=True)

    generator = build_generator({**TOWER, "layer": layer, "normalise": normalise})
    inputs = jnp.asarray(images), jnp.full((3, 2), 32)
    shapes = jax.eval_shape(generator.init, jax.random.key(0), *inputs)
    own = {"params": shapes["params"]["features"]}
    variables = {"params": {"features": load(str(weights), generator.features, own)["params"]}}
    both = lambda module, *x: (module.features(*x), module.segments(*x))
    got, segments = jax.jit(lambda v, *x: generator.apply(v, *x, method=both))(variables, *inputs)
    assert relative_error(got, expected) < 1e-4
    for labels, tokens in zip(segments, expected, strict=True):
        want = lloyd(tokens.reshape(16, 32).astype(np.float64), 5).reshape(4, 4) + 1
        np.testing.assert_array_equal(labels, want.repeat(8, 0).repeat(8, 1))


def test_padding_of_a_tower_belongs_to_no_mask():
    images = pictures(2, (32, 48))
    generator = build_generator(TOWER)
    variables = init(generator, jnp.asarray(images), jnp.full((3, 2), 32))
    segments = run(TOWER, images, (19, 40), "segments", variables)
    assert (segments[:, :19, :40] > 0).all()
    assert not segments[:, 19:].any() and not segments[:, :, 40:].any()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(features="edges"), "features='edges' of pseudo-masks is not one of colour, tower"),
        (dict(layer="keys"), "features='colour' have no 'layer'; known keys: features, blur, clusters"),
        (dict(space="lab"), "space='lab' of pseudo-masks is not one of rgb, opponent"),
        (dict(stride=5), "32 x 32 pixels cannot be cut into squares of stride=5"),
        (dict(mask_stride=5), "32 x 32 pixels is not a multiple of mask_stride=5"),
        (dict(start="middle"), "start='middle' of pseudo-masks is not one of farthest"),
        (dict(gamma=-1.0), "gamma=-1.0 of pseudo-masks is less than 0"),
        (dict(clusters=256), "clusters=256 of pseudo-masks is not from 1 to 255"),
        (dict(features="tower"), "need a backbone, such as"),
        (dict(features="tower", backbone=dict(name="resnet50")), "'resnet50' of pseudo-masks is no Vision"),
        (dict(features="tower", backbone=VIT, blur=1.0), "features='tower' have no 'blur'"),
        (dict(features="tower", backbone=VIT, layer="values"), "layer='values' of pseudo-masks is not one"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(
            build_generator({**COLOUR, **change}).init,
            jax.random.key(0),
            jnp.zeros((1, 32, 32, 3), jnp.uint8),
            jnp.full((1, 2), 32),
        )
