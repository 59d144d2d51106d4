"""MaskFormer or Mask2Former as published but for its images: for `step.py`, which compares it with transformers'.

Images are `scenes` of 224 pixels, four in a batch; BACKBONE is swin_tiny or resnet50. Without dropout and stochastic
depth, so that both sides compute the same loss; MaskFormer also without deep supervision, where transformers' differs
from the authors' (see the test).
"""

from ovseg_jax.config import parse_arg
from ovseg_jax.configs import mask2former, maskformer


def get_config(arg=None):
    methods = {"maskformer": maskformer, "mask2former": mask2former}
    args = parse_arg(
        arg, method=tuple(methods), backbone=("swin_tiny", "resnet50"), batch_size=4, queries=100
    )
    config = methods[args.method].get_config("data=folder,data_dir=none,weights=scratch")
    scenes = maskformer.get_config()
    swin = args.backbone == "swin_tiny"
    with config.unlocked():
        config.model.backbone = dict(name=args.backbone) | (
            dict(window_rule="always", drop_rate=0.0) if swin else dict(norm="frozen")
        )
    config.model.update(dict(remat="none", dtype="float32", num_queries=args.queries))
    if args.method == "maskformer":
        config.model.update(dict(dropout=0.0, deep_supervision=False))
    config.batch_size, config.optimizer.multipliers = args.batch_size, ()
    config.data = scenes.data
    config.data.image_size = 224
    config.data.train = [dict(name="scenes", split="train", num_examples=64, image_size=224)]
    return config
