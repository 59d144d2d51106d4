"""`score transfer`: the masks of one run under the classifier of another."""

import argparse

from ovseg_jax.experiment.transfer_table import HARD, LEARNED, SINGLE, compare_prompts
from ovseg_jax.methods.zsseg import FILLS
from ovseg_jax.vocab.splits import UNSEEN
from ovseg_jax.vocab.templates import TEMPLATES

_DESCRIPTION = """\
Segments with the masks of one run and the classifier of another (ZSSeg's two stages; POMP's tables 4, 5 and 13), and
prints the scores of each prompt in percent.

  python -m ovseg_jax.score transfer --proposals=runs/openseg --checkpoint=runs/pomp
  python -m ovseg_jax.score transfer --proposals=runs/openseg --checkpoint=runs/pomp \\
      --data=coco,data_dir=../coco_stuff,split=val2017 --split=coco_stuff

  python -m ovseg_jax.score transfer --proposals=masks.json --checkpoint=runs/pomp --ensemble=0 \\
      --data=folder,data_dir=../ade,kind=semantic

--proposals may also name masks of another program, such as MaskFormer's: a JSON file of COCO's results, or a folder of
NAME.npz with `masks` [n h w] and `scores` [n]. They have no scores of classes, so --ensemble must be 0.
Each proposal is classified twice: by the proposal network (p) and, as a crop of the image, by the classifier (q).
Classes that the proposal network was trained with score p^w q^(1-w), all others p^(1-w) q^w; --ensemble=0 is q alone.
mIoU averages over the classes in truth or prediction, mIoU_gt over those in the truth; hIoU is the harmonic mean of
the seen and the unseen classes' mIoU.
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the description and the flags."""
    parser.description = _DESCRIPTION
    add = parser.add_argument
    add("--proposals", required=True, metavar="WORKDIR|FILE.json|DIR", help="a training run, or masks")
    add("--checkpoint", required=True, metavar="WORKDIR", help="a training run that classifies images")
    add(
        "--data",
        metavar="NAME,KEY=VALUE,...",
        help="a source of images with segments, such as folder,data_dir=DIR,kind=semantic; by default that of the "
        "final evaluation of --proposals",
    )
    add(
        "--split",
        metavar="NAME|TEXT|FILE.json",
        help=f"the unseen classes: {' or '.join(UNSEEN)}, 'cow; giraffe; ...', or a file that lists them; by default "
        "the data's own groups; without any, all classes are unseen, as in a cross-dataset evaluation",
    )
    add("--ensemble", type=float, default=0.8, metavar="W", help="w, see above (default %(default)s)")
    add(
        "--prompts",
        default=f"{SINGLE}; imagenet; vild; {LEARNED}",
        metavar="A;B;...",
        help=f"each is {LEARNED} (the classifier's own), {', '.join((*HARD, *TEMPLATES))}, a template with {{}}, "
        "or FILE.json (default '%(default)s')",
    )
    add(
        "--threshold",
        type=float,
        default=0.5,
        metavar="T",
        help="mask value above which a pixel belongs to the crop (default %(default)s)",
    )
    add(
        "--fill",
        default="mean",
        choices=FILLS,
        help="colour around a crop: the mean of the classifier's images, or black (default %(default)s)",
    )
    add(
        "--batch",
        type=int,
        metavar="N",
        help="images at once (default: as in the evaluations of --proposals)",
    )
    add("--limit", type=int, metavar="N", help="only the first N images")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command and prints the scores of each prompt."""
    if table := compare_prompts(**vars(arguments)):
        print(table)
