"""Names of published CLIP ConvNeXts, for `models.convnext.ConvNeXt`: open_clip's and timm's."""

from ovseg_jax.pretrained.rename import Rename, conv, dense, linear, norm


def from_open_clip_convnext(prefix: str = r"visual\.") -> list[Rename]:
    """Returns the renames of open_clip's `convnext_*`; the text tower is ignored.

    Args:
      prefix: a regex for the prefix of the image tower's names.
    """
    return [
        *_trunk(rf"{prefix}trunk\."),
        *linear(rf"{prefix}head\.(?:mlp\.)?(fc\d|proj)", r"params/head/\1"),
        Rename(
            r"(?:transformer|token_embedding|ln_final)\..*|positional_embedding|text_projection|logit_scale",
            "",
        ),
    ]


def from_timm_clip_convnext(hidden: int) -> list[Rename]:
    """Returns the renames of timm's `convnext_*.clip_*`, whose classifier is CLIP's projection.

    Args:
      hidden: channels inside the head's MLP; 0 for a single matrix.
    """
    last = "fc2" if hidden else "proj"
    return [
        *_trunk(""),
        *linear(r"head\.pre_logits\.fc", "params/head/fc1"),
        Rename(r"head\.fc\.weight", f"params/head/{last}/kernel", dense),
        # CLIP's projection has no bias; timm's loader writes zeros.
        Rename(r"head\.fc\.bias", ""),
    ]


def _trunk(prefix: str) -> list[Rename]:
    renames = [
        *_conv(rf"{prefix}stem\.0", "stem"),
        *norm(rf"{prefix}stem\.1", "params/stem_norm"),
        *norm(rf"{prefix}head\.norm", "params/head/norm"),
    ]
    # Their stages count from 0, ours from 1.
    for stage in range(4):
        theirs, ours = rf"{prefix}stages\.{stage}", f"stage{stage + 1}"
        block = rf"{theirs}\.blocks\.(\d+)"
        renames += [
            *norm(rf"{theirs}\.downsample\.0", f"params/downsample{stage + 1}_norm"),
            *_conv(rf"{theirs}\.downsample\.1", f"downsample{stage + 1}"),
            *_conv(rf"{block}\.conv_dw", rf"{ours}_\1/conv"),
            *norm(rf"{block}\.norm", rf"params/{ours}_\1/norm"),
            *linear(rf"{block}\.mlp\.(fc\d)", rf"params/{ours}_\1/\2"),
            Rename(rf"{block}\.gamma", rf"params/{ours}_\1/gamma"),
        ]
    return renames


def _conv(source: str, target: str) -> list[Rename]:
    return [
        *linear(source, f"params/{target}", conv),
    ]
