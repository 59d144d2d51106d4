"""UMG-CLIP's pre-training (papers/003: A Unified Multi-Granularity Vision Generalist for Open-World Understanding)."""

from typing import Any

from ml_collections import ConfigDict

from ovseg_jax.config import Args, AtLeast, parse_arg
from ovseg_jax.configs import common
from ovseg_jax.errors import UserError
from ovseg_jax.pretrained.published import CLIP, weights_of

# Table 7: the terms of the loss (eq. 3) by row.
TERMS = {
    "all": ("image_captions", "region_captions", "image_tags", "region_tags"),
    "image_captions": ("image_captions",),
    "captions": ("image_captions", "region_captions"),
    "image_tags": ("image_captions", "region_captions", "image_tags"),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; keys of `arg` stand below, an unknown one or one without effect is an error."""
    args = parse_arg(
        arg,
        data=("scenes",),
        losses=tuple(TERMS),  # rows of Table 7
        seed=0,
    )
    config = scenes(args)
    config.seed = args.seed
    args.check_read()
    return config


def losses(args: Args) -> dict[str, Any]:
    """Returns the loss section."""
    return dict(
        terms=TERMS[args.losses],
        image_weight=1.0,  # α, 4.1
        region_weight=1.0,  # β, 4.1
        # sum: over D, 1 - cos of unit vectors, whatever D is; mean: D times less. 4.1 does not say: ours
        tag_reduction="sum",
    )


def dense(prompt: Any) -> dict[str, Any]:
    """Returns the section of boxes and patches."""
    return dict(
        normalise="pooled",  # eq. 1: pooled, then mapped; pixels: as CLIPSelf
        sampling=0,  # of RoIAlign, by the size of the box, as CLIPSelf and detectron2; the paper does not say: ours
        prompt=prompt,
    )


def scenes(args: Args) -> ConfigDict:
    """Returns the pre-training of a small EVA on the embedded data. All numbers are ours."""
    tower = dict(name="eva", patch=8, grid=8, width=64, depth=4, heads=4, hidden=128, embed_dim=64)
    tower |= dict(rope_grid=8, swiglu=True, attn_norm=True, mlp_norm=True)
    test = common.scenes("test", 500)
    config = common.run(
        "umg_clip",
        steps=2000,
        batch_size=64,
        towers=dict(
            image=tower,
            text=dict(name="clip", width=64, heads=2, layers=2, embed_dim=64, length=24),
            init="",
            tokenizer="words",
            image_size=64,
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            logit_scale=14.0,
        ),
        loss=losses(args),
        dense=dense(["{}", "a {}", "the {}"]),
        optimizer=common.adamw(
            2e-3, warmup_steps=100, final_fraction=0.02, weight_decay=0.05, clip_norm=1.0, b2=0.98, no_decay=("/bias$",)
        ),
        data=dict(
            train=[dict(common.scenes("train", 10_000), cache=True)],
            image_size=64,
            scale_jitter=(1.0, 1.0),
            flip=True,
            max_boxes=5,
            max_tags=8,
            max_box_tags=3,
            workers=0,
        ),
        final_evals=dict(
            classification=common.classification(
                dict(name="scene_objects", split="test", shots=8, image_size=64, size="small"), 64
            ),
            retrieval=dict(type="retrieval", source=test, batch_size=50),
            test=common.segmentation(test, 50),
        ),
        checkpoint=common.checkpoint(every=500),
    )
    return config
