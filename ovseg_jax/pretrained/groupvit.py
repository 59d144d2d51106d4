"""Names of published GroupViTs, for ovseg_jax/models/groupvit.py."""

from ovseg_jax.pretrained.rename import Rename, conv, heads_in, heads_out, linear, norm
from ovseg_jax.pretrained.text import from_hf_clip_text

_STAGE = r"vision_model\.encoder\.stages\.(\d+)\."
_OURS = r"params/stage_\1/"
_ATTENTION = "MultiHeadDotProductAttention_0"


def from_hf_groupvit_image(heads: int) -> list[Rename]:
    """Returns the renames of the image half of transformers' GroupViTModel."""
    layer, block = _STAGE + r"layers\.(\d+)\.", _OURS + r"encoderblock_\2/"
    assign, ours = _STAGE + r"downsample\.", _OURS + "assign/"
    names = [
        Rename(r"logit_scale", "params/logit_scale"),
        Rename(r"vision_model\.embeddings\.position_embeddings", "params/pos_embedding"),
        Rename(
            r"vision_model\.embeddings\.patch_embeddings\.projection\.weight", "params/embedding/kernel", conv
        ),
        Rename(r"vision_model\.embeddings\.patch_embeddings\.projection\.bias", "params/embedding/bias"),
        *norm(r"vision_model\.embeddings\.layernorm", "params/patch_norm"),
        *norm(r"vision_model\.layernorm", "params/norm"),
        Rename(_STAGE + "group_token", _OURS + "group_token"),
        *_attention(layer + r"self_attn\.", f"{block}{_ATTENTION}", heads),
        *norm(layer + "layer_norm1", block + "LayerNorm_0"),
        *norm(layer + "layer_norm2", block + "LayerNorm_1"),
        *_mlp(layer + "mlp", block + "MlpBlock_0"),
        *norm(_STAGE + r"group_projector\.0", _OURS + "token_norm"),
        *_mlp(_STAGE + r"group_projector\.1", _OURS + "token_mixer"),
        *norm(assign + "norm_tokens", ours + "norm_tokens"),
        *norm(assign + "norm_x", ours + "norm_x"),
        *_mlp(assign + "mlp_inter", ours + "mixer"),
        *norm(assign + "norm_post_tokens", ours + "norm_groups"),
        *_attention(assign + r"pre_assign_attn\.attn\.", ours + "cross_attention", heads),
        *norm(assign + r"pre_assign_attn\.norm2", ours + "norm_mlp_cross"),
        *_mlp(assign + r"pre_assign_attn\.mlp", ours + "mlp_cross"),
        *norm(assign + r"pre_assign_attn\.norm_post", ours + "norm_cross"),
        *norm(assign + "norm_new_x", ours + "norm_channels"),
        *_mlp(assign + "mlp_channels", ours + "mlp_channels"),
        *_projection("visual_projection"),
        Rename(r"text_model\..+|text_projection\..+", ""),
    ]
    for theirs, own in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("proj", "out")):
        names += linear(assign + rf"assign\.{theirs}", ours + own)
    return names


def from_hf_groupvit_text(heads: int) -> list[Rename]:
    """Returns the renames of the text half of transformers' GroupViTModel."""
    # Its tower has the names of CLIP's, whose projection is a single matrix.
    tower = [
        rename._replace(target=rename.target.replace("params/", "params/tower/", 1))
        for rename in from_hf_clip_text(heads)
        if rename.target and "head" not in rename.target
    ]
    other = Rename(
        r"vision_model\..+|visual_projection\..+|logit_scale|text_model\.embeddings\.position_ids", ""
    )
    return [*tower, *_projection("text_projection"), other]


def _projection(name: str) -> list[Rename]:
    return [
        *linear(rf"{name}\.0", "params/projection/Dense_0"),
        *norm(rf"{name}\.1", "params/projection/norm"),
        Rename(rf"{name}\.1\.running_mean", "batch_stats/projection/norm/mean"),
        Rename(rf"{name}\.1\.running_var", "batch_stats/projection/norm/var"),
        Rename(rf"{name}\.1\.num_batches_tracked", ""),
        *linear(rf"{name}\.3", "params/projection/Dense_1"),
    ]


def _attention(pattern: str, target: str, heads: int) -> list[Rename]:
    names = []
    for part in ("query", "key", "value"):
        names += linear(f"{pattern}{part[0]}_proj", f"{target}/{part}", heads_in(heads))
    return [*names, *linear(f"{pattern}out_proj", f"{target}/out", heads_out(heads))]


def _mlp(pattern: str, target: str) -> list[Rename]:
    return [
        *linear(rf"{pattern}\.fc1", f"{target}/Dense_0"),
        *linear(rf"{pattern}\.fc2", f"{target}/Dense_1"),
    ]
