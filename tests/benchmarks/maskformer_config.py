"""MaskFormer as published but for its images: for `step.py`, which compares its train step with transformers'.

Images are `scenes` of 224 pixels, four in a batch; BACKBONE is swin_tiny or resnet50. Without dropout, stochastic depth
and deep supervision (transformers' differs from the authors', see the test), so that both sides compute the same loss.
"""

from ovseg_jax.config import parse_arg
from ovseg_jax.configs import maskformer


def get_config(arg=None):
    args = parse_arg(arg, backbone=("swin_tiny", "resnet50"), batch_size=4, queries=100)
    config = maskformer.get_config("data=folder,data_dir=none,weights=scratch")
    scenes = maskformer.get_config()
    swin = args.backbone == "swin_tiny"
    with config.unlocked():
        config.model.backbone = dict(name=args.backbone) | (
            dict(window_rule="always", drop_rate=0.0) if swin else dict(norm="frozen")
        )
    config.model.update(
        dict(dropout=0.0, deep_supervision=False, remat="none", dtype="float32", num_queries=args.queries)
    )
    config.batch_size, config.optimizer.multipliers = args.batch_size, ()
    config.data = scenes.data
    config.data.image_size = 224
    config.data.train = [dict(name="scenes", split="train", num_examples=64, image_size=224)]
    return config
