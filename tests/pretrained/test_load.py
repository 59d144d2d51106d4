"""From a published folder to a method's variables."""

import jax
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.models.backbones import build_backbone
from ovseg_jax.models.text_towers import Bert, CLIPText, SiglipText, TextTower
from ovseg_jax.models.tower_pyramid import TowerPyramid
from ovseg_jax.models.vit import ViT
from ovseg_jax.pretrained.files import read_arrays, write_safetensors
from ovseg_jax.pretrained.load import formats, load, recognise
from tests.extras import require
from tests.methods.test_openseg import make

B0 = {"name": "efficientnet_b0"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An EfficientNet-B0 as timm publishes it, with random weights."""
    torch, timm = require("torch"), require("timm")
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_b0", num_classes=7)
    path = tmp_path_factory.mktemp("b0")
    write_safetensors(path / "model.safetensors", {k: v.numpy() for k, v in model.state_dict().items()})
    (path / "config.json").write_text('{"architecture": "tf_efficientnet_b0"}')
    return path


def shapes_of(module):
    return jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))


def test_a_method_starts_from_a_published_backbone(folder):
    method = make(backbone=B0 | {"init": f"timm:{folder}"})
    shapes, found = jax.eval_shape(method.init, jax.random.key(0)), method.pretrained()
    assert jax.tree.structure(found["batch_stats"]) == jax.tree.structure(shapes["batch_stats"])
    assert list(found["params"]) == ["image"] and list(found["params"]["image"]) == ["backbone"]
    backbone = shapes["params"]["image"]["backbone"]
    assert jax.tree.structure(found["params"]["image"]["backbone"]) == jax.tree.structure(backbone)
    kernel = found["params"]["image"]["backbone"]["block_3"]["project_conv"]["kernel"]
    source = read_arrays(folder)["blocks.2.0.conv_pwl.weight"]
    np.testing.assert_array_equal(kernel, source.transpose(2, 3, 1, 0))


def test_without_an_init_nothing_is_replaced():
    assert make().pretrained() == {}


def test_weights_of_another_architecture_are_refused(folder):
    b1, resnet = build_backbone({"name": "efficientnet_b1"}), build_backbone({"name": "resnet50"})
    with pytest.raises(
        UserError, match=r"read as timm's EfficientNet: .* it lacks \d+ names \(batch_stats/block_"
    ):
        load(str(folder), b1, shapes_of(b1))
    with pytest.raises(
        UserError,
        match=r"in none of the formats torchvision's or timm's ResNet, transformers' ResNet: it holds",
    ):
        load(str(folder), resnet, shapes_of(resnet))
    small = build_backbone({"name": "small"})
    with pytest.raises(UserError, match="no format of published weights is known for a SmallBackbone"):
        load(str(folder), small, shapes_of(small))


def test_one_name_too_many_or_too_few_is_named(folder, tmp_path):
    module = build_backbone(B0)
    arrays = dict(read_arrays(folder))
    stem = arrays.pop("conv_stem.weight")
    write_safetensors(tmp_path / "less.safetensors", arrays)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match=r"lacks 1 names \(params/stem_conv/kernel\)"):
        load(str(tmp_path / "less.safetensors"), module, shapes_of(module))
    found = load(str(tmp_path / "less.safetensors"), module, shapes_of(module), may_miss=["stem_conv"])
    assert "stem_conv" not in found["params"] and "stem_norm" in found["params"]
    write_safetensors(
        tmp_path / "more.safetensors", arrays | {"conv_stem.weight": stem, "adapter.weight": stem}
    )
    with pytest.raises(UserError, match=r"has 1 names \(adapter.weight\) that this model does not have"):
        load(str(tmp_path / "more.safetensors"), module, shapes_of(module))


def test_a_classifier_is_a_backbone_whose_finer_norms_are_new(tmp_path):
    torch, timm = require("torch"), require("timm")
    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3)
    write_safetensors(tmp_path / "model.safetensors", {k: v.numpy() for k, v in model.state_dict().items()})
    module = build_backbone({"name": "swin_tiny"})
    found = load(f"timm:{tmp_path}", module, shapes_of(module))["params"]
    np.testing.assert_array_equal(found["out_norm5"]["scale"], model.norm.weight.detach().numpy())
    assert not {"out_norm2", "out_norm3", "out_norm4"} & set(found)


def test_a_small_tower_is_recognised_beside_a_large_one(tmp_path):
    renames = formats(CLIPText(heads=2))
    text = ["token_embedding.weight", "positional_embedding", "ln_final.weight"]
    arrays = {name: np.zeros(1) for name in [*text, *(f"visual.layer1.{i}.bn1.weight" for i in range(97))]}
    assert recognise(arrays, renames, tmp_path)[0] == "OpenAI's or open_clip's CLIP"
    with pytest.raises(UserError, match=r"is in none of the formats transformers' CLIP"):
        recognise({name: np.zeros(1) for name in arrays if name not in text}, renames, tmp_path)


TINY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
VIT = ViT(patch=8, width=32, depth=2, heads=2, mlp_dim=64, grid=(4, 4))
CLIP_VIT = VIT.clone(pre_norm=True, activation="quick_gelu", epsilon=1e-5, embed_dim=24, head_bias=False)
TEXT = dict(vocab_size=60, length=12, width=32, layers=2, heads=2, mlp_dim=64)


def save_tower(kind, path):
    """A published model with random weights as its library saves it, and our modules that are in it."""
    transformers = require("transformers")
    vision = TINY | dict(patch_size=8, image_size=32)
    text = TINY | dict(vocab_size=60, max_position_embeddings=12)
    if kind == "clip":
        config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=24)
        transformers.CLIPModel(config).save_pretrained(path)
        return CLIP_VIT, CLIPText(**TEXT, embed_dim=24)
    if kind == "siglip":
        vision |= dict(hidden_act="gelu_pytorch_tanh")
        transformers.SiglipModel(
            transformers.SiglipConfig(vision_config=vision, text_config=text)
        ).save_pretrained(path)
        return VIT.clone(cls="none", pool="map", activation="gelu_tanh"), SiglipText(**TEXT, embed_dim=32)
    if kind == "dino":
        transformers.ViTModel(transformers.ViTConfig(**vision), add_pooling_layer=False).save_pretrained(path)
        return (TowerPyramid(VIT),)
    if kind == "mae":
        transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**vision)).save_pretrained(path)
        return (VIT,)
    if kind == "bert":
        transformers.BertModel(transformers.BertConfig(**text)).save_pretrained(path)
        return (Bert(**TEXT),)
    open_clip = require("open_clip")
    model = open_clip.model.CLIP(
        24,
        dict(image_size=32, patch_size=8, width=32, layers=2, head_width=16, mlp_ratio=2),
        dict(context_length=12, vocab_size=60, width=32, layers=2, heads=2, mlp_ratio=2),
    )
    arrays = {k: np.array(v.numpy()) for k, v in model.state_dict().items()}
    write_safetensors(path / "open_clip_model.safetensors", arrays)
    return CLIP_VIT, CLIPText(**TEXT, embed_dim=24)


@pytest.mark.parametrize("kind", ["clip", "open_clip", "siglip", "dino", "mae", "bert"])
def test_folders_of_towers(kind, tmp_path):
    require("torch")
    for module in save_tower(kind, tmp_path):
        text = isinstance(module, TextTower)
        inputs = np.zeros((1, 8), np.int32) if text else np.zeros((1, 32, 32, 3), np.float32)
        shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)
        found = load(str(tmp_path), module, shapes)
        expected = {"tower": shapes["params"]["tower"]} if kind == "dino" else shapes["params"]
        assert jax.tree.map(np.shape, found["params"]) == jax.tree.map(lambda x: x.shape, expected)
        with pytest.raises(UserError, match=r"does not fit the model: it has a wrong shape|none of|lacks"):
            other = module.clone(tower=VIT.clone(mlp_dim=48)) if kind == "dino" else module.clone(mlp_dim=48)
            load(str(tmp_path), other, jax.eval_shape(other.init, jax.random.key(0), inputs))
