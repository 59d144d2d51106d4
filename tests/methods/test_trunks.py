"""UMG-CLIP's adaptations (papers/003, 4.2): adapters, pyramid and FC-CLIP's head on a frozen tower; adapters alone."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from ovseg_jax.configs import fcclip as fcclip_configs
from ovseg_jax.configs import umg_clip
from ovseg_jax.errors import UserError
from ovseg_jax.inference import export
from ovseg_jax.inference.segmenter import Segmenter
from ovseg_jax.methods import build
from ovseg_jax.methods.fcclip import HEAD, FCClip
from ovseg_jax.models.convpass import ADAPTERS
from ovseg_jax.towers.clip import SPACE
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList
from tests import reference
from tests.extras import require
from tests.methods.steps import take_steps
from tests.methods.test_fcclip import centre_masks
from tests.methods.test_umg_clip import EVA, VIT, D, config_of, made, random_like

CLASSES = ClassList((("cat",), ("sky",)), (1, 2), (True, False))
WORDS = WordList(["a", "cat", "dog", "sky", "the"])
HEADS = dict(
    num_queries=4, width=32, mask_dim=32, layers=2, heads=2, ffn=24, encoder_layers=1, encoder_ffn=24
)


def dense_config(image=EVA, **changes):
    """The adaptation of a tiny tower, not of a run."""
    config = umg_clip.get_config()
    config.towers.image = image
    config.towers.text = dict(name="clip", width=16, heads=2, layers=1, embed_dim=D, length=20)
    config.towers.update(dict(init="", tokenizer="words", image_size=32))
    config.data.image_size, config.loss.points, config.stages = 32, 32, []
    config.model.update(HEADS)
    config.update_from_flattened_dict(changes)
    return config


def images(seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (2, 4, 4, 3))
    return dict(
        image=np.kron(coarse, np.ones((1, 8, 8, 1))).astype(np.uint8),
        image_size=np.array([[32, 32], [32, 24]]),
        masks=np.kron(rng.integers(0, 2, (2, 3, 4, 4)), np.ones((1, 1, 8, 8))).astype(np.uint8) * 255,
        mask_valid=np.array([[True, True, True], [True, False, False]]),
        mask_classes=np.array([[0, 1, 0], [1, -1, -1]]),
        example_mask=np.ones(2, bool),
    )


@pytest.fixture(scope="module")
def dense():
    method = build(dense_config(), WORDS, CLASSES)
    variables = jax.jit(method.init)(jax.random.key(0))
    variables["params"] = random_like(variables["params"])
    return method, variables


@pytest.mark.parametrize("features", ["adapted", "frozen"])
def test_features_of_masks_are_means_of_the_towers_patches(dense, features):
    """In float64 from the masks of the prediction, and the patches of the tower with, or without, its adapters."""
    method = build(dense_config(**{"fcclip.clip_features": features}), WORDS, CLASSES)
    variables, data = dense[1], images()
    prediction = jax.jit(method.predict)(variables, data["image"], data["image_size"])
    clip, image = method.clip if features == "adapted" else method._plain, variables["towers"]["image"]
    flat = flatten_dict(image["params"], sep="/") | flatten_dict(variables["params"]["adapters"], sep="/")
    tree = {name: x for name, x in flat.items() if features == "adapted" or not re.search(ADAPTERS, name)}
    pixels = (data["image"] / np.float32(255) - 0.5) / 0.25
    pixels[1, :, 24:] = 0  # padding is black after the normalisation
    tokens = clip.image.apply(
        {"params": unflatten_dict(tree, sep="/")}, jnp.asarray(pixels, jnp.float32)
    ).tokens
    head = image["params"]["head"]
    patches = np.float64(tokens) @ np.float64(head["kernel"]) + np.float64(head["bias"])
    np.testing.assert_allclose(prediction.pixels[SPACE], patches, atol=1e-4)
    # The map of masks has half the stride of the patches.
    logits = np.float64(prediction.mask_logits)
    small = logits.reshape(2, 4, 4, 2, 4, 2).mean((3, 5))
    under = small > 0
    assert under.any()
    pooled = np.einsum("bnhw,bhwd->bnd", under, patches)
    pooled /= np.maximum(np.linalg.norm(pooled, axis=-1, keepdims=True), 1e-9)
    got = np.asarray(prediction.regions[SPACE]) / float(method.logit_scale(variables))
    filled = under.any((2, 3))
    np.testing.assert_allclose(got[filled], pooled[filled], atol=1e-4)
    assert prediction.regions[HEAD].shape == (2, 4, D)
    whole = jnp.asarray(data["image"])
    alone = build(dense_config(**{"towers.adapter": {}}), WORDS, CLASSES)
    np.testing.assert_array_equal(method.embed_image(variables, whole), alone.embed_image(variables, whole))


def test_only_adapters_pyramid_and_head_learn(dense):
    """The loss falls, every adapter moves, and the tower is neither in the parameters nor changed."""
    method = dense[0]
    before, after, losses = take_steps(method, images(), 2, 4)
    assert losses[-1] < losses[0] and set(before) == {"adapters", "pyramid", "masks", "classifier"}
    paths = flatten_dict(before["adapters"], sep="/")
    assert all(re.search(ADAPTERS, path) for path in paths) and len(paths) == 12  # two in the only block
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    ups = [moved["adapters"]["blocks_0"][f"adapter_{part}"]["up"]["kernel"] for part in ("attention", "mlp")]
    assert all(ups) and any(jax.tree.leaves(moved["pyramid"]))
    without = build(dense_config(**{"towers.adapter": {}}), WORDS, CLASSES)
    assert "adapters" not in jax.eval_shape(without.init, jax.random.key(0))["params"]


def test_dropout_is_on_in_training_alone(dense):
    method, variables = dense
    data = {name: jnp.asarray(x) for name, x in images().items()}
    image = jnp.zeros((1, 32, 32, 3))
    maps = lambda rng: method.trunk.apply(variables, image, rng).maps["c3"]
    drawn = [np.asarray(maps(jax.random.key(seed))) for seed in (0, 1)]
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3
    predict = jax.jit(method.predict)
    one, two = (predict(variables, data["image"], data["image_size"]).mask_logits for _ in range(2))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("kind", ["eva", "vit"])
def test_adaptation_to_images_trains_adapters_alone(kind):
    """Text tower and temperature stay, and so do the tower's own parameters (5.1)."""
    adapter = umg_clip.get_config().towers.adapter
    config = config_of("adapt=global", {"eva": EVA, "vit": VIT}[kind])
    assert config.towers.adapter == adapter and tuple(config.loss.terms) == ("image_captions", "image_tags")
    config.towers.update(dict(init="", tokenizer="words"))
    config.stages = []
    method, batch = made(config)
    before, after, losses = take_steps(method, batch, 2, 4)
    assert losses[-1] < losses[0]
    moved = flatten_dict(jax.tree.map(lambda a, b: bool((a != b).any()), before, after), sep="/")
    assert {path for path, moves in moved.items() if moves} <= {p for p in moved if re.search(ADAPTERS, p)}
    assert sum(moved.values()) >= 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"towers.image": dict(EVA, patch=14, grid=2)}, "patches of 14 pixels .* set towers.image.patch=16"),
        ({"fcclip.clip_features": "both"}, "fcclip.clip_features='both' is not one of adapted, frozen"),
        ({"model.init": "x"}, "model.init: a published FC-CLIP has a ConvNeXt"),
        ({"towers.adapter": {"rank": 4}}, "towers.adapter has no key 'rank'"),
        ({"towers.adapter": {"width": 0}}, "adapter.width=0 is less than 1"),
        (
            {"towers.image": dict(name="convnext", depths=(1, 1), width=16, embed_dim=D)},
            "name='convnext': only a ViT or an EVA takes adapters",
        ),
    ],
)
def test_a_trunk_that_cannot_be_is_a_sentence(changes, message):
    config = dense_config()
    for key, value in changes.items():
        section, name = key.split(".")
        config[section][name] = ConfigDict(value) if isinstance(value, dict) else value
    if "towers.image" in changes:
        config.towers.image_size = 28
    with pytest.raises(UserError, match=message):
        FCClip(config, WORDS, CLASSES)


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        (
            "data=umg41m,adapt=panoptic,data_dir=x",
            "adapt=panoptic needs masks: data=coco, folder or prepared",
        ),
        ("data=coco,adapt=global,data_dir=x", "adapt=global needs texts: data=umg41m, not data=coco"),
        ("adapt=none,size=64", "size=64 has no effect"),
        ("data=umg41m,data_dir=x,adapt=global,losses=captions", "losses=captions has no effect"),
    ],
)
def test_arguments_that_contradict_each_other_are_a_sentence(arg, message):
    with pytest.raises(UserError, match=message):
        umg_clip.get_config(arg)


def test_the_papers_adaptations():
    """5.1: FC-CLIP's recipe at 896 pixels, with patches of 16; adaptation to images at 1e-3."""
    config, code = (
        umg_clip.get_config("data=coco,data_dir=x,tower=eva02_clip_l14"),
        fcclip_configs.get_config("data=coco,data_dir=x"),
    )
    assert config.optimizer == code.optimizer and config.steps == code.steps and config.loss == code.loss
    assert (config.data.image_size, config.towers.image.patch) == (896, 16)
    fifth = umg_clip.get_config("data=coco,data_dir=x,size=384,adapters=false,part=0.2")
    assert (fifth.steps, fifth.data.train[0]["part"]) == (73_750, 0.2) and fifth.data.image_size == 384
    assert tuple(fifth.optimizer.drops) == (65_556, 71_018)
    config = umg_clip.get_config("data=umg41m,data_dir=x,adapt=global,weights=r,tower=eva02_clip_e14")
    assert config.optimizer.learning_rate == 1e-3 and config.steps == round(2 * umg_clip.PAIRS / 8192)


POST = dict(EVA, rope_grid=None, post_norm=True)  # as E/14


def exported_trunk(image, features, tmp_path, to):
    """A Segmenter of a head with weights that all matter, written to a folder."""
    config = dense_config(image, **{"fcclip.clip_features": features})
    method = build(config, WORDS, CLASSES)
    variables = random_like(jax.eval_shape(method.init, jax.random.key(0)))
    data = images()
    centre_masks(method, variables, jnp.asarray(data["image"]), jnp.asarray(data["image_size"]))
    segmenter = Segmenter(method, variables, config, CLASSES)
    export.export_model(lambda: segmenter, to, str(tmp_path))
    return segmenter


@pytest.mark.parametrize(
    ("image", "features"), [(EVA, "frozen"), (VIT, "adapted"), (POST, "frozen"), (VIT, "frozen")]
)
def test_a_head_on_a_tower_in_pytorch_gives_the_same_outputs_and_labels(image, features, tmp_path):
    torch = require("torch")
    import ovseg_jax.torch

    segmenter = exported_trunk(image, features, tmp_path, "torch")
    data, loaded = images(), ovseg_jax.torch.load(tmp_path)
    expected = jax.jit(segmenter.method.predict)(segmenter.variables, data["image"], data["image_size"])
    with torch.no_grad():
        found = loaded.net(
            torch.from_numpy(data["image"]).permute(0, 3, 1, 2), torch.from_numpy(data["image_size"])
        )
    pairs = dict(
        masks=(found.mask_logits, expected.mask_logits),
        head=(found.head, expected.regions["head"]),
        clip=(found.clip, expected.regions["clip"]),
        void=(found.void, expected.void),
        pixels=(found.pixel_embed.permute(0, 2, 3, 1), expected.pixels["clip"]),
    )
    errors = {name: reference.relative_error(*pair) for name, pair in pairs.items()}
    print(f"head on {image['name']}, {features}: {errors}")
    assert max(errors.values()) < 1e-4
    assert 0.05 < (found.mask_logits > 0).float().mean() < 0.95
    labels = "cat; the sky; dog"
    ours, theirs = segmenter.segment(data["image"][0], labels), loaded.segment(data["image"][0], labels)
    assert len(np.unique(ours.label_map)) > 1
    assert (ours.label_map == theirs.label_map).mean() > 0.999
    np.testing.assert_allclose(theirs.confidence, ours.confidence, atol=1e-4)


@pytest.mark.usefixtures("quick_onnx")
def test_a_head_on_a_tower_in_onnx(tmp_path):
    torch, runtime = require("torch"), require("onnxruntime")
    require("onnxscript")
    import ovseg_jax.torch

    exported_trunk(EVA, "frozen", tmp_path, "onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    data = images()
    pixels, sizes = data["image"].transpose(0, 3, 1, 2).copy(), data["image_size"].astype(np.int32)
    found = session.run(None, {"image": pixels, "image_size": sizes})
    with torch.no_grad():
        expected = ovseg_jax.torch.load(tmp_path).net(torch.from_numpy(pixels), torch.from_numpy(sizes))
    assert max(reference.relative_error(*pair) for pair in zip(found, expected, strict=True)) < 1e-4
