"""Published MaskFormers: folders of transformers, by both names of modules, with Swin and ResNet; what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.models.maskformer import MaskFormer, MaskFormerNet, QueryClassifier
from ovseg_jax.models.resnet import ResNet
from ovseg_jax.models.small import SmallBackbone
from ovseg_jax.models.swin import Swin
from ovseg_jax.pretrained.files import write_safetensors
from ovseg_jax.pretrained.load import load
from ovseg_jax.pretrained.published import IMAGENET
from tests import reference
from tests.extras import require

SIZE, QUERIES, CLASSES = (64, 96), 5, 3
SWIN = Swin(width=16, depths=(1, 1, 1, 1), heads=(1, 2, 2, 4), window=3, window_rule="always", drop_rate=0.0)
RESNET = ResNet(stage_sizes=(1, 1, 1, 1), width=8)


def ours(backbone, **changes):
    options = dict(num_queries=QUERIES, width=32, mask_dim=16, layers=1, heads=4, ffn=24, dropout=0.0)
    net = MaskFormerNet(backbone, *IMAGENET, **{**options, **changes})
    return MaskFormer(net, QueryClassifier(CLASSES))


def theirs(transformers, kind):
    if kind == "swin":
        backbone = transformers.SwinConfig(
            embed_dim=16, depths=[1] * 4, num_heads=[1, 2, 2, 4], window_size=3, out_features=STAGES
        )
    else:
        backbone = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[32, 64, 128, 256], depths=[1] * 4, out_features=STAGES
        )
    decoder = transformers.DetrConfig(
        d_model=32,
        decoder_layers=1,
        decoder_attention_heads=4,
        encoder_attention_heads=4,
        decoder_ffn_dim=24,
        num_queries=QUERIES,
    )
    sizes = dict(fpn_feature_size=32, mask_feature_size=16, num_labels=CLASSES)
    config = transformers.MaskFormerConfig(backbone_config=backbone, decoder_config=decoder, **sizes)
    return reference.randomise(transformers.MaskFormerForInstanceSegmentation(config))


STAGES = ["stage1", "stage2", "stage3", "stage4"]


def hub_name(name):
    """Of a module of transformers 5: its name in the files on the hub."""
    if "transformer_module" in name:
        return name.replace("o_proj", "out_proj").replace(".mlp.fc", ".fc")
    for now, then in (
        *((f"attention.{x[0]}_proj", f"attention.self.{x}") for x in ("query", "key", "value")),
        ("attention.relative_position_bias.", "attention.self."),
        ("attention.o_proj", "attention.output.dense"),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    ):
        name = name.replace(now, then)
    return name


def written(folder, original, names=lambda name: name, **changes):
    state = {names(name): value.detach().numpy() for name, value in original.state_dict().items()}
    write_safetensors(folder / "model.safetensors", state | changes)
    (folder / "config.json").write_text(original.config.to_json_string(use_diff=False))
    pixels = dict(image_mean=IMAGENET.mean, image_std=IMAGENET.std)
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return state


def read(folder, model, pixels=IMAGENET):
    inputs = jnp.zeros((1, *SIZE, 3), jnp.uint8), jnp.asarray([SIZE])
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return load(str(folder), model, shapes, pixels=tuple(pixels))


@pytest.mark.parametrize("kind", ["swin", "resnet"])
def test_a_folder_of_hugging_face(tmp_path, kind):
    torch, transformers = require("torch"), require("transformers")
    original, model = theirs(transformers, kind), ours(SWIN if kind == "swin" else RESNET)
    original.save_pretrained(tmp_path)
    variables = read(tmp_path, model)
    written(tmp_path, original, hub_name)
    again = read(tmp_path, model)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again, variables)))
    image = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), dtype=np.uint8)
    out, logits = jax.jit(model.apply)(variables, jnp.asarray(image), jnp.asarray([SIZE] * 2))
    pixels = (image / np.float32(255) - np.float32(IMAGENET.mean)) / np.float32(IMAGENET.std)
    with torch.no_grad():
        expected = original(reference.torch_images(pixels))
    errors = [
        reference.relative_error(out.mask_logits[:, 0], expected.masks_queries_logits),
        reference.relative_error(logits[:, 0], expected.class_queries_logits),
    ]
    print(f"MaskFormer {kind} max relative error {max(errors):.1e}")
    assert max(errors) < 1e-4


def test_every_name_of_a_file_is_used_or_refused(tmp_path):
    transformers = require("transformers")
    original = theirs(transformers, "swin")
    state = written(tmp_path, original, **{"model.transformer_module.extra.weight": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match=r"1 names \(model\.transformer_module\.extra\.weight\)"):
        read(tmp_path, ours(SWIN))
    left = dict(state)
    del left["class_predictor.bias"], left["model.pixel_level_module.decoder.fpn.layers.1.proj.1.weight"]
    write_safetensors(tmp_path / "model.safetensors", left)
    with pytest.raises(UserError, match=r"lateral_norm_c3/scale.*classifier/dense/bias|classifier.*c3/scale"):
        read(tmp_path, ours(SWIN))


def test_another_model_is_refused(tmp_path):
    transformers = require("transformers")
    original = theirs(transformers, "swin")
    written(tmp_path, original)
    with pytest.raises(UserError, match="its decoder_heads is 4, but this model's is 2"):
        read(tmp_path, ours(SWIN, heads=2))
    with pytest.raises(UserError, match="the mean of pixels is"):
        read(tmp_path, ours(SWIN), ((0.5,) * 3, (0.5,) * 3))
    with pytest.raises(UserError, match="net/layer_1"):
        read(tmp_path, ours(SWIN, layers=2))
    with pytest.raises(UserError, match="have a Swin or ResNet as backbone, not a SmallBackbone"):
        read(tmp_path, ours(SmallBackbone(levels=4)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mask2former"}))
    with pytest.raises(UserError, match="its model_type is 'mask2former', but transformers' MaskFormer has"):
        read(tmp_path, ours(SWIN))


@pytest.mark.parametrize(
    "name,classes,sizes",
    [
        ("swin_small", 150, dict(embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24])),
        ("swin_base_384", 133, dict(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32])),
    ],
)
def test_published_sizes_have_the_shapes_of_hugging_face(name, classes, sizes):
    """Those of facebook/maskformer-swin-small-ade and -base-coco."""
    torch, transformers = require("torch"), require("transformers")
    from ovseg_jax.models.backbones import build_backbone
    from ovseg_jax.pretrained.maskformer import from_hf_maskformer
    from ovseg_jax.pretrained.rename import fit, rename

    window = 12 if "384" in name else 7
    backbone = transformers.SwinConfig(**sizes, window_size=window, out_features=STAGES)
    config = transformers.MaskFormerConfig(
        backbone_config=backbone, decoder_config=transformers.DetrConfig(), num_labels=classes
    )
    with torch.device("meta"):
        original = transformers.MaskFormerForInstanceSegmentation(config)
    state = {k: np.broadcast_to(np.float32(0), tuple(v.shape)) for k, v in original.state_dict().items()}
    net = MaskFormerNet(build_backbone(dict(name=name)), *IMAGENET)
    model = MaskFormer(net, QueryClassifier(classes))
    inputs = jnp.zeros((1, 64, 64, 3), jnp.uint8), jnp.asarray([[64, 64]])
    fit(rename(state, from_hf_maskformer(net)), jax.eval_shape(model.init, jax.random.key(0), *inputs))
