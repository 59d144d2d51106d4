"""ZSSeg (Xu et al. 2021): masks of a MaskFormer, classified by CLIP in a learned prompt (papers/000, Tables 4, 5, 13).

  python -m ovseg_jax.main --config=configs/zsseg.py
      on `scenes`: first the CLIP and the prompt of configs/pomp.py, and a MaskFormer that embeds class names by learned
      vectors of their words; then the prompt goes on learning from segments, and both segment the test images.
  python -m ovseg_jax.main --config=configs/zsseg.py:data=prepared,data_dir=DIR,unseen=coco_stuff,init=FILE
      in this order: the prompt of FILE (or noise) learns from the segments of the 156 seen classes, a MaskFormer is
      trained on these classes with the prompt around their names, and both segment the validation images. DIR is what
      `python -m ovseg_jax.prepare coco_stuff` writes; with unseen=voc voc_2012, whose split trainaug is trained on.
  python -m ovseg_jax.main --config=configs/zsseg.py:data=prepared,data_dir=DIR,trained=all,eval_sets=DIR2,init=FILE
      trains the MaskFormer on all classes, and also segments DIR2/ADE20K and DIR2/PC-59.
`prompt=FILE`, `single`, `imagenet` or `vild` takes a prompt as it is, which then learns nothing (Table 13).

Published (Table 4): hIoU of 39.1 on COCO-Stuff and 84.4 on VOC. None of these scores has been reproduced yet. Numbers
are those of the authors' copy of ZSSeg, amazon-science/prompt-pretraining, third_party/zsseg.baseline/configs; more of
them stand in configs/maskformer.py and configs/pomp_segments.py, which the stages are made of.
"""

from typing import Any

from ml_collections import ConfigDict

from ovseg_jax.config import Args, AtLeast, parse_arg
from ovseg_jax.configs import common, maskformer, pomp_segments
from ovseg_jax.errors import UserError
from ovseg_jax.towers.prompt_file import FILE, is_prompt_file

NAMES = {"coco_stuff": "COCO-Stuff", "voc": "VOC"}
SPLITS = {"coco_stuff": "train", "voc": "trainaug"}  # appendix B: VOC with the augmented annotations
HARD = dict(single="a sculpture of a {}.", imagenet="imagenet", vild="vild")  # appendix B
# Threshold of the masks that are cut out, and w of `methods.zsseg`. On PC-59 w is 0.2 with POMP's prompts, and 0.4 with
# others.
OTHERS = {"ADE20K": (0.4, 0.5), "PC-59": (0.5, 0.4)}
POMP_ON_PC59 = 0.2


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; keys of `arg` stand below, an unknown one or one without effect is an error."""
    args = parse_arg(
        arg,
        data=("scenes", "prepared"),
        data_dir="",
        unseen=tuple(NAMES),  # data=prepared: which data set it is, by its unseen classes
        # data=prepared: the classes that the MaskFormer is trained on; all: Tables 5 and 13
        trained=("seen", "all"),
        eval_sets="",  # data=prepared: a folder of ADE20K and PC-59, other sets to segment
        prompt="learned",  # data=prepared: or single, imagenet, vild, or a prompt's file, which are taken as they are
        init="",  # prompt=learned: the prompt's file that learning starts from; noise by default
        length=AtLeast(16, 1),  # prompt=learned or a file: its vectors
        backbone=("resnet101", "resnet50"),  # data=prepared
        weights="",  # data=prepared: CLIP's, if not on the hub: a folder
        seed=0,
    )
    config = on_scenes(args) if args.data == "scenes" else on_prepared(args)
    args.check_read()
    return config


def on_scenes(args: Args) -> ConfigDict:
    """Returns both stages on the embedded data (ours)."""
    config = pomp_segments.get_config(f"proposals=stage:maskformer,seed={args.seed}")
    first = maskformer.get_config(f"classes=text,seed={args.seed}")
    first.evals = first.final_evals = {}
    config.stages = [stage for stage in config.stages if stage["name"] != "proposals"]
    config.stages += common.train_stages(maskformer=first)
    config.final_evals.segmentation.ensemble = 0.8
    return config


def on_prepared(args: Args) -> ConfigDict:
    """Returns the authors' recipe; the run itself has no steps, and only segments.

    Raises:
      UserError: `data_dir` is missing, or `prompt` is unknown.
    """
    if not args.data_dir:
        raise UserError("data=prepared needs data_dir=DIR")
    learned, file = args.prompt == "learned", is_prompt_file(args.prompt)
    if not (learned or file or args.prompt in HARD):
        raise UserError(f"prompt={args.prompt} is not learned, {', '.join(HARD)}, or the file of a prompt")
    name, seed = NAMES[args.unseen], f"seed={args.seed}"
    data = f"data=prepared,data_dir={args.data_dir}"
    clip = lambda key: f",{key}={args.weights}" if args.weights else ""

    def segments(init: str, length: int = 0) -> ConfigDict:
        start = f",init={init}" if init else ""
        found = pomp_segments.get_config(
            f"{data},unseen={args.unseen},length={length or args.length}{start}{clip('weights')},{seed}"
        )
        found.data.train[0]["of"]["split"] = SPLITS[args.unseen]
        return found

    stages: dict[str, ConfigDict] = {}
    if learned:
        stages["prompt"] = segments(args.init)
        place = f"stage:prompt/{FILE}"
        config = segments(place)
    else:
        place = args.prompt if file else HARD[args.prompt]
        # Beside hard prompts a run also scores its own, which has these words.
        config = segments(place) if file else segments("a sculpture of a", 4)
    config.steps = 0
    unseen = f",unseen={args.unseen}" if args.trained == "seen" else ""
    stages["maskformer"] = maskformer.get_config(
        f"classes=text,{data},backbone={args.backbone},prompt={place}{unseen}{clip('text_weights')},{seed}"
    )
    stages["maskformer"].data.train[0]["split"] = SPLITS[args.unseen]
    config.stages = common.train_stages(**stages)
    prompts = {} if learned or file else {args.prompt: place}
    config.final_evals = {
        name: transfer(
            args.data_dir, prompts, ensemble=pomp_segments.ENSEMBLE[args.unseen], split=args.unseen
        )
    }
    for other, (threshold, ensemble) in OTHERS.items() if args.eval_sets else ():
        if other == "PC-59" and (file or (learned and args.init)):
            ensemble = POMP_ON_PC59
        config.final_evals[other] = transfer(
            f"{args.eval_sets}/{other}", prompts, ensemble=ensemble, threshold=threshold
        )
    return config


def transfer(folder: str, prompts: dict[str, str], **own: Any) -> dict[str, Any]:
    """Returns the evaluation of both stages on a set; without `split` no class counts as seen."""
    source = dict(name="prepared", data_dir=folder, split="val")
    return dict(
        type="transfer",
        source=source,
        proposals="stage:maskformer",
        batch_size=8,
        prompts=prompts,
        fill="mean",
        **own,
    )
