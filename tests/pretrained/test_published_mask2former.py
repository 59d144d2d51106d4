"""Published Mask2Formers: folders of transformers, and the authors' names; what is refused."""

import json
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ovseg_jax.errors import UserError
from ovseg_jax.models.mask2former import Mask2FormerHead, Mask2FormerNet
from ovseg_jax.models.maskformer import MaskFormer, QueryClassifier
from ovseg_jax.models.resnet import ResNet
from ovseg_jax.models.small import SmallBackbone
from ovseg_jax.pretrained.published import IMAGENET
from tests import reference
from tests.extras import require
from tests.models.test_mask2former import CLASSES, HEAD, our_model, randomised
from tests.pretrained.test_published_maskformer import SIZE, hub_name, read, written

# The authors' names, by transformers'. Projections of q, k and v are joined below.
DECODER = r"transformer_module\.decoder\.layers\.(\d+)\."
AUTHORS = (
    (r"model\.pixel_level_module\.encoder\.", "backbone."),
    (r"backbone\.swin\.", "backbone."),
    (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"embeddings\.norm", "patch_embed.norm"),
    (r"backbone\.encoder\.", "backbone."),
    (r"hidden_states_norms\.(?:stage)?(\d)", lambda match: f"norm{int(match[1]) - 1}"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    (r"attention\.relative_position_bias\.", "attn."),
    (r"attention\.o_proj", "attn.proj"),
    (r"attention\.q_proj\.", "attn.qkv."),
    (r"model\.pixel_level_module\.decoder\.", "sem_seg_head.pixel_decoder."),
    (r"pixel_decoder\.(encoder\.|level_embed)", r"pixel_decoder.transformer.\1"),
    ("input_projections", "input_proj"),
    ("mask_projection", "mask_features"),
    (r"(adapter_1|layer_1)\.0", r"\1"),
    (r"(adapter_1|layer_1)\.1", r"\1.norm"),
    (r"(transformer\.encoder\.layers\.\d+\.)self_attn_layer_norm", r"\1norm1"),
    (r"(transformer\.encoder\.layers\.\d+\.)final_layer_norm", r"\1norm2"),
    (r"(transformer\.encoder\.layers\.\d+\.)fc", r"\1linear"),
    (rf"{DECODER}self_attn\.q_proj\.", r"transformer_self_attention_layers.\1.self_attn.in_proj_"),
    (rf"{DECODER}self_attn\.", r"transformer_self_attention_layers.\1.self_attn."),
    (rf"{DECODER}self_attn_layer_norm", r"transformer_self_attention_layers.\1.norm"),
    (rf"{DECODER}cross_attn\.", r"transformer_cross_attention_layers.\1.multihead_attn."),
    (rf"{DECODER}cross_attn_layer_norm", r"transformer_cross_attention_layers.\1.norm"),
    (rf"{DECODER}fc", r"transformer_ffn_layers.\1.linear"),
    (rf"{DECODER}final_layer_norm", r"transformer_ffn_layers.\1.norm"),
    (r"transformer_module\.decoder\.layernorm", "decoder_norm"),
    (r"transformer_module\.decoder\.mask_predictor\.mask_embedder\.(\d)\.0", r"mask_embed.layers.\1"),
    (r"transformer_module\.", ""),
    ("queries_embedder", "query_embed"),
    ("queries_features", "query_feat"),
    ("class_predictor", "model.class_embed"),
    (r"^model\.", "sem_seg_head.predictor."),
)


def by_the_authors(state):
    found = {}
    for name, x in state.items():
        if re.search(r"\.[kv]_proj\.|swin\.layernorm", name):
            continue
        if ".q_proj." in name:
            x = np.concatenate([state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
        for pattern, other in AUTHORS:
            name = re.sub(pattern, other, name)
        found[name] = x
    return found


def test_a_folder_of_hugging_face_and_a_file_of_the_authors(tmp_path):
    torch, transformers = require("torch"), require("transformers")
    original, model = randomised(transformers), our_model()
    net = Mask2FormerNet(model.net.backbone, *IMAGENET, model.net.head)
    model = MaskFormer(net, model.classifier)
    original.save_pretrained(tmp_path)
    variables = read(tmp_path, model)
    written(tmp_path, original, hub_name_of_backbone)
    same = lambda again: all(jax.tree.leaves(jax.tree.map(np.array_equal, again, variables)))
    assert same(read(tmp_path, model))
    theirs = by_the_authors({k: v.detach().numpy() for k, v in original.state_dict().items()})
    layer = "sem_seg_head.predictor.transformer_{}_attention_layers.3.{}.in_proj_weight"
    for name in (
        "backbone.layers.1.blocks.1.attn.qkv.weight",
        "backbone.norm3.bias",
        "backbone.layers.2.downsample.reduction.weight",
        "sem_seg_head.pixel_decoder.transformer.encoder.layers.1.self_attn.sampling_offsets.bias",
        "sem_seg_head.pixel_decoder.layer_1.norm.weight",
        "sem_seg_head.predictor.query_feat.weight",
        "sem_seg_head.predictor.class_embed.weight",
        layer.format("self", "self_attn"),
        layer.format("cross", "multihead_attn"),
    ):
        assert name in theirs, name
    for name in tmp_path.iterdir():
        name.unlink()
    torch.save({"model": {k: torch.from_numpy(x.copy()) for k, x in theirs.items()}}, tmp_path / "model.pth")
    assert same(read(tmp_path / "model.pth", model))
    image = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), dtype=np.uint8)
    out, logits = jax.jit(model.apply)(variables, jnp.asarray(image), jnp.asarray([SIZE] * 2))
    pixels = (image / np.float32(255) - np.float32(IMAGENET.mean)) / np.float32(IMAGENET.std)
    with torch.no_grad():
        expected = original(reference.torch_images(pixels))
    errors = [
        reference.relative_error(out.mask_logits[:, 0], expected.masks_queries_logits),
        reference.relative_error(logits[:, 0], expected.class_queries_logits),
    ]
    print(f"Mask2Former max relative error {max(errors):.1e}")
    assert max(errors) < 1e-4


def test_a_pickle_of_the_authors_with_a_resnet(tmp_path):
    """detectron2's names of a ResNet, by torchvision's of the same arrays, and the head of the test above."""
    transformers = require("transformers")
    resnet = ResNet(
        stage_sizes=(1, 2, 1, 1), width=4, norm="frozen"
    )  # its maps have as many channels as the Swin's
    shapes = jax.eval_shape(resnet.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    rng, flat = np.random.default_rng(0), flatten_dict(shapes, sep="/")
    ours = {path: rng.normal(0, 1, x.shape).astype(np.float32) for path, x in flat.items()}
    ends = {
        "kernel": "weight",
        "scale": "weight",
        "bias": "bias",
        "mean": "running_mean",
        "var": "running_var",
    }
    backbone = {}
    for path, x in ours.items():
        *_, block, part, end = ("stem", *path.split("/")[1:])[-3:]
        stage, _, number = block.removeprefix("layer").partition("_")
        base = "stem" if block == "stem" else f"res{int(stage) + 1}.{number}"
        module = part.replace("downsample_conv", "shortcut").replace("downsample_norm", "shortcut.norm")
        module = re.sub(r"^norm(\d)", r"conv\1.norm", module)
        # PyTorch has the channels of the result first.
        backbone[f"backbone.{base}.{module}.{ends[end]}"] = x.transpose(3, 2, 0, 1) if x.ndim == 4 else x
    for name in (
        "backbone.stem.conv1.norm.running_var",
        "backbone.res2.0.shortcut.norm.weight",
        "backbone.res3.1.conv3.weight",
    ):
        assert name in backbone
    state = by_the_authors({k: v.detach().numpy() for k, v in randomised(transformers).state_dict().items()})
    state = {name: x for name, x in state.items() if not name.startswith("backbone.")} | backbone
    file = tmp_path / "model_final.pkl"
    file.write_bytes(pickle.dumps({"model": state, "__author__": "the authors"}, protocol=2))
    model = MaskFormer(Mask2FormerNet(resnet, *IMAGENET, our_model().net.head), our_model().classifier)
    found = read(file, model)
    again = {
        f"{name}/{path}": x
        for name, tree in found.items()
        for path, x in flatten_dict(tree["net"]["backbone"] if "net" in tree else tree, sep="/").items()
    }
    assert again.keys() == ours.keys()
    for path, x in ours.items():
        np.testing.assert_array_equal(again[path], x)


def hub_name_of_backbone(name):
    """Of a module of transformers 5: its name in the files on the hub."""
    return hub_name(name) if "pixel_level_module.encoder" in name else name


def test_another_model_is_refused(tmp_path):
    transformers = require("transformers")
    original, model = randomised(transformers), our_model()

    def changed(backbone=model.net.backbone, **head):
        net = Mask2FormerNet(backbone, *IMAGENET, Mask2FormerHead(**HEAD | head))
        return MaskFormer(net, QueryClassifier(CLASSES))

    written(tmp_path, original, **{"model.transformer_module.extra.weight": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match=r"1 names \(model\.transformer_module\.extra\.weight\)"):
        read(tmp_path, changed())
    written(tmp_path, original)
    with pytest.raises(UserError, match="its decoder_heads is 4, but this model's is 2"):
        read(tmp_path, changed(heads=2))
    with pytest.raises(UserError, match=r"head/decoder/layer_4"):
        read(tmp_path, changed(layers=5))
    with pytest.raises(UserError, match="have a Swin or ResNet as backbone, not a SmallBackbone"):
        read(tmp_path, changed(SmallBackbone(levels=4)))
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value, message in (
        ("pre_norm", True, "it has pre_norm"),
        ("model_type", "maskformer", "its model_type is 'maskformer', but transformers' Mask2Former has"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(UserError, match=message):
            read(tmp_path, changed())


@pytest.mark.parametrize(
    "name,classes,queries,sizes",
    [
        ("swin_tiny", 80, 100, dict(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24])),
        ("swin_large_384", 133, 200, dict(embed_dim=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48])),
    ],
)
def test_published_sizes_have_the_shapes_of_hugging_face(name, classes, queries, sizes):
    """Those of facebook/mask2former-swin-tiny-coco-instance and -swin-large-coco-panoptic."""
    torch, transformers = require("torch"), require("transformers")
    from ovseg_jax.models.backbones import build_backbone
    from ovseg_jax.pretrained.mask2former import from_hf_mask2former
    from ovseg_jax.pretrained.rename import fit, rename

    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = transformers.SwinConfig(**sizes, window_size=12 if "384" in name else 7, out_features=stages)
    config = transformers.Mask2FormerConfig(backbone_config=backbone, num_labels=classes, num_queries=queries)
    with torch.device("meta"):
        original = transformers.Mask2FormerForUniversalSegmentation(config)
    state = {k: np.broadcast_to(np.float32(0), tuple(v.shape)) for k, v in original.state_dict().items()}
    net = Mask2FormerNet(build_backbone(dict(name=name)), *IMAGENET, Mask2FormerHead(num_queries=queries))
    model = MaskFormer(net, QueryClassifier(classes))
    inputs = jnp.zeros((1, 64, 64, 3), jnp.uint8), jnp.asarray([[64, 64]])
    fit(rename(state, from_hf_mask2former(net)), jax.eval_shape(model.init, jax.random.key(0), *inputs))
