"""Names of published MaskFormers, in transformers' format, for `models.maskformer`."""

import flax.linen as nn

from ovseg_jax.errors import UserError
from ovseg_jax.models.maskformer import MaskFormerNet
from ovseg_jax.models.resnet import ResNet
from ovseg_jax.models.swin import Swin
from ovseg_jax.pretrained.rename import (
    Rename,
    conv,
    heads_in,
    heads_out,
    inside,
    linear,
    norm,
    pointwise,
)
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
        *linear(rf"{fpn}mask_projection", f"params/net/{head}/mask_features", conv),
    ]
    for i, level in enumerate(LEVELS):
        # The coarsest level is the stem, which has no lateral convolution.
        theirs = rf"{fpn}fpn\.layers\.{i - 1}" if i else rf"{fpn}fpn\.stem"
        block = rf"{theirs}\.block" if i else theirs
        renames += linear(rf"{block}\.0", f"params/net/{head}/output_c{level}", conv)
        renames += norm(rf"{block}\.1", f"params/net/{head}/output_norm_c{level}")
        renames += linear(rf"{theirs}\.proj\.0", f"params/net/{head}/lateral_c{level}", conv)
        renames += norm(rf"{theirs}\.proj\.1", f"params/net/{head}/lateral_norm_c{level}")
    renames += [
        Rename(rf"{transformer}queries_embedder\.weight", "params/net/queries"),
        *linear(rf"{transformer}input_projection", "params/net/input_projection", pointwise),
        *norm(rf"{transformer}decoder\.layernorm", "params/net/decoder_norm"),
    ]
    theirs, ours = rf"{transformer}decoder\.layers\.(\d+)", r"layer_\1"
    split, join = heads_in(net.heads), heads_out(net.heads)
    for name, target in (("self_attn", "self_attention"), ("encoder_attn", "cross_attention")):
        for part in ("query", "key", "value"):
            pattern, path = rf"{theirs}\.{name}\.{part[0]}_proj", f"params/net/{ours}/{target}/{part}"
            renames += linear(pattern, path, split)
        renames += linear(rf"{theirs}\.{name}\.(?:out|o)_proj", f"params/net/{ours}/{target}/out", join)
    renames += norm(rf"{theirs}\.self_attn_layer_norm", f"params/net/{ours}/self_norm")
    renames += norm(rf"{theirs}\.encoder_attn_layer_norm", f"params/net/{ours}/cross_norm")
    renames += norm(rf"{theirs}\.final_layer_norm", f"params/net/{ours}/mlp_norm")
    renames += linear(rf"{theirs}\.(?:mlp\.)?fc1", f"params/net/{ours}/mlp_in")
    renames += linear(rf"{theirs}\.(?:mlp\.)?fc2", f"params/net/{ours}/mlp_out")
    renames += linear(r"mask_embedder\.(\d)\.0", r"params/net/mask_mlp_\1")
    return [
        *renames,
        *linear("class_predictor", "params/classifier/dense"),
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
