"""Names of published TIPSv2 towers (google-deepmind/tips), for `models.vit.ViT` and `models.text_towers.TipsText`.

Three formats: the JAX npz files (`tips_v2_l14_vision.npz`, `..._text.npz`), the PyTorch npz files (`tips_v2_oss_...`)
and the folders of transformers, whose files have the PyTorch names under `vision_encoder.` and `text_encoder.`, or
transformers' own. The JAX towers have neither layer scales nor a position of the class token: `joined` multiplies
PyTorch's layer scales into the projections and adds its position to the class token.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ovseg_jax.pretrained.files import npz_names
from ovseg_jax.pretrained.rename import Rename, conv, heads_in, heads_out, heads_qkv, linear, norm
from ovseg_jax.pretrained.vit import ATTENTION, BLOCK, NORM

JAX, TORCH = "TIPS's JAX model", "transformers' TIPSv2"

_TEXT_BLOCK = r"params/Encoder_0/encoderblock_\1"
_SCALE, _FRONT, _REGISTERS = "LayerScale", "params/cls_token", "params/register_tokens"


def file_of(folder: Path, text: bool) -> Path | None:
    """Returns the npz file of one tower in a folder of both, or None if there is none, or several."""
    found = list(folder.glob("*_text.npz" if text else "*_vision.npz"))
    return found[0] if len(found) == 1 else None


def is_tips(path: Path) -> str:
    """Returns the format, JAX or TORCH, of an npz file with a tower of TIPS; "" for another.

    Raises:
      UserError: the file is damaged.
    """
    names = npz_names(path)
    if any(name.startswith(("encoder/ToTokenSequence_0/", "token_emb/")) for name in names):
        return JAX
    return TORCH if any(re.match(r"(blocks|transformer)\.", name) for name in names) else ""


def from_tips_vision(heads: int) -> list[Rename]:
    """Returns the renames of the image tower in PyTorch; `joined` completes them."""
    v = r"(?:vision_(?:encoder|model)\.)?"
    e = v + r"(?:embeddings\.)?"
    block = v + r"(?:blocks|encoder\.layer)\.(\d+)\."
    renames = [
        Rename(e + "cls_token", _FRONT),
        Rename(e + "register_tokens", _REGISTERS),
        Rename(e + r"(?:pos_embed|position_embeddings)", "params/pos_embedding"),
        *linear(e + r"(?:patch_embed\.proj|patch_embeddings\.projection)", "params/embedding", conv),
        *norm(block + "norm1", f"{BLOCK}/LayerNorm_0"),
        *norm(block + "norm2", f"{BLOCK}/LayerNorm_1"),
        *linear(block + r"attn\.qkv", f"{BLOCK}/{ATTENTION}/{{}}", heads_qkv(heads)),
        *linear(block + r"(?:attn\.proj|attention\.o_proj)", f"{BLOCK}/{ATTENTION}/out", heads_out(heads)),
        Rename(block + r"(?:ls1\.gamma|layer_scale1\.lambda1)", f"{BLOCK}/{_SCALE}_0"),
        Rename(block + r"(?:ls2\.gamma|layer_scale2\.lambda1)", f"{BLOCK}/{_SCALE}_1"),
        *linear(block + r"mlp\.(?:fc1|c_fc|up_proj)", f"{BLOCK}/MlpBlock_0/Dense_0"),
        *linear(block + r"mlp\.(?:fc2|c_proj|w3|down_proj)", f"{BLOCK}/MlpBlock_0/Dense_1"),
        *linear(block + r"mlp\.gate_proj", f"{BLOCK}/MlpBlock_0/gate"),
        *linear(block + r"mlp\.w12", f"{BLOCK}/MlpBlock_0/{{}}", _gate_and_up),
        *norm(v + "(?:norm|layernorm)", NORM),
        Rename(e + r"mask_token|text_(?:encoder|model)\..*|temperature", ""),
    ]
    for name in ("query", "key", "value"):
        renames += linear(
            block + rf"attention\.{name[0]}_proj", f"{BLOCK}/{ATTENTION}/{name}", heads_in(heads)
        )
    return renames


def from_tips_text(heads: int) -> list[Rename]:
    """Returns the renames of the text tower in PyTorch."""
    t = r"(?:text_(?:encoder|model)\.)?"
    block = t + r"(?:transformer\.resblocks|encoder\.layers)\.(\d+)\."
    own, attention = _TEXT_BLOCK, f"{_TEXT_BLOCK}/{ATTENTION}"
    renames = [
        Rename(t + r"(?:embeddings\.)?token_embedding\.weight", "params/Embed_0/embedding"),
        Rename(block + r"attn\.in_proj_weight", attention + "/{}/kernel", heads_qkv(heads)),
        Rename(block + r"attn\.in_proj_bias", attention + "/{}/bias", heads_qkv(heads)),
        *linear(block + r"(?:self_)?attn\.out_proj", attention + "/out", heads_out(heads)),
        *linear(block + r"mlp\.(?:c_fc|fc1)", own + "/MlpBlock_0/Dense_0"),
        *linear(block + r"mlp\.(?:c_proj|fc2)", own + "/MlpBlock_0/Dense_1"),
        *norm(block + r"(?:ln_1|layer_norm1)", own + "/LayerNorm_0"),
        *norm(block + r"(?:ln_2|layer_norm2)", own + "/LayerNorm_1"),
        *norm(t + r"(?:ln_final|final_layer_norm)", "params/Encoder_0/encoder_norm"),
        Rename(r"vision_(?:encoder|model)\..*|temperature", ""),
    ]
    for name in ("query", "key", "value"):
        renames += linear(block + rf"self_attn\.{name[0]}_proj", f"{attention}/{name}", heads_in(heads))
    return renames


def from_tips_jax() -> list[Rename]:
    """Returns the renames of both towers in JAX."""
    tokens, block = r"encoder/ToTokenSequence_0/", r"transformer/encoderblock_(\d+)/"
    return [
        Rename(tokens + "embedding/(kernel|bias)", r"params/embedding/\1"),
        Rename(tokens + "posembed_input", "params/pos_embedding", lambda x: x.reshape(1, -1, x.shape[-1])),
        Rename(tokens + "cls", "params/cls"),
        Rename("encoder/encoder_norm/(scale|bias)", NORM + r"/\1"),
        *(
            Rename(
                f"encoder/{block}FFNSwiGluFused_0/Dense_{i}/(kernel|bias)", rf"{BLOCK}/MlpBlock_0/{ours}/\2"
            )
            for i, ours in enumerate(("gate", "Dense_0", "Dense_1"))
        ),
        Rename(f"encoder/{block}(.+)", BLOCK + r"/\2"),
        Rename("token_emb/emb_var", "params/Embed_0/embedding"),
        Rename(block + "(.+)", _TEXT_BLOCK + r"/\2"),
        Rename("text_encoder_norm/(scale|bias)", r"params/Encoder_0/encoder_norm/\1"),
        Rename("temperature_contrastive", ""),
    ]


def joined(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Folds layer scales, registers and the class token's position into the arrays of the JAX form; others stay.

    Args:
      arrays: by our paths, with the class token, registers and layer scales that published PyTorch towers have.
    """
    out = dict(arrays)
    if _FRONT in out and _REGISTERS in out:
        first, table = out.pop(_FRONT), out["params/pos_embedding"]
        out["params/cls"] = np.concatenate([first + table[:, :1], out.pop(_REGISTERS)], 1)
        out["params/pos_embedding"] = table[:, 1:]
    for path in [path for path in out if re.search(f"/{_SCALE}_[01]$", path)]:
        block, which = path[: path.rindex("/")], path[-1]
        layer = f"{block}/" + (f"{ATTENTION}/out" if which == "0" else "MlpBlock_0/Dense_1")
        scale = out.pop(path)
        for name in ("kernel", "bias"):  # the last axis of both is that of the output
            if f"{layer}/{name}" in out:
                out[f"{layer}/{name}"] = out[f"{layer}/{name}"] * scale
    return out


def _gate_and_up(x: np.ndarray) -> dict[str, np.ndarray]:
    gate, up = np.split(x, 2)
    return {"gate": gate.T, "Dense_0": up.T}
