"""CLIP's ConvNeXts against open_clip and timm, with their PyTorch form: values, gradients, names, shapes."""

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.models.convnext import PRESETS, ConvNeXt
from ovseg_jax.models.text_towers import text_tower
from ovseg_jax.pretrained.convnext import from_open_clip_convnext, from_timm_clip_convnext
from ovseg_jax.pretrained.files import write_safetensors
from ovseg_jax.pretrained.load import load
from ovseg_jax.pretrained.rename import fit, rename
from ovseg_jax.pretrained.text import from_openai_clip_text
from ovseg_jax.towers.clip import Clip
from ovseg_jax.vocab.words import WordList
from tests import reference
from tests.extras import require
from tests.models import twin
from tests.reference import images

SIZES: dict[str, Any] = dict(depths=(1, 1, 2, 1), width=8, embed_dim=24)
TINY = {
    "base": SIZES,
    "large": SIZES | dict(head_hidden=48),
    "xxlarge": SIZES | dict(epsilon=1e-5),
}
MAPS = ("c2", "c3", "c4", "c5")


def randomise(model):
    """With layer scales that matter, and small maps, in whose norms the epsilon matters."""
    import torch

    generator = torch.Generator().manual_seed(1)
    reference.randomise(model)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            parameter.data.normal_(0, 0.5, generator=generator)
        elif name.endswith("stem.0.weight"):
            parameter.data.mul_(0.02)
            model.get_parameter(name.replace("weight", "bias")).data.mul_(0.02)
    return model


@pytest.fixture
def small(monkeypatch):
    """Lets timm build its ConvNeXts with our small sizes, as open_clip calls it."""
    timm = require("timm")
    create = timm.create_model
    dims = tuple(SIZES["width"] * 2**i for i in range(4))
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda *args, **kwargs: create(*args, depths=SIZES["depths"], dims=dims, **kwargs),
    )
    return timm


def tower(size):
    """open_clip's image tower of `convnext_SIZE`, small."""
    open_clip = require("open_clip")
    proj = "mlp" if size == "large" else "linear"
    return randomise(open_clip.timm_model.TimmModel(f"convnext_{size}", 24, pool="", proj=proj))


@pytest.mark.parametrize("size", TINY)
def test_equals_open_clip(small, size):
    """The maps, the embedding of the image, and that of each place as FC-CLIP projects pooled features."""
    torch, original = require("torch"), tower(size)
    x, model = images(2, 96, 64), ConvNeXt(**TINY[size])
    variables = reference.load(model, original, from_open_clip_convnext(""), x)
    inputs = reference.torch_images(x)
    with torch.no_grad():
        last, maps = original.trunk.forward_intermediates(inputs)
        places = last.permute(0, 2, 3, 1).reshape(-1, last.shape[1], 1, 1)
        dense = original.head(original.trunk.head(places)).reshape(2, 3, 2, 24)
        pooled = original(inputs)
    out = jax.jit(model.apply)(variables, x)
    reference.assert_maps_agree({key: out[key] for key in MAPS}, maps, size)
    errors = reference.relative_error(out["pooled"], pooled), reference.relative_error(out["dense"], dense)
    print(f"{size} pooled and dense max relative errors {errors[0]:.1e} {errors[1]:.1e}")
    assert max(errors) < 1e-4


def test_gradients_equal_open_clip(small):
    original = tower("large")
    x, model = images(2, 64, 32), ConvNeXt(**TINY["large"])
    renames = from_open_clip_convnext("")
    variables = reference.load(model, original, renames, x)
    (original(reference.torch_images(x)) ** 2).mean().backward()
    grads = {name: value.grad.numpy() for name, value in original.named_parameters()}
    loss = lambda params, remat: jnp.mean(
        ConvNeXt(**TINY["large"], remat=remat).apply({"params": params}, x)["pooled"] ** 2
    )
    expected = fit(rename(grads, renames), variables)["params"]
    for remat in ("none", "all"):
        reference.assert_trees_agree(
            jax.jit(jax.grad(loss), static_argnums=1)(variables["params"], remat), expected
        )


def test_equals_timm(small, tmp_path):
    """timm's own form, whose classifier is CLIP's projection; by its file, whose config is held to ours."""
    torch = require("torch")
    original = randomise(small.create_model("convnext_large_mlp", head_hidden_size=48, num_classes=24))
    original.head.fc.bias.data.zero_()
    x, model = images(2, 64, 64), ConvNeXt(**TINY["large"])
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    state = {name: value.detach().numpy() for name, value in original.state_dict().items()}
    write_safetensors(tmp_path / "model.safetensors", state)
    (tmp_path / "config.json").write_text(json.dumps(dict(architecture="convnext_large_mlp")))
    variables = load(str(tmp_path), model, shapes)
    with torch.no_grad():
        pooled = original(reference.torch_images(x))
    error = reference.relative_error(jax.jit(model.apply)(variables, x)["pooled"], pooled)
    print(f"timm pooled max relative error {error:.1e}")
    assert error < 1e-4
    with pytest.raises(UserError, match="its epsilon is 1e-06, but this model's is 1e-05"):
        load(str(tmp_path), ConvNeXt(**TINY["large"], epsilon=1e-5), shapes)
    (tmp_path / "config.json").write_text(json.dumps(dict(architecture="convnextv2_base")))
    with pytest.raises(UserError, match="'convnextv2_base' is not supported"):
        load(str(tmp_path), model, shapes)


def test_clip_of_a_published_folder(small, tmp_path):
    """Both towers by name from open_clip's folder; images are embedded as there."""
    torch, open_clip = require("torch"), require("open_clip")
    config = open_clip.get_model_config("convnext_large_d")
    text = dict(context_length=8, vocab_size=50, width=16, heads=2, layers=1)
    config.update(embed_dim=24, text_cfg=text)
    original = randomise(open_clip.model.CLIP(**config))
    state = {name: value.detach().numpy() for name, value in original.state_dict().items()}
    write_safetensors(tmp_path / "open_clip_model.safetensors", state)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=config)))
    clip = Clip(
        ConfigDict(
            dict(
                image=dict(
                    name="clip_convnext_large_d",
                    depths=SIZES["depths"],
                    width=8,
                    embed_dim=24,
                    head_hidden=48,
                ),
                text=dict(
                    name="clip_convnext_large_d",
                    length=8,
                    vocab_size=50,
                    width=16,
                    heads=2,
                    layers=1,
                    embed_dim=24,
                ),
                init=str(tmp_path),
                image_size=64,
            )
        ),
        WordList(["dog"]),
    )
    image = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    weights = clip.pretrained()
    found = jax.jit(clip.embed_image)(weights, image)
    mean, std = (np.asarray(values, np.float32) for values in clip._pixels())
    with torch.no_grad():
        expected = original.encode_image(
            reference.torch_images((image / np.float32(255) - mean) / std), normalize=True
        )
    error = reference.relative_error(found, expected)
    print(f"CLIP's image embedding max relative error {error:.1e}")
    assert error < 1e-4
    dense = jax.jit(clip.embed_patches, static_argnums=2)(weights, image[:, :32, :32], "")
    np.testing.assert_allclose(
        dense[:, 0, 0] / np.linalg.norm(dense[:, 0, 0], axis=-1, keepdims=True),
        jax.jit(clip.embed_image)(weights, image[:, :32, :32]),
        atol=1e-5,
    )
    clip.check_patches("")
    with pytest.raises(
        UserError, match="a ConvNeXt has no attention, so that it has activation features only"
    ):
        clip.check_patches("value")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_shapes_of_open_clip(name):
    """The whole of CLIP, with its text tower; timm's form of the image tower; and our PyTorch form.

    Depths are compared as numbers, and the shapes of the first block of each stage: bytes stand for their values.
    """
    torch, open_clip, timm = require("torch"), require("open_clip"), require("timm")
    from ovseg_jax.torch.convnext import ConvNeXt as TorchConvNeXt

    one = (1, 1, 1, 1)
    config = open_clip.get_model_config(name.removeprefix("clip_"))
    kind = "convnext_" + name.removeprefix("clip_convnext_").split("_")[0]
    published, text = ConvNeXt(**PRESETS[name]), text_tower(name, layers=1)
    with torch.device("meta"):
        original = open_clip.model.CLIP(**config)
        of_timm = timm.create_model(
            kind + "_mlp" * bool(published.head_hidden), num_classes=published.embed_dim
        )
        ours = TorchConvNeXt(**PRESETS[name] | dict(depths=one))
    assert tuple(len(stage.blocks) for stage in original.visual.trunk.stages) == published.depths
    assert len(original.transformer.resblocks) == text_tower(name).layers
    assert text.activation == "gelu" and not config.get("quick_gelu")
    norms = {m.eps for m in original.visual.modules() if isinstance(m, torch.nn.LayerNorm)}
    assert norms == {published.epsilon}

    def firsts(module):
        later = re.compile(r".*blocks\.[1-9].*")
        names = {n: tuple(v.shape) for n, v in module.state_dict().items() if not later.match(n)}
        return {n: np.broadcast_to(np.int8(0), shape) for n, shape in names.items()}

    def shapes(module, *inputs):
        found = jax.eval_shape(module.init, jax.random.key(0), *inputs)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.int8), found)

    model, x = published.clone(depths=one), images(1, 32, 32)
    fit(rename(firsts(original), from_open_clip_convnext()), shapes(model, x))
    fit(rename(firsts(of_timm), from_timm_clip_convnext(model.head_hidden)), shapes(model, x))
    names = rename(firsts(original), from_openai_clip_text(text.heads))
    fit(names, shapes(text, jnp.zeros((1, 77), jnp.int32)))
    twin.assert_same_shapes(model, ours, x)


@pytest.mark.parametrize("size", [(64, 96), (37, 70)])
def test_strides_and_the_pytorch_form(size):
    torch = require("torch")
    from ovseg_jax.torch.convnext import ConvNeXt as TorchConvNeXt

    x, model = images(2, *size), ConvNeXt(**TINY["large"])
    variables = twin.draw(model, x)
    ours = twin.load(TorchConvNeXt(**TINY["large"]), variables)
    expected = jax.jit(model.apply)(variables, x)
    with torch.no_grad():
        found = ours(reference.torch_images(x))
    assert expected.keys() == found.keys() == {*MAPS, "pooled", "dense"}
    for i, key in enumerate(MAPS):
        assert expected[key].shape == (2, *(-(-side // (4 * 2**i)) for side in size), 8 * 2**i)
        assert ours.channels[key] == 8 * 2**i
    for name, value in expected.items():
        y = found[name].permute(0, 2, 3, 1) if value.ndim == 4 else found[name]
        error = reference.relative_error(y, value)
        print(f"PyTorch {size} {name} {value.shape} max relative error {error:.1e}")
        assert error < 1e-4


def test_pytorch_export_and_bfloat16():
    torch = require("torch")
    from ovseg_jax.torch.convnext import ConvNeXt as TorchConvNeXt

    fields = TINY["base"] | dict(depths=(1, 1))
    x, half = images(2, 37, 64), ConvNeXt(**fields, dtype=jnp.bfloat16)
    variables = twin.draw(half, x)
    ours, inputs = twin.load(TorchConvNeXt(**fields), variables), reference.torch_images(x)
    twin.assert_exports(ours, inputs)
    expected, out = jax.jit(ConvNeXt(**fields).apply)(variables, x), jax.jit(half.apply)(variables, x)
    with torch.no_grad():
        theirs = ours.bfloat16()(inputs.bfloat16())
    for key, value in expected.items():
        assert out[key].dtype == jnp.bfloat16 and theirs[key].dtype == torch.bfloat16
        y = theirs[key].float()
        y = y.permute(0, 2, 3, 1) if value.ndim == 4 else y
        assert 0 < reference.relative_error(out[key].astype(jnp.float32), value) < 0.05
        assert 0 < reference.relative_error(y, value) < 0.1
