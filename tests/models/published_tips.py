"""transformers' configs of the published TIPSv2 models (sizes: google-deepmind/tips, scenic/models/vit.py, tips.py)."""

from tests.extras import require

# Width, blocks, heads and MLP of the image tower, blocks of the text tower.
SIZES_OF_TIPS = {
    "tipsv2_b14": (768, 12, 12, 3072, 12),
    "tipsv2_l14": (1024, 24, 16, 4096, 12),
    "tipsv2_so400m14": (1152, 27, 16, 4304, 27),
    "tipsv2_g14": (1536, 40, 24, 6144, 12),
}


def published_tips(name):
    """The Tipsv2Config of a published model."""
    width, depth, heads, hidden, layers = SIZES_OF_TIPS[name]
    transformers = require("transformers")
    return transformers.Tipsv2Config(
        vision_config=dict(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            # So that the quotient gives the width again, though a float.
            mlp_ratio=hidden / width + 1e-9,
            use_swiglu_ffn=name == "tipsv2_g14",
        ),
        text_config=dict(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=hidden
        ),
    )
