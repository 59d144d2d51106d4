"""Names of published Vision Transformers, for `models.vit.ViT`.

Each function returns the renames of one format; `heads` is the model's number of attention heads. Text towers,
temperatures, classifiers, decoders and position ids are ignored.
"""

import numpy as np

from ovseg_jax.pretrained.rename import (
    Layout,
    Rename,
    conv,
    dense,
    heads_in,
    heads_out,
    heads_qkv,
    linear,
    norm,
)

ATTENTION = "MultiHeadDotProductAttention_0"
BLOCK = r"params/Transformer/encoderblock_\1"
NORM = "params/Transformer/encoder_norm"
POOL = "params/MAPHead_0"


def row_vectors(x: np.ndarray) -> np.ndarray:
    """Reshapes a position table [n d] to [1 n d], a class token [d] to [1 1 d]; arrays with three axes stay."""
    return x.reshape(1, -1, x.shape[-1])


def heads_kv(heads: int) -> Layout:
    """Splits joint key and value, [2*heads*d in] or [2*heads*d], into two."""
    split = heads_in(heads)
    return lambda x: {name: split(part) for name, part in zip(("key", "value"), np.split(x, 2), strict=True)}


def from_hf_clip(heads: int) -> list[Rename]:
    """Returns the renames of transformers' CLIPVisionModelWithProjection, and the vision half of CLIPModel."""
    v = r"(?:vision_model\.)?"
    return [
        *_hf_encoder(heads),
        Rename(v + r"embeddings\.class_embedding", "params/cls", row_vectors),
        # "pre_layrnorm" is misspelt in transformers.
        *norm(v + "pre_layrnorm", "params/pre_norm"),
        Rename(r"visual_projection\.weight", "params/head/kernel", dense),
    ]


def from_hf_siglip(heads: int) -> list[Rename]:
    """Returns the renames of transformers' SiglipVisionModel with its head, and of SiglipModel's (SigLIP 2 too)."""
    pool = r"(?:vision_model\.)?head\."
    return [
        *_hf_encoder(heads),
        Rename(pool + "probe", f"{POOL}/probe"),
        Rename(pool + r"attention\.in_proj_weight", f"{POOL}/{ATTENTION}/{{}}/kernel", heads_qkv(heads)),
        Rename(pool + r"attention\.in_proj_bias", f"{POOL}/{ATTENTION}/{{}}/bias", heads_qkv(heads)),
        *linear(pool + r"attention\.out_proj", f"{POOL}/{ATTENTION}/out", heads_out(heads)),
        *norm(pool + "layernorm", f"{POOL}/LayerNorm_0"),
        *linear(pool + r"mlp\.fc1", f"{POOL}/MlpBlock_0/Dense_0"),
        *linear(pool + r"mlp\.fc2", f"{POOL}/MlpBlock_0/Dense_1"),
    ]


def from_hf_vit(heads: int) -> list[Rename]:
    """Returns the renames of transformers' ViTModel (facebook/dino-vits16) and of ViTMAE's encoder.

    Both names are read: those of transformers 4, which the hub's files have, and those of transformers 5.
    """
    v = r"(?:vit\.)?"
    layer = v + r"(?:encoder\.layer|layers)\.(\d+)\."
    renames = [
        Rename(v + r"embeddings\.cls_token", "params/cls"),
        Rename(v + r"embeddings\.position_embeddings", "params/pos_embedding"),
        *_patches(v + r"embeddings\.patch_embeddings\.projection"),
        *norm(layer + "layernorm_before", f"{BLOCK}/LayerNorm_0"),
        *norm(layer + "layernorm_after", f"{BLOCK}/LayerNorm_1"),
        *norm(v + "layernorm", NORM),
        Rename(v + r"pooler\..*|classifier\..*|decoder\..*", ""),
    ]
    for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        source = layer + rf"attention\.(?:attention\.{ours}|{theirs})"
        renames += linear(source, f"{BLOCK}/{ATTENTION}/{ours}", heads_in(heads))
    return [
        *renames,
        *linear(layer + r"attention\.(?:output\.dense|o_proj)", f"{BLOCK}/{ATTENTION}/out", heads_out(heads)),
        *linear(layer + r"(?:intermediate\.dense|mlp\.fc1)", f"{BLOCK}/MlpBlock_0/Dense_0"),
        *linear(layer + r"(?:output\.dense|mlp\.fc2)", f"{BLOCK}/MlpBlock_0/Dense_1"),
    ]


def from_openai_clip(heads: int) -> list[Rename]:
    """Returns the renames of `visual.…` in OpenAI's files (ViT-B-16.pt) and open_clip's state dicts."""
    block = r"visual\.transformer\.resblocks\.(\d+)\."
    return [
        Rename(r"visual\.class_embedding", "params/cls", row_vectors),
        Rename(r"visual\.positional_embedding", "params/pos_embedding", row_vectors),
        *_patches(r"visual\.conv1"),
        *norm(r"visual\.ln_pre", "params/pre_norm"),
        *norm(block + "ln_1", f"{BLOCK}/LayerNorm_0"),
        Rename(block + r"attn\.in_proj_weight", f"{BLOCK}/{ATTENTION}/{{}}/kernel", heads_qkv(heads)),
        Rename(block + r"attn\.in_proj_bias", f"{BLOCK}/{ATTENTION}/{{}}/bias", heads_qkv(heads)),
        *linear(block + r"attn\.out_proj", f"{BLOCK}/{ATTENTION}/out", heads_out(heads)),
        *norm(block + "ln_2", f"{BLOCK}/LayerNorm_1"),
        *linear(block + r"mlp\.c_fc", f"{BLOCK}/MlpBlock_0/Dense_0"),
        *linear(block + r"mlp\.c_proj", f"{BLOCK}/MlpBlock_0/Dense_1"),
        *norm(r"visual\.ln_post", NORM),
        # Unlike other weights, the projection is published as [in out].
        Rename(r"visual\.proj", "params/head/kernel"),
        # The text tower, and numbers in OpenAI's traced models.
        Rename(r"(?:text|transformer|token_embedding|ln_final)\..*|positional_embedding|text_projection", ""),
        Rename(r"logit_scale|logit_bias|attn_mask|input_resolution|context_length|vocab_size", ""),
    ]


def from_timm_vit(heads: int) -> list[Rename]:
    """Returns the renames of timm's VisionTransformer, and of DINO's and MAE's own files.

    open_clip models with such a tower (SigLIP) call it `visual.trunk`.
    """
    v = r"(?:visual\.trunk\.)?"
    block, pool = v + r"blocks\.(\d+)\.", v + r"attn_pool\."
    return [
        Rename(v + "cls_token", "params/cls"),
        Rename(v + "pos_embed", "params/pos_embedding"),
        *_patches(v + r"patch_embed\.proj"),
        *norm(block + "norm1", f"{BLOCK}/LayerNorm_0"),
        *linear(block + r"attn\.qkv", f"{BLOCK}/{ATTENTION}/{{}}", heads_qkv(heads)),
        *linear(block + r"attn\.proj", f"{BLOCK}/{ATTENTION}/out", heads_out(heads)),
        *norm(block + "norm2", f"{BLOCK}/LayerNorm_1"),
        *linear(block + r"mlp\.fc1", f"{BLOCK}/MlpBlock_0/Dense_0"),
        *linear(block + r"mlp\.fc2", f"{BLOCK}/MlpBlock_0/Dense_1"),
        *norm(v + "norm", NORM),
        Rename(pool + "latent", f"{POOL}/probe"),
        *linear(pool + "q", f"{POOL}/{ATTENTION}/query", heads_in(heads)),
        *linear(pool + "kv", f"{POOL}/{ATTENTION}/{{}}", heads_kv(heads)),
        *linear(pool + "proj", f"{POOL}/{ATTENTION}/out", heads_out(heads)),
        *norm(pool + "norm", f"{POOL}/LayerNorm_0"),
        *linear(pool + r"mlp\.fc1", f"{POOL}/MlpBlock_0/Dense_0"),
        *linear(pool + r"mlp\.fc2", f"{POOL}/MlpBlock_0/Dense_1"),
        Rename(r"head\..*|decoder_.*|mask_token|text\..*|logit_scale|logit_bias", ""),
    ]


def _hf_encoder(heads: int) -> list[Rename]:
    """Returns the renames that CLIP and SigLIP share in transformers; their text towers are ignored."""
    v = r"(?:vision_model\.)?"
    layer = v + r"encoder\.layers\.(\d+)\."
    renames = [
        Rename(v + r"embeddings\.position_embedding\.weight", "params/pos_embedding", row_vectors),
        *_patches(v + r"embeddings\.patch_embedding"),
        *norm(layer + "layer_norm1", f"{BLOCK}/LayerNorm_0"),
        *norm(layer + "layer_norm2", f"{BLOCK}/LayerNorm_1"),
        *linear(layer + r"self_attn\.out_proj", f"{BLOCK}/{ATTENTION}/out", heads_out(heads)),
        *linear(layer + r"mlp\.fc1", f"{BLOCK}/MlpBlock_0/Dense_0"),
        *linear(layer + r"mlp\.fc2", f"{BLOCK}/MlpBlock_0/Dense_1"),
        *norm(v + "post_layernorm", NORM),
        Rename(v + r"embeddings\.position_ids|text_(?:model|projection)\..*|logit_scale|logit_bias", ""),
    ]
    for name in ("query", "key", "value"):
        source = layer + rf"self_attn\.{name[0]}_proj"
        renames += linear(source, f"{BLOCK}/{ATTENTION}/{name}", heads_in(heads))
    return renames


def _patches(source: str) -> list[Rename]:
    return [
        Rename(rf"{source}\.weight", "params/embedding/kernel", conv),
        Rename(rf"{source}\.bias", "params/embedding/bias"),
    ]
