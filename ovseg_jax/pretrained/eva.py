"""Names of EVA-CLIP's image towers (models/eva.py) in published checkpoints.

Both formats have joint and separate queries, keys and values: E/14 and g/14 keep one `qkv.weight` beside `q_bias` and
`v_bias`, B/16 and L/14 three matrices. The text tower is ignored.
"""

from ovseg_jax.pretrained.rename import Layout, Rename, conv, dense, heads_in, heads_out, heads_qkv, norm

_OURS = r"params/blocks_\1/"


def from_timm_eva(heads: int) -> list[Rename]:
    """Returns the renames of timm's `eva*_clip_*`, alone or inside of open_clip (`visual.trunk.`)."""
    prefix = r"(?:visual\.trunk\.)?"
    block = prefix + r"blocks\.(\d+)\."
    return [
        *_shared(prefix, heads),
        Rename(block + r"attn\.q_proj\.bias", _OURS + "attn/query/bias", heads_in(heads)),
        Rename(block + r"attn\.v_proj\.bias", _OURS + "attn/value/bias", heads_in(heads)),
        *norm(block + r"attn\.norm", _OURS + "attn/inner_norm"),
        *_affine(block + r"mlp\.fc1_g", _OURS + "mlp/gate"),
        *_affine(block + r"mlp\.fc1_x", _OURS + "mlp/fc1"),
        *norm(block + r"mlp\.norm", _OURS + "mlp/norm"),
    ]


def from_eva_clip(heads: int) -> list[Rename]:
    """Returns the renames of BAAI's EVA-CLIP, with or without the prefix `visual.`.

    Its SwiGLU is w3(norm(silu(w1(x)) * w2(x))).
    """
    prefix = r"(?:visual\.)?"
    block = prefix + r"blocks\.(\d+)\."
    return [
        *_shared(prefix, heads),
        *norm(block + r"attn\.inner_attn_ln", _OURS + "attn/inner_norm"),
        *_affine(block + r"mlp\.w1", _OURS + "mlp/gate"),
        *_affine(block + r"mlp\.w2", _OURS + "mlp/fc1"),
        *_affine(block + r"mlp\.w3", _OURS + "mlp/fc2"),
        *norm(block + r"mlp\.ffn_ln", _OURS + "mlp/norm"),
        # The rotary table, once for the tower and once for each block.
        Rename(prefix + r"(?:blocks\.\d+\.attn\.)?rope\.freqs_(?:cos|sin)", ""),
        # The text tower, if it is not under `text.`.
        Rename(r"(?:transformer\.|token_embedding\.|ln_final\.).*|positional_embedding|text_projection", ""),
    ]


def _shared(prefix: str, heads: int) -> list[Rename]:
    block = prefix + r"blocks\.(\d+)\."
    return [
        Rename(prefix + "cls_token", "params/cls"),
        Rename(prefix + "pos_embed", "params/pos_embedding"),
        Rename(prefix + r"patch_embed\.proj\.weight", "params/embedding/kernel", conv),
        Rename(prefix + r"patch_embed\.proj\.bias", "params/embedding/bias"),
        *norm(block + "norm1", _OURS + "norm1"),
        *norm(block + "norm2", _OURS + "norm2"),
        Rename(block + r"attn\.qkv\.weight", _OURS + "attn/{}/kernel", heads_qkv(heads)),
        Rename(block + r"attn\.q_bias", _OURS + "attn/query/bias", heads_in(heads)),
        Rename(block + r"attn\.v_bias", _OURS + "attn/value/bias", heads_in(heads)),
        *(
            Rename(block + rf"attn\.{name[0]}_proj\.weight", _OURS + f"attn/{name}/kernel", heads_in(heads))
            for name in ("query", "key", "value")
        ),
        *_affine(block + r"attn\.proj", _OURS + "attn/out", heads_out(heads)),
        *_affine(block + r"mlp\.fc1", _OURS + "mlp/fc1"),
        *_affine(block + r"mlp\.fc2", _OURS + "mlp/fc2"),
        *norm(prefix + "norm", "params/norm"),
        *_affine(prefix + "head", "params/head"),
        Rename(r"text\..*|logit_scale", ""),
    ]


def _affine(source: str, target: str, layout: Layout = dense) -> list[Rename]:
    return [
        Rename(source + r"\.weight", target + "/kernel", layout),
        Rename(source + r"\.bias", target + "/bias", layout),
    ]
