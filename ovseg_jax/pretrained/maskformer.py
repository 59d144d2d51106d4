"""Names of published MaskFormers, in transformers' format, for `models.maskformer`."""

from collections.abc import Iterable

import flax.linen as nn

from ovseg_jax.errors import UserError
from ovseg_jax.models.maskformer import MaskFormerNet
from ovseg_jax.models.resnet import ResNet
from ovseg_jax.models.swin import Swin
from ovseg_jax.pretrained.rename import Layout, Rename, conv, dense, heads_in, heads_out
from ovseg_jax.pretrained.resnet import from_hf_resnet
from ovseg_jax.pretrained.swin import from_hf_swin

LEVELS = (5, 4, 3, 2)  # of the FPN, in the order of their names


def from_hf_maskformer(net: MaskFormerNet) -> list[Rename]:
    """Returns the renames of MaskFormerForInstanceSegmentation with such a network; the classifier is `classifier`.

    Both names inside of a layer are read: those of the files on the hub, and those of modules since transformers 5.

    Raises:
      UserError: no published MaskFormer has such a backbone.
    """
    pixel, transformer = r"model\.pixel_level_module\.", r"model\.transformer_module\."
    fpn, head = rf"{pixel}decoder\.", "pixel_decoder"
    renames = [
        *inside(backbone_renames(net.backbone), rf"{pixel}encoder\.(?:model\.)?", "net/backbone"),
        *layer(rf"{fpn}mask_projection", f"{head}/mask_features", conv),
    ]
    for i, level in enumerate(LEVELS):
        # The coarsest level is the stem, which has no lateral convolution.
        theirs = rf"{fpn}fpn\.layers\.{i - 1}" if i else rf"{fpn}fpn\.stem"
        block = rf"{theirs}\.block" if i else theirs
        renames += layer(rf"{block}\.0", f"{head}/output_c{level}", conv)
        renames += norm(rf"{block}\.1", f"{head}/output_norm_c{level}")
        renames += layer(rf"{theirs}\.proj\.0", f"{head}/lateral_c{level}", conv)
        renames += norm(rf"{theirs}\.proj\.1", f"{head}/lateral_norm_c{level}")
    renames += [
        Rename(rf"{transformer}queries_embedder\.weight", "params/net/queries"),
        *layer(rf"{transformer}input_projection", "input_projection", lambda x: dense(x[:, :, 0, 0])),
        *norm(rf"{transformer}decoder\.layernorm", "decoder_norm"),
    ]
    theirs, ours = rf"{transformer}decoder\.layers\.(\d+)", r"layer_\1"
    split, join = heads_in(net.heads), heads_out(net.heads)
    for name, target in (("self_attn", "self_attention"), ("encoder_attn", "cross_attention")):
        for part in ("query", "key", "value"):
            pattern, path = rf"{theirs}\.{name}\.{part[0]}_proj", f"params/net/{ours}/{target}/{part}"
            renames += [
                Rename(rf"{pattern}\.weight", f"{path}/kernel", split),
                Rename(rf"{pattern}\.bias", f"{path}/bias", split),
            ]
        renames += layer(rf"{theirs}\.{name}\.(?:out|o)_proj", f"{ours}/{target}/out", join)
    renames += norm(rf"{theirs}\.self_attn_layer_norm", f"{ours}/self_norm")
    renames += norm(rf"{theirs}\.encoder_attn_layer_norm", f"{ours}/cross_norm")
    renames += norm(rf"{theirs}\.final_layer_norm", f"{ours}/mlp_norm")
    renames += layer(rf"{theirs}\.(?:mlp\.)?fc1", f"{ours}/mlp_in", dense)
    renames += layer(rf"{theirs}\.(?:mlp\.)?fc2", f"{ours}/mlp_out", dense)
    renames += layer(r"mask_embedder\.(\d)\.0", r"mask_mlp_\1", dense)
    return [
        *renames,
        Rename(r"class_predictor\.weight", "params/classifier/dense/kernel", dense),
        Rename(r"class_predictor\.bias", "params/classifier/dense/bias"),
        Rename(r"criterion\.empty_weight", ""),  # follows from the number of classes
    ]


def backbone_renames(backbone: nn.Module) -> list[Rename]:
    """Returns the renames of transformers' backbone.

    Raises:
      UserError: no published MaskFormer has such a backbone.
    """
    match backbone:
        case Swin(heads=heads):
            return from_hf_swin(heads, backbone=True)
        case ResNet():
            return from_hf_resnet()
    raise UserError(
        f"published MaskFormers have a Swin or ResNet as backbone, not a {type(backbone).__name__}"
    )


def inside(renames: Iterable[Rename], prefix: str, path: str) -> list[Rename]:
    """Returns renames of names behind a prefix (a regex) to paths inside of a module."""

    def target(ours: str) -> str:
        collection, _, rest = ours.partition("/")
        return f"{collection}/{path}/{rest}" if ours else ""

    return [Rename(prefix + r.pattern, target(r.target), r.layout) for r in renames]


def layer(pattern: str, target: str, layout: Layout, path: str = "net/") -> list[Rename]:
    """Returns the renames of weight and bias of a dense layer or convolution."""
    weight, bias = rf"{pattern}\.weight", rf"{pattern}\.bias"
    return [
        Rename(weight, f"params/{path}{target}/kernel", layout),
        Rename(bias, f"params/{path}{target}/bias"),
    ]


def norm(pattern: str, target: str, path: str = "net/") -> list[Rename]:
    """Returns the renames of weight and bias of a norm."""
    weight, bias = rf"{pattern}\.weight", rf"{pattern}\.bias"
    return [Rename(weight, f"params/{path}{target}/scale"), Rename(bias, f"params/{path}{target}/bias")]
