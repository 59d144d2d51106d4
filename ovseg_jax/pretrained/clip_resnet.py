"""Names of published CLIP ResNets, for `models.clip_resnet.ClipResNet`: OpenAI's, shared by open_clip, and timm's."""

import numpy as np

from ovseg_jax.models.clip_resnet import HEAD_CHANNELS
from ovseg_jax.pretrained.rename import Layout, Rename, batch_norm, conv, heads_in, heads_out, same


def from_openai_clip_resnet(prefix: str = r"visual\.") -> list[Rename]:
    """Returns the renames of OpenAI's RN50 to RN50x64 and of open_clip; the text tower is ignored.

    Args:
      prefix: a regex for the prefix of the image tower's names; "" for the tower alone.
    """
    block, ours = rf"{prefix}layer(\d)\.(\d+)", r"layer\1_\2"
    return [
        Rename(rf"{prefix}conv(\d)\.weight", r"params/conv\1/kernel", conv),
        *batch_norm(rf"{prefix}bn(\d)", r"norm\1"),
        Rename(rf"{block}\.conv(\d)\.weight", rf"params/{ours}/conv\3/kernel", conv),
        *batch_norm(rf"{block}\.bn(\d)", rf"{ours}/norm\3"),
        Rename(rf"{block}\.downsample\.0\.weight", f"params/{ours}/downsample_conv/kernel", conv),
        *batch_norm(rf"{block}\.downsample\.1", f"{ours}/downsample_norm"),
        *_attention_pool(rf"{prefix}attnpool", "positional_embedding", r"{}_proj", "c_proj"),
        Rename(
            r"(?:transformer|token_embedding|ln_final)\..*|positional_embedding|text_projection|logit_scale"
            # Sizes that OpenAI's archives hold beside the weights.
            r"|attn_mask|input_resolution|context_length|vocab_size",
            "",
        ),
    ]


def from_timm_clip_resnet() -> list[Rename]:
    """Returns the renames of timm's `resnet50_clip` and its sisters."""
    renames = [
        Rename(r"stem\.conv(\d)\.conv\.weight", r"params/conv\1/kernel", conv),
        *batch_norm(r"stem\.conv(\d)\.bn", r"norm\1"),
        *_attention_pool("head", "pos_embed", "{}", "proj"),
    ]
    # timm counts stages from 0, our names from 1.
    for stage in range(4):
        block, ours = rf"stages\.{stage}\.(\d+)", rf"layer{stage + 1}_\1"
        renames += [
            Rename(rf"{block}\.conv(\d)_(?:1x1|kxk)\.conv\.weight", rf"params/{ours}/conv\2/kernel", conv),
            *batch_norm(rf"{block}\.conv(\d)_(?:1x1|kxk)\.bn", rf"{ours}/norm\2"),
            Rename(rf"{block}\.shortcut\.conv\.conv\.weight", f"params/{ours}/downsample_conv/kernel", conv),
            *batch_norm(rf"{block}\.shortcut\.conv\.bn", f"{ours}/downsample_norm"),
        ]
    return renames


def _attention_pool(prefix: str, positions: str, letter: str, out: str) -> list[Rename]:
    renames = [Rename(rf"{prefix}\.{positions}", "params/attnpool/positions")]
    parts: list[tuple[str, str, Layout, Layout]] = [
        (letter.format(name[0]), name, _split, _split) for name in ("query", "key", "value")
    ]
    for theirs, ours, kernel, bias in [*parts, (out, "out", _merge, same)]:
        renames.append(Rename(rf"{prefix}\.{theirs}\.weight", f"params/attnpool/{ours}/kernel", kernel))
        renames.append(Rename(rf"{prefix}\.{theirs}\.bias", f"params/attnpool/{ours}/bias", bias))
    return renames


# All heads have 64 channels, so the shape gives their number.
def _split(x: np.ndarray) -> np.ndarray:
    return heads_in(x.shape[0] // HEAD_CHANNELS)(x)


def _merge(x: np.ndarray) -> np.ndarray:
    return heads_out(x.shape[1] // HEAD_CHANNELS)(x)
