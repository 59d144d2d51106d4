"""Names and layouts of published text towers, for ovseg_jax/models/text_towers.py.

big_vision's names are ours: ovseg_jax/pretrained/big_vision.py reads its `txt/` as it is.
"""

import numpy as np

from ovseg_jax.pretrained.rename import Rename, heads_in, heads_out, heads_qkv, linear, same

_BLOCK = r"params/Encoder_0/encoderblock_\1"
_ATTENTION = _BLOCK + "/MultiHeadDotProductAttention_0"
# Sizes that OpenAI's TorchScript archives hold beside the weights.
_SIZES = r"input_resolution|context_length|vocab_size"


def from_hf_clip_text(heads: int) -> list[Rename]:
    """Returns the renames of transformers' CLIPTextModelWithProjection, and the text half of CLIPModel."""
    return [
        *_hf_tower(heads, r"text_model\."),
        *linear(r"text_projection", "params/head"),
        Rename(r"vision_model\..+|visual_projection\.weight|logit_scale", ""),
    ]


def from_hf_siglip_text(heads: int) -> list[Rename]:
    """Returns the renames of transformers' SiglipTextModel, and of the text half of SiglipModel."""
    return [
        *_hf_tower(heads, r"(?:text_model\.)?"),
        *linear(r"(?:text_model\.)?head", "params/head"),
        Rename(r"vision_model\..+|logit_scale|logit_bias", ""),
    ]


def from_openai_clip_text(heads: int) -> list[Rename]:
    """Returns the renames of OpenAI's CLIP and of open_clip's models, EVA-CLIP's and SigLIP's too (`text.`)."""
    block = r"(?:text\.)?transformer\.resblocks\.(\d+)\."
    return [
        Rename(r"(?:text\.)?token_embedding\.weight", "params/Embed_0/embedding"),
        Rename(r"(?:text\.)?positional_embedding", "params/pos_embedding", _first_axis),
        Rename(block + r"attn\.in_proj_weight", _ATTENTION + "/{}/kernel", heads_qkv(heads)),
        Rename(block + r"attn\.in_proj_bias", _ATTENTION + "/{}/bias", heads_qkv(heads)),
        *linear(block + r"attn\.out_proj", _ATTENTION + "/out", heads_out(heads)),
        *linear(block + r"mlp\.c_fc", _BLOCK + "/MlpBlock_0/Dense_0"),
        *linear(block + r"mlp\.c_proj", _BLOCK + "/MlpBlock_0/Dense_1"),
        *_norm(block + "ln_1", _BLOCK + "/LayerNorm_0"),
        *_norm(block + "ln_2", _BLOCK + "/LayerNorm_1"),
        *_norm(r"(?:text\.)?ln_final", "params/Encoder_0/encoder_norm"),
        # CLIP's projection is a matrix [in out]; SigLIP's in open_clip is a layer.
        Rename(r"(?:text\.)?text_projection", "params/head/kernel"),
        *linear(r"(?:text\.)?text_projection", "params/head"),
        Rename(rf"visual\..+|logit_scale|logit_bias|{_SIZES}", ""),
    ]


def from_hf_bert(heads: int, pooler: bool) -> list[Rename]:
    """Returns the renames of transformers' BertModel, also with the heads of pretraining (`bert.`).

    Args:
      heads: number of attention heads.
      pooler: whether the module has a pooler, as with `pool="pooler"`.
    """
    block = r"(?:bert\.)?encoder\.layer\.(\d+)\."
    names = [
        Rename(r"(?:bert\.)?embeddings\.word_embeddings\.weight", "params/Embed_0/embedding"),
        Rename(r"(?:bert\.)?embeddings\.position_embeddings\.weight", "params/pos_embedding", _first_axis),
        Rename(r"(?:bert\.)?embeddings\.token_type_embeddings\.weight", "params/type_embedding"),
        *_norm(r"(?:bert\.)?embeddings\.LayerNorm", "params/embedding_norm"),
        *linear(block + r"attention\.output\.dense", _ATTENTION + "/out", heads_out(heads)),
        *_norm(block + r"attention\.output\.LayerNorm", _BLOCK + "/LayerNorm_0"),
        *linear(block + r"intermediate\.dense", _BLOCK + "/MlpBlock_0/Dense_0"),
        *linear(block + r"output\.dense", _BLOCK + "/MlpBlock_0/Dense_1"),
        *_norm(block + r"output\.LayerNorm", _BLOCK + "/LayerNorm_1"),
    ]
    for part in ("query", "key", "value"):
        names += linear(block + rf"attention\.self\.{part}", f"{_ATTENTION}/{part}", heads_in(heads))
    if pooler:
        names += linear(r"(?:bert\.)?pooler\.dense", "params/pooler")
    return [*names, Rename(r"(?:bert\.)?(pooler\.dense\..+|embeddings\.position_ids)|cls\..+", "")]


def _hf_tower(heads: int, prefix: str) -> list[Rename]:
    block = prefix + r"encoder\.layers\.(\d+)\."
    names = [
        Rename(prefix + r"embeddings\.token_embedding\.weight", "params/Embed_0/embedding"),
        Rename(prefix + r"embeddings\.position_embedding\.weight", "params/pos_embedding", _first_axis),
        Rename(r"(text|vision)_model\.embeddings\.position_ids", ""),
        *linear(block + r"self_attn\.out_proj", _ATTENTION + "/out", heads_out(heads)),
        *linear(block + r"mlp\.fc1", _BLOCK + "/MlpBlock_0/Dense_0"),
        *linear(block + r"mlp\.fc2", _BLOCK + "/MlpBlock_0/Dense_1"),
        *_norm(block + "layer_norm1", _BLOCK + "/LayerNorm_0"),
        *_norm(block + "layer_norm2", _BLOCK + "/LayerNorm_1"),
        *_norm(prefix + "final_layer_norm", "params/Encoder_0/encoder_norm"),
    ]
    for part in ("query", "key", "value"):
        names += linear(block + rf"self_attn\.{part[0]}_proj", f"{_ATTENTION}/{part}", heads_in(heads))
    return names


def _norm(pattern: str, target: str) -> list[Rename]:
    # The first BERT checkpoints have TensorFlow's names gamma and beta.
    return [
        Rename(rf"{pattern}\.(?:weight|gamma)", f"{target}/scale", same),
        Rename(rf"{pattern}\.(?:bias|beta)", f"{target}/bias", same),
    ]


def _first_axis(x: np.ndarray) -> np.ndarray:
    return x[None]
