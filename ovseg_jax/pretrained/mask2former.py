"""Names of published Mask2Formers, for `models.mask2former`: transformers' and the authors' (detectron2's)."""

from collections.abc import Sequence

from ovseg_jax.errors import UserError
from ovseg_jax.models.mask2former import Mask2FormerNet
from ovseg_jax.models.resnet import ResNet
from ovseg_jax.models.swin import Swin
from ovseg_jax.pretrained.maskformer import backbone_renames
from ovseg_jax.pretrained.rename import (
    Rename,
    conv,
    dense,
    heads_in,
    heads_out,
    heads_qkv,
    inside,
    linear,
    norm,
)
from ovseg_jax.pretrained.resnet import from_detectron2_resnet
from ovseg_jax.pretrained.swin import from_microsoft_swin

# Name in the file, ours, kind of layer. The maps of the pixel decoder are numbered from the coarsest.
_Names = Sequence[tuple[str, str, str]]
_HF_PIXEL, _HF_DECODER = r"pixel_level_module\.decoder\.", r"transformer_module\."
_HF: _Names = [
    *((rf"{_HF_PIXEL}input_projections\.{i}\.0", f"pixel_decoder/input_c{5 - i}", "conv") for i in range(3)),
    *(
        (rf"{_HF_PIXEL}input_projections\.{i}\.1", f"pixel_decoder/input_norm_c{5 - i}", "norm")
        for i in range(3)
    ),
    (rf"{_HF_PIXEL}level_embed", "pixel_decoder/level_embedding", "array"),
    (rf"{_HF_PIXEL}mask_projection", "pixel_decoder/mask_features", "conv"),
    (rf"{_HF_PIXEL}adapter_1\.0", "pixel_decoder/lateral_c2", "conv"),
    (rf"{_HF_PIXEL}adapter_1\.1", "pixel_decoder/lateral_norm_c2", "norm"),
    (rf"{_HF_PIXEL}layer_1\.0", "pixel_decoder/output_c2", "conv"),
    (rf"{_HF_PIXEL}layer_1\.1", "pixel_decoder/output_norm_c2", "norm"),
    *(
        (rf"{_HF_PIXEL}encoder\.layers\.(\d+)\.{theirs}", rf"pixel_decoder/layer_\1/{ours}", kind)
        for theirs, ours, kind in (
            (r"self_attn\.sampling_offsets", "attention/offsets", "dense"),
            (r"self_attn\.attention_weights", "attention/weights", "dense"),
            (r"self_attn\.value_proj", "attention/value", "dense"),
            (r"self_attn\.output_proj", "attention/out", "dense"),
            ("self_attn_layer_norm", "attention_norm", "norm"),
            ("fc1", "mlp_in", "dense"),
            ("fc2", "mlp_out", "dense"),
            ("final_layer_norm", "mlp_norm", "norm"),
        )
    ),
    (rf"{_HF_DECODER}queries_embedder\.weight", "decoder/query_positions", "array"),
    (rf"{_HF_DECODER}queries_features\.weight", "decoder/query_features", "array"),
    (rf"{_HF_DECODER}level_embed\.weight", "decoder/level_embedding", "array"),
    (rf"{_HF_DECODER}decoder\.layernorm", "decoder/norm", "norm"),
    (
        rf"{_HF_DECODER}decoder\.mask_predictor\.mask_embedder\.(\d)\.0",
        r"decoder/mask_mlp_\1",
        "dense",
    ),
    *(
        (rf"{_HF_DECODER}decoder\.layers\.(\d+)\.{theirs}", rf"decoder/layer_\1/{ours}", kind)
        for theirs, ours, kind in (
            (r"self_attn\.q_proj", "self_attention/query", "in"),
            (r"self_attn\.k_proj", "self_attention/key", "in"),
            (r"self_attn\.v_proj", "self_attention/value", "in"),
            (r"self_attn\.out_proj", "self_attention/out", "out"),
            ("self_attn_layer_norm", "self_norm", "norm"),
            ("cross_attn", "cross_attention", "joint"),
            ("cross_attn_layer_norm", "cross_norm", "norm"),
            ("fc1", "mlp_in", "dense"),
            ("fc2", "mlp_out", "dense"),
            ("final_layer_norm", "mlp_norm", "norm"),
        )
    ),
]
_D2_PIXEL, _D2_DECODER = r"pixel_decoder\.", r"predictor\."
_D2: _Names = [
    *((rf"{_D2_PIXEL}input_proj\.{i}\.0", f"pixel_decoder/input_c{5 - i}", "conv") for i in range(3)),
    *((rf"{_D2_PIXEL}input_proj\.{i}\.1", f"pixel_decoder/input_norm_c{5 - i}", "norm") for i in range(3)),
    (rf"{_D2_PIXEL}transformer\.level_embed", "pixel_decoder/level_embedding", "array"),
    (rf"{_D2_PIXEL}mask_features", "pixel_decoder/mask_features", "conv"),
    (rf"{_D2_PIXEL}adapter_1", "pixel_decoder/lateral_c2", "conv"),
    (rf"{_D2_PIXEL}adapter_1\.norm", "pixel_decoder/lateral_norm_c2", "norm"),
    (rf"{_D2_PIXEL}layer_1", "pixel_decoder/output_c2", "conv"),
    (rf"{_D2_PIXEL}layer_1\.norm", "pixel_decoder/output_norm_c2", "norm"),
    *(
        (
            rf"{_D2_PIXEL}transformer\.encoder\.layers\.(\d+)\.{theirs}",
            rf"pixel_decoder/layer_\1/{ours}",
            kind,
        )
        for theirs, ours, kind in (
            (r"self_attn\.sampling_offsets", "attention/offsets", "dense"),
            (r"self_attn\.attention_weights", "attention/weights", "dense"),
            (r"self_attn\.value_proj", "attention/value", "dense"),
            (r"self_attn\.output_proj", "attention/out", "dense"),
            ("norm1", "attention_norm", "norm"),
            ("linear1", "mlp_in", "dense"),
            ("linear2", "mlp_out", "dense"),
            ("norm2", "mlp_norm", "norm"),
        )
    ),
    (rf"{_D2_DECODER}query_embed\.weight", "decoder/query_positions", "array"),
    # The second name is that of older files.
    (rf"{_D2_DECODER}(?:query_feat|static_query)\.weight", "decoder/query_features", "array"),
    (rf"{_D2_DECODER}level_embed\.weight", "decoder/level_embedding", "array"),
    (rf"{_D2_DECODER}decoder_norm", "decoder/norm", "norm"),
    (rf"{_D2_DECODER}mask_embed\.layers\.(\d)", r"decoder/mask_mlp_\1", "dense"),
    *(
        (rf"{_D2_DECODER}transformer_{theirs}", rf"decoder/layer_\1/{ours}", kind)
        for theirs, ours, kind in (
            (r"self_attention_layers\.(\d+)\.self_attn", "self_attention", "joint"),
            (r"self_attention_layers\.(\d+)\.norm", "self_norm", "norm"),
            (r"cross_attention_layers\.(\d+)\.multihead_attn", "cross_attention", "joint"),
            (r"cross_attention_layers\.(\d+)\.norm", "cross_norm", "norm"),
            (r"ffn_layers\.(\d+)\.linear1", "mlp_in", "dense"),
            (r"ffn_layers\.(\d+)\.linear2", "mlp_out", "dense"),
            (r"ffn_layers\.(\d+)\.norm", "mlp_norm", "norm"),
        )
    ),
]


def from_hf_mask2former(net: Mask2FormerNet) -> list[Rename]:
    """Returns the renames of Mask2FormerForUniversalSegmentation with such a network; the classifier is `classifier`.

    Raises:
      UserError: no published Mask2Former has such a backbone.
    """
    encoder = r"model\.pixel_level_module\.encoder\.(?:model\.)?"
    return [
        *inside(backbone_renames(net.backbone), encoder, "net/backbone"),
        *inside(_head(_HF, net.head.heads), r"model\.", "net/head"),
        *_classifier("class_predictor"),
    ]


def from_detectron2_mask2former(net: Mask2FormerNet) -> list[Rename]:
    """Returns the renames of the authors' checkpoints with a Swin or a ResNet.

    Raises:
      UserError: the backbone is another.
    """
    match net.backbone:
        case Swin(heads=heads):
            backbone = from_microsoft_swin(heads, "backbone.")
        case ResNet():
            backbone = from_detectron2_resnet(r"backbone\.")
        case other:
            raise UserError(f"Mask2Formers have a Swin or ResNet as backbone, not a {type(other).__name__}")
    return [
        *inside(backbone, "", "net/backbone"),
        *inside(from_detectron2_head(net.head.heads), r"sem_seg_head\.", "net/head"),
        *_classifier(r"sem_seg_head\.predictor\.class_embed"),
    ]


def from_detectron2_head(heads: int) -> list[Rename]:
    """Returns the renames of the authors' pixel decoder and decoder without class head, for `Mask2FormerHead`.

    Names begin with `pixel_decoder.` and `predictor.`: FC-CLIP's and others', too, behind `sem_seg_head.`.
    """
    return _head(_D2, heads)


def _head(names: _Names, heads: int) -> list[Rename]:
    renames: list[Rename] = []
    for theirs, ours, kind in names:
        match kind:
            case "array":
                renames.append(Rename(theirs, f"params/{ours}"))
            case "norm":
                renames += norm(theirs, f"params/{ours}")
            case "joint":
                for part, end in (("weight", "kernel"), ("bias", "bias")):
                    target = f"params/{ours}/{{}}/{end}"
                    renames.append(Rename(rf"{theirs}\.in_proj_{part}", target, heads_qkv(heads)))
                renames += linear(rf"{theirs}\.out_proj", f"params/{ours}/out", heads_out(heads))
            case "in":
                split = heads_in(heads)
                renames += linear(theirs, f"params/{ours}", split)
            case _:
                layout = {"conv": conv, "dense": dense, "out": heads_out(heads)}[kind]
                renames += linear(theirs, f"params/{ours}", layout)
    return renames


def _classifier(theirs: str) -> list[Rename]:
    # The weights of the loss follow from the number of classes.
    return [*linear(theirs, "params/classifier/dense"), Rename(r"criterion\.empty_weight", "")]
