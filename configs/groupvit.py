"""GroupViT (Xu et al. 2022), the baseline of papers/002, Tables 3, 4 and 7: published, or its grouping on `scenes`.

  python -m ovseg_jax.main --config=configs/groupvit.py
      on `scenes`, from captions alone: a small GroupViT whose groups take the place of P-Seg's masks; the text side,
      the loss and the augmentation are those of configs/pseg.py. One seed: mIoU of 0.3 on seen pairs, 0.1 held out,
      12.3 on stuff: so few steps do not teach its groups.
  python -m ovseg_jax.main --config=configs/groupvit.py:data=sets,eval_sets=DIR
      the published model, without training: mIoU with background on DIR/VOC, DIR/Context and DIR/COCO-Object, as
      `python -m ovseg_jax.prepare` writes them. Published: 50.8, 23.7 and 27.5 (Table 4); with
      weights=hf:nvidia/groupvit-gcc-yfcc 52.3, 22.4 and 24.3.
  python -m ovseg_jax.main --config=configs/groupvit.py:data=sets,eval_sets=DIR,background=False
      without background pixels. Published: 77.2, 23.0 and 37.5 (Table 3).
  python -m ovseg_jax.predict --checkpoint=WORKDIR --images=PHOTOS --labels=voc_2012 --protocol=voc --out=OUT
      the finished run segments images.

None of the published scores has been reproduced yet. The run on sets has no steps: its scores are in its summary.
Numbers of data=sets without a source are NVlabs/GroupViT's; those of data=scenes are ours.
"""

from ml_collections import ConfigDict

from ovseg_jax.config import Args, parse_arg
from ovseg_jax.configs import common, pseg
from ovseg_jax.pretrained.published import IMAGENET


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; keys of `arg` stand below, an unknown one or one without effect is an error."""
    args = parse_arg(
        arg,
        data=("scenes", "sets"),
        # All others but the seed are of data=sets.
        eval_sets="data/sets",  # a folder that holds the sets by name
        sets="VOC;Context;COCO-Object",  # others: LVIS, ImageNet-S
        sets_are=("prepared", "folders"),
        background=True,
        weights="hf:nvidia/groupvit-gcc-redcaps",  # papers/002, C.3; or a folder
        prompt="a photo of a {}.",
        normalise=False,  # each template's embedding, before the mean over them
        seed=0,
    )
    config = scenes() if args.data == "scenes" else published(args)
    config.seed = args.seed
    args.check_read()
    return config


def scenes() -> ConfigDict:
    """Returns GroupViT's grouping for images of 64 pixels. All numbers are ours."""
    config = pseg.get_config("ahead=false")
    del config["pseudo_masks"]
    config.loss.mask_weight = 0.0
    config.model = dict(
        network="groupvit",
        patch=8,
        width=64,
        heads=4,
        mlp_dim=128,
        grid=(8, 8),
        depths=(3, 2, 1),
        tokens=(16, 8, 0),
        groups=(16, 8, 8),
        embed_dim=64,
        projection=64,
        projection_norm=False,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        dtype="float32",
    )
    return config


def published(args: Args) -> ConfigDict:
    """Returns the published model and its evaluation."""
    config = common.run(
        "groupvit",
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
    config.data.train = [next(iter(config.final_evals.values())).source]  # only its classes are read
    return config
