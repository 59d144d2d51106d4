"""Export of CLIP-shaped towers to a folder that `transformers.CLIPModel.from_pretrained` loads."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ovseg_jax.models.text_towers import CLIPText
from ovseg_jax.models.vit import ViT
from ovseg_jax.pretrained.files import write_safetensors
from ovseg_jax.pretrained.to_torch import to_torch

# Our names of activations -> transformers'.
HF_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}

# Our names, as `to_torch` returns them -> transformers'.
_COMMON = (
    (r"^(?:Transformer|Encoder_0)\.encoderblock_(\d+)\.", r"encoder.layers.\1."),
    (r"MultiHeadDotProductAttention_0\.(query|key|value)\.", lambda m: f"self_attn.{m[1][0]}_proj."),
    (r"MultiHeadDotProductAttention_0\.out\.", "self_attn.out_proj."),
    (r"MlpBlock_0\.Dense_0\.", "mlp.fc1."),
    (r"MlpBlock_0\.Dense_1\.", "mlp.fc2."),
    (r"LayerNorm_0\.", "layer_norm1."),
    (r"LayerNorm_1\.", "layer_norm2."),
    (r"^pos_embedding$", "embeddings.position_embedding.weight"),
)
# "pre_layrnorm" is misspelt in transformers.
_VISION = (
    *_COMMON,
    (r"^Transformer\.encoder_norm\.", "post_layernorm."),
    (r"^pre_norm\.", "pre_layrnorm."),
    (r"^embedding\.", "embeddings.patch_embedding."),
    (r"^cls$", "embeddings.class_embedding"),
)
_TEXT = (
    *_COMMON,
    (r"^Encoder_0\.encoder_norm\.", "final_layer_norm."),
    (r"^Embed_0\.", "embeddings.token_embedding."),
)


def is_clip(vision: Any, text: Any) -> bool:
    """Tells whether two towers form a CLIP that transformers supports."""
    return (
        isinstance(vision, ViT)
        and isinstance(text, CLIPText)
        and (vision.cls, vision.pool, vision.pre_norm, vision.head_bias) == ("placed", "cls", True, False)
        and vision.embed_dim == text.embed_dim > 0
        and vision.grid[0] == vision.grid[1]
    )


def write_hf_clip(
    folder: Path,
    vision: ViT,
    text: CLIPText,
    vision_params: Mapping[str, np.ndarray],
    text_params: Mapping[str, np.ndarray],
    *,
    temperature: float = 0.01,
) -> None:
    """Writes `config.json` and `model.safetensors`.

    Args:
      folder: the folder to write; created if missing.
      vision: the image tower; see `is_clip`.
      text: the text tower.
      vision_params: the image tower's parameters by path, `embedding/kernel`.
      text_params: the text tower's parameters by path.
      temperature: the divisor of similarities, by default CLIP's; transformers stores the logarithm of its inverse.
    """
    arrays = {f"vision_model.{k}": v for k, v in _rename(vision_params, _VISION).items()}
    arrays |= {f"text_model.{k}": v for k, v in _rename(text_params, _TEXT).items()}
    arrays["visual_projection.weight"] = arrays.pop("vision_model.head.weight")
    arrays["text_projection.weight"] = arrays.pop("text_model.head.weight")
    arrays["logit_scale"] = np.array(-np.log(temperature), np.float32)
    for name, array in arrays.items():
        if name.endswith(("class_embedding", "position_embedding.weight")):
            arrays[name] = array.reshape(array.shape[1:] if "position" in name else -1)
    shared = dict(projection_dim=text.embed_dim)
    config = dict(
        model_type="clip",
        architectures=["CLIPModel"],
        **shared,
        vision_config=dict(
            **shared,
            **_sizes(
                vision.width, vision.mlp_dim, vision.depth, vision.heads, vision.activation, vision.epsilon
            ),
            patch_size=vision.patch,
            image_size=vision.patch * vision.grid[0],
        ),
        text_config=dict(
            **shared,
            **_sizes(
                text.width, text.mlp_dim or 4 * text.width, text.layers, text.heads, text.activation, 1e-5
            ),
            vocab_size=text.vocab_size,
            max_position_embeddings=text.length,
            # The last two ids of the vocabulary; a text ends at the first `eos_token_id`.
            bos_token_id=text.vocab_size - 2,
            eos_token_id=text.vocab_size - 1,
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    write_safetensors(folder / "model.safetensors", arrays, {"format": "pt"})


def _sizes(
    width: int, hidden: int, layers: int, heads: int, activation: str, epsilon: float
) -> dict[str, Any]:
    return dict(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=HF_ACTIVATIONS[activation],
        layer_norm_eps=epsilon,
    )


def _rename(params: Mapping[str, np.ndarray], rules: Any) -> dict[str, np.ndarray]:
    out = {}
    for name, array in to_torch(params).items():
        for pattern, target in rules:
            name = re.sub(pattern, target, name)
        out[name] = array
    return out
