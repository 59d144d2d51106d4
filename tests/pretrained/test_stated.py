"""Weights whose names and shapes fit and that compute something else: what lies beside them tells."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.models.backbones import build_backbone
from ovseg_jax.models.efficientnet import EfficientNet
from ovseg_jax.models.eva import Eva
from ovseg_jax.models.resnet import ResNet
from ovseg_jax.models.swin import Swin
from ovseg_jax.models.text_towers import Bert, CLIPText, SiglipText, text_tower
from ovseg_jax.models.vit import ViT
from ovseg_jax.pretrained.files import write_safetensors
from ovseg_jax.pretrained.hf_clip import write_hf_clip
from ovseg_jax.pretrained.load import load
from ovseg_jax.pretrained.stated import check, check_pixels
from ovseg_jax.pretrained.to_torch import describe, to_torch
from ovseg_jax.towers.clip import Clip
from ovseg_jax.vocab.words import WordList
from tests.extras import require

VIT = ViT(patch=8, width=128, depth=1, heads=2, mlp_dim=64, grid=(2, 2))
CLIP_VIT = VIT.clone(pre_norm=True, activation="quick_gelu", epsilon=1e-5, embed_dim=16, head_bias=False)
TEXT = CLIPText(vocab_size=60, length=12, width=128, layers=1, heads=2, embed_dim=16)
OPEN_CLIP, OPENAI = "OpenAI's or open_clip's CLIP", ["input_resolution", "visual.proj"]


def said(tmp_path, config, module, format_, names=(), file="config.json"):
    (tmp_path / file).write_text(config if isinstance(config, str) else json.dumps(config))
    check(tmp_path / "model.safetensors", module, format_, names)


def zeros(module, *inputs):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes), shapes


@pytest.mark.parametrize("config", [{"architecture": "efficientnet_b0", "num_classes": 7}, None])
def test_an_efficientnet_of_other_padding_is_refused(tmp_path, config):
    torch, timm = require("torch"), require("timm")
    with torch.device("meta"):
        original = timm.create_model("efficientnet_b0")
    arrays = {k: np.zeros(v.shape, np.float32) for k, v in original.state_dict().items()}
    write_safetensors(tmp_path / "model.safetensors", arrays)
    module = build_backbone({"name": "efficientnet_b0"})
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    if config is None:
        expected = r"model.safetensors: it is unclear which of timm's models it is"
    else:
        (tmp_path / "config.json").write_text(json.dumps(config))
        expected = r"config.json: its architecture 'efficientnet_b0' is not supported \(tf_"
    with pytest.raises(UserError, match=expected):
        load(str(tmp_path), module, shapes)
    for name in ("tf_efficientnet_b0.ns_jft_in1k", "tf_efficientnet_b0_ns"):
        (tmp_path / "config.json").write_text(json.dumps({"architecture": name}))
        load(str(tmp_path), module, shapes)


@pytest.mark.parametrize(
    "format_,module,good,bad",
    [
        ("torchvision's or timm's ResNet", ResNet(), "resnet50.a1_in1k", "resnetaa50.a1h_in1k"),
        ("torchvision's or timm's ResNet", ResNet(), "tv_resnet101", "resnetblur50"),
        ("timm's ViT", VIT, "vit_small_patch16_224.dino", "vit_base_patch16_clip_quickgelu_224"),
        ("timm's ViT", CLIP_VIT, "vit_base_patch16_clip_quickgelu_224", "vit_base_patch16_clip_224"),
        ("timm's EVA", Eva(rope_grid=16), "eva02_base_patch16_clip_224", "eva02_enormous_patch14_clip_224"),
        ("timm's EVA", Eva(post_norm=True), "eva02_enormous_patch14_clip_224", "eva_giant_patch14_clip_224"),
    ],
)
def test_timms_architectures(tmp_path, format_, module, good, bad):
    said(tmp_path, {"architecture": good}, module, format_)
    with pytest.raises(
        UserError, match=r"config.json: its (architecture|activation|epsilon|post_norm|rope_grid)"
    ):
        said(tmp_path, {"architecture": bad}, module, format_)


def test_heads_of_timm(tmp_path):
    config = {"architecture": "vit_base_patch16_224", "num_features": 128}
    said(tmp_path, config, VIT, "timm's ViT")
    with pytest.raises(UserError, match="its heads is 2, but this model's is 4"):
        said(tmp_path, config, VIT.clone(heads=4), "timm's ViT")


@pytest.mark.parametrize(
    "module,format_,config,wrong",
    [
        (CLIP_VIT, "CLIP", dict(model_type="clip", vision_config=dict(num_attention_heads=2)), "hidden_act"),
        (TEXT, "CLIP", dict(model_type="clip", text_config=dict(num_attention_heads=2)), "hidden_act"),
        (VIT, "ViT", dict(model_type="vit", num_attention_heads=2), "layer_norm_eps"),
        (VIT, "ViT", dict(model_type="vit_mae", num_attention_heads=2), "num_attention_heads"),
        (Bert(), "BERT", dict(model_type="bert"), "model_type"),
        (SiglipText(), "SigLIP", dict(model_type="siglip", text_config={}), "hidden_act"),
        (ResNet(), "ResNet", dict(model_type="resnet"), "downsample_in_bottleneck"),
        (EfficientNet(), "EfficientNet", dict(model_type="efficientnet"), "batch_norm_eps"),
        (Swin(), "Swin", dict(model_type="swin"), "hidden_act"),
    ],
)  # fmt: skip
def test_transformers_configs(tmp_path, module, format_, config, wrong):
    said(tmp_path, config, module, f"transformers' {format_}")
    other = dict(
        hidden_act="relu" if format_ != "ResNet" else "gelu",
        layer_norm_eps=1e-3,
        num_attention_heads=4,
        model_type="roberta",
        downsample_in_bottleneck=True,
        batch_norm_eps=1e-5,
    )[wrong]
    inner = next((part for name, part in config.items() if name.endswith("_config")), config)
    inner[wrong] = other
    with pytest.raises(UserError, match=f"config.json: its .*{other!r}"):
        said(tmp_path, config, module, f"transformers' {format_}")


@pytest.mark.parametrize(
    "changes,expected",
    [
        ({}, "its activation is 'gelu', but this model's is 'quick_gelu'"),
        (dict(quick_gelu=True, text_cfg=dict(heads=4)), "its heads is 4"),
        (dict(quick_gelu=True, text_cfg=dict(heads=2, no_causal_mask=True)), "its causal is False"),
        (dict(quick_gelu=True, text_cfg=dict(heads=2, pool_type="last")), "its pool is 'last'"),
        (dict(quick_gelu=True, text_cfg=dict(heads=2, norm_kwargs=dict(eps=1e-6))), "its epsilon is 1e-06"),
        (dict(text_cfg=dict(hf_model_name="roberta-base")), "its text tower is 'roberta-base'"),
        (dict(quick_gelu=True, text_cfg=dict(heads=2)), ""),
    ],
)
def test_open_clips_configs(tmp_path, changes, expected):
    config = {"model_cfg": {"embed_dim": 16, "text_cfg": {"heads": 2}} | changes}
    if not expected:
        return said(tmp_path, config, TEXT, OPEN_CLIP, file="open_clip_config.json")
    with pytest.raises(UserError, match=f"open_clip_config.json: {expected}"):
        said(tmp_path, config, TEXT, OPEN_CLIP, file="open_clip_config.json")


def test_openais_archives_have_their_activation_and_other_bare_files_are_said(tmp_path, caplog):
    path = tmp_path / "ViT-B-16.pt"
    with pytest.raises(UserError, match="its activation is 'quick_gelu', but this model's is 'gelu'"):
        check(path, CLIP_VIT.clone(activation="gelu"), OPEN_CLIP, OPENAI)
    check(path, CLIP_VIT, OPEN_CLIP, OPENAI)
    assert not caplog.records
    check(path, CLIP_VIT, OPEN_CLIP, ["visual.proj"])
    assert "ViT-B-16.pt does not state its activation" in caplog.text


def test_our_own_files_say_all_fields(tmp_path):
    x = np.zeros((1, 16, 16, 3), np.float32)
    variables, shapes = zeros(VIT, x)
    flat = {
        "/".join(p.key for p in path): leaf for path, leaf in jax.tree.leaves_with_path(variables["params"])
    }
    write_safetensors(tmp_path / "model.safetensors", to_torch(flat))
    (tmp_path / "config.json").write_text(json.dumps(describe(VIT)))
    load(str(tmp_path), VIT, shapes)
    with pytest.raises(UserError, match="its activation is 'gelu', but this model's is 'quick_gelu'"):
        load(str(tmp_path), VIT.clone(activation="quick_gelu"), shapes)


@pytest.mark.parametrize(
    "config", ["", "[1]", "{", '{"model_type": 3}', '{"model_type": "clip", "text_config": 7}', '{"architecture": []}',
               '{"model_cfg": [2]}', '{"model_cfg": {"text_cfg": 1}}', "[" * 100_000, "\udcff"]
)  # fmt: skip
def test_damaged_configs(tmp_path, config):
    (tmp_path / "config.json").write_bytes(config.encode("utf-8", "surrogateescape"))
    for module, format_ in ((TEXT, OPEN_CLIP), (TEXT, "transformers' CLIP"), (VIT, "timm's ViT")):
        try:
            check(tmp_path / "model.safetensors", module, format_, ())
        except UserError as error:
            assert str(error).startswith(f"{tmp_path / 'config.json'}")
    if not config.startswith("{"):
        with pytest.raises(UserError, match=r"config.json cannot be read"):
            check(tmp_path / "model.safetensors", TEXT, OPEN_CLIP, ())


@pytest.mark.parametrize(
    "file,config",
    [
        ("config.json", {"architecture": "x", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}),
        ("open_clip_config.json", {"model_cfg": {}, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}),
        ("preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}),
    ],
)
def test_pixels(tmp_path, file, config):
    (tmp_path / file).write_text(json.dumps(config))
    check_pixels(tmp_path / "x.safetensors", [0.5] * 3, [0.5] * 3)
    with pytest.raises(UserError, match=rf"{file}: the std of pixels is \[0.5, 0.5, 0.5\]"):
        check_pixels(tmp_path / "x.safetensors", [0.5] * 3, [0.25] * 3)
    check_pixels(tmp_path / "elsewhere" / "x.safetensors", [0.5] * 3, [0.25] * 3)


def test_towers_compare_their_pixels(tmp_path):
    image, text = (
        zeros(*x)[0]["params"] for x in ((CLIP_VIT, np.zeros((1, 16, 16, 3))), (TEXT, np.zeros((1, 2), int)))
    )
    flat = lambda tree: {"/".join(p.key for p in path): x for path, x in jax.tree.leaves_with_path(tree)}
    write_hf_clip(tmp_path, CLIP_VIT, TEXT, flat(image), flat(text))
    fields = lambda module: {k: v for k, v in describe(module).items() if k not in ("kind", "taps")}
    config = dict(
        image=dict(name="vit", **fields(CLIP_VIT)),
        text=dict(name="clip", **fields(TEXT)),
        image_size=16,
        init=str(tmp_path),
    )
    Clip(ConfigDict(config), WordList(("a",))).pretrained()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3}))
    with pytest.raises(UserError, match="the mean of pixels is"):
        Clip(ConfigDict(config), WordList(("a",))).pretrained()


@pytest.mark.parametrize(
    "name,image,text",
    [
        ("ViT-B-32-quickgelu", "clip_vitb32", "clip_vitb32"),
        ("ViT-H-14", "openclip_vith14", None),
        ("EVA02-B-16", "eva02_clip_b16", "eva02_clip_b16"),
        ("EVA02-L-14-336", "eva02_clip_l14_336", "eva02_clip_l14_336"),
        ("EVA02-E-14-plus", "eva02_clip_e14", "eva02_clip_e14_plus"),
        ("EVA01-g-14", "eva01_clip_g14", "eva01_clip_g14"),
        ("ViT-B-16-SigLIP", "siglip_vitb16", "siglip_base"),
        ("ViT-SO400M-14-SigLIP-384", "siglip_so400m14_384", "siglip_so400m"),
        ("ViT-L-16-SigLIP2-256", "siglip_vitl16_256", "siglip2_large"),
    ],
)
def test_the_presets_are_what_open_clip_says(tmp_path, name, image, text):
    config = {"model_cfg": require("open_clip").get_model_config(name)}
    for preset, build in ((image, tower), (text, text_tower)):
        if preset is None:
            continue
        module = build(preset)
        format_ = {ViT: OPEN_CLIP, Eva: "timm's EVA", CLIPText: OPEN_CLIP, SiglipText: "open_clip's SigLIP"}
        kind = "timm's ViT" if preset.startswith("siglip") else format_[type(module)]
        kind = format_[SiglipText] if isinstance(module, SiglipText) else kind
        said(tmp_path, config, module, kind, file="open_clip_config.json")
        wrong = dict(heads=1)
        if isinstance(module, ViT):
            wrong = dict(epsilon=1e-3)
        elif isinstance(module, Eva):
            wrong = dict(post_norm=not module.post_norm)
        with pytest.raises(UserError, match=r"open_clip_config.json: its (heads|epsilon|post_norm) is"):
            said(tmp_path, config, module.clone(**wrong), kind, file="open_clip_config.json")


def tower(preset):
    return build_backbone({"name": preset}).tower


def test_each_library_has_its_own_file(tmp_path):
    """A folder of the hub with a model by transformers' names and by open_clip's."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "clip", "vision_config": {"num_attention_heads": 2}}'
    )
    model = {"quick_gelu": False, "vision_cfg": {"width": 128}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    path = tmp_path / "model.safetensors"
    check(path, CLIP_VIT, "transformers' CLIP", ())
    check(path, CLIP_VIT.clone(activation="gelu"), OPEN_CLIP, ())
    with pytest.raises(UserError, match=r"/config.json: its activation is 'quick_gelu'"):
        check(path, CLIP_VIT.clone(activation="gelu"), "transformers' CLIP", ())
