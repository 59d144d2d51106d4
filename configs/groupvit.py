"""GroupViT as published (Xu et al. 2022), without training: the baseline of papers/002, Tables 3, 4 and 7.

  python -m ovseg_jax.main --config=configs/groupvit.py:eval_sets=DIR
      mIoU with background on DIR/VOC, DIR/Context and DIR/COCO-Object, as `python -m ovseg_jax.prepare` writes them.
      Published: 50.8, 23.7 and 27.5 (Table 4); with weights=hf:nvidia/groupvit-gcc-yfcc 52.3, 22.4 and 24.3.
  python -m ovseg_jax.main --config=configs/groupvit.py:eval_sets=DIR,background=False
      without background pixels. Published: 77.2, 23.0 and 37.5 (Table 3).
  python -m ovseg_jax.predict --checkpoint=WORKDIR --images=PHOTOS --labels=voc_2012 --protocol=voc --out=OUT
      the finished run segments images.

None of these scores has been reproduced yet. The run has no steps: its scores are in its summary. There is no variant
on embedded data, since the method is not trained. Numbers without a source are NVlabs/GroupViT's.
"""

from ml_collections import ConfigDict

from ovseg_jax.config import parse_arg
from ovseg_jax.configs import common
from ovseg_jax.pretrained.published import IMAGENET


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; keys of `arg` stand below, an unknown one or one without effect is an error."""
    args = parse_arg(
        arg,
        eval_sets="data/sets",  # a folder that holds the sets by name
        sets="VOC;Context;COCO-Object",  # others: LVIS, ImageNet-S
        sets_are=("prepared", "folders"),
        background=True,
        weights="hf:nvidia/groupvit-gcc-redcaps",  # papers/002, C.3; or a folder
        prompt="a photo of a {}.",
        normalise=False,  # each template's embedding, before the mean over them
        seed=0,
    )
    config = common.run(
        "groupvit",
        seed=args.seed,
        steps=0,
        batch_size=8,
        groupvit=dict(
            image={},
            text={},
            init=args.weights,
            tokenizer="",
            mean=IMAGENET.mean,
            std=IMAGENET.std,
            prompt=args.prompt,
            normalise=args.normalise,
        ),
        optimizer=common.adamw(1e-3, warmup_steps=0, weight_decay=0.0),  # has no effect
        data=dict(image_size=448, workers=0),
        checkpoint=common.checkpoint(every=0),
    )
    config.final_evals = common.by_protocol(args.eval_sets, args.sets, args.sets_are, args.background, 8)
    config.data.train = [next(iter(config.final_evals.values())).source]  # not read but for its classes
    args.check_read()
    return config
