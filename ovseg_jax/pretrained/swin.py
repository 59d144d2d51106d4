"""Names of published Swin Transformers, for `models.swin.Swin`: timm's, the authors' and transformers'.

`heads` are the model's, by stage. Classifiers have one final norm, our `out_norm5`: they fit a model with
out_norms=(5,), and one with more norms if `fit` may miss `out_norm[234]`.
"""

import re
from collections.abc import Sequence

from ovseg_jax.pretrained.rename import Rename, conv, dense, heads_in, heads_out, heads_qkv, linear, norm

# Ignored, since they follow from the sizes.
_INDICES = Rename(r".*(?:relative_position_index|attn_mask)", "")


def _merge(pattern: str, target: str) -> list[Rename]:
    return [
        *norm(rf"{pattern}\.norm", f"params/{target}/norm"),
        Rename(rf"{pattern}\.reduction\.weight", f"params/{target}/reduction/kernel", dense),
    ]


def _stem(prefix: str, proj: str, its_norm: str) -> list[Rename]:
    return [
        Rename(rf"{prefix}{proj}\.weight", "params/patch_embed/kernel", conv),
        Rename(rf"{prefix}{proj}\.bias", "params/patch_embed/bias"),
        *norm(rf"{prefix}{its_norm}", "params/patch_norm"),
    ]


def _timm_blocks(heads: Sequence[int], prefix: str = "") -> list[Rename]:
    renames = _stem(prefix, r"patch_embed\.proj", r"patch_embed\.norm")
    for stage, count in enumerate(heads):
        block, ours = rf"{prefix}layers\.{stage}\.blocks\.(\d+)", rf"stage{stage + 1}_\1"
        table = rf"{block}\.attn\.relative_position_bias_table"
        renames += [
            *norm(rf"{block}\.norm1", f"params/{ours}/norm1"),
            *norm(rf"{block}\.norm2", f"params/{ours}/norm2"),
            *linear(rf"{block}\.attn\.qkv", f"params/{ours}/attn/{{}}", heads_qkv(count)),
            *linear(rf"{block}\.attn\.proj", f"params/{ours}/attn/out", heads_out(count)),
            Rename(table, f"params/{ours}/attn/relative_position_bias"),
            *linear(rf"{block}\.mlp\.fc1", f"params/{ours}/fc1"),
            *linear(rf"{block}\.mlp\.fc2", f"params/{ours}/fc2"),
        ]
    return [*renames, _INDICES]


def from_timm_swin(heads: Sequence[int]) -> list[Rename]:
    """Returns the renames of timm's `swin_*` classifiers, where merging begins a stage (`layers.1.downsample`)."""
    renames = _timm_blocks(heads) + norm("norm", "params/out_norm5")
    for stage in range(1, len(heads)):
        renames += _merge(rf"layers\.{stage}\.downsample", f"merge{stage + 1}")
    return [*renames, Rename(r"head\..*", "")]


def from_microsoft_swin(heads: Sequence[int], prefix: str = "") -> list[Rename]:
    """Returns the renames of the authors' checkpoints, where merging ends a stage (`layers.0.downsample`).

    They are classifiers (`norm`), detectors, and Mask2Former's backbones (`norm0` to `norm3`, with a `prefix` such as
    "backbone.").
    """
    prefix = re.escape(prefix)
    renames = _timm_blocks(heads, prefix) + norm(rf"{prefix}norm", "params/out_norm5")
    for stage in range(len(heads)):
        renames += norm(rf"{prefix}norm{stage}", f"params/out_norm{stage + 2}")
    for stage in range(len(heads) - 1):
        renames += _merge(rf"{prefix}layers\.{stage}\.downsample", f"merge{stage + 2}")
    return [*renames, Rename(r"head\..*", "")]


def from_hf_swin(heads: Sequence[int], backbone: bool = False) -> list[Rename]:
    """Returns the renames of transformers' SwinModel, or with `backbone` of SwinBackbone, which has four norms.

    Both names inside of a block are read: those of the files on the hub, and those of modules since transformers 5.
    """
    top = r"(?:swin\.)?"
    renames = _stem(rf"{top}embeddings\.", r"patch_embeddings\.projection", "norm")
    for stage, count in enumerate(heads):
        theirs, ours = rf"{top}encoder\.layers\.{stage}", rf"stage{stage + 1}_\1"
        block = rf"{theirs}\.blocks\.(\d+)"
        for name in ("query", "key", "value"):
            pattern, target = (
                rf"{block}\.attention\.(?:self\.{name}|{name[0]}_proj)",
                f"params/{ours}/attn/{name}",
            )
            renames += linear(rf"{pattern}", f"{target}", heads_in(count))
        out = rf"{block}\.attention\.(?:output\.dense|o_proj)"
        table = rf"{block}\.attention\.(?:self|relative_position_bias)\.relative_position_bias_table"
        renames += [
            *norm(rf"{block}\.layernorm_before", f"params/{ours}/norm1"),
            *norm(rf"{block}\.layernorm_after", f"params/{ours}/norm2"),
            *linear(rf"{out}", f"params/{ours}/attn/out", heads_out(count)),
            Rename(table, f"params/{ours}/attn/relative_position_bias"),
            *linear(rf"{block}\.(?:intermediate\.dense|mlp\.fc1)", f"params/{ours}/fc1"),
            *linear(rf"{block}\.(?:output\.dense|mlp\.fc2)", f"params/{ours}/fc2"),
        ]
        if stage < len(heads) - 1:
            renames += _merge(rf"{theirs}\.downsample", f"merge{stage + 2}")
        if backbone:
            # MaskFormer's Swin numbers them.
            renames += norm(
                rf"hidden_states_norms\.(?:stage{stage + 1}|{stage})", f"params/out_norm{stage + 2}"
            )
    final = [Rename(rf"{top}layernorm\..*", "")] if backbone else norm(rf"{top}layernorm", "params/out_norm5")
    return [*renames, *final, _INDICES, Rename(r"classifier\..*", "")]
