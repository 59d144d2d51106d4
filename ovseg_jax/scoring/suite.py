"""`score suite`: a trained classifier on the data sets of a suite."""

import argparse

from ovseg_jax.experiment.scores import CROSS_DATASET, CROSS_DOMAIN, UMG_CLIP, score_suite

_DESCRIPTION = """\
Scores a trained classifier zero-shot on the data sets of a suite, and compares it with a hand-written prompt.

  python -m ovseg_jax.score suite --checkpoint=runs/pomp --suite=pomp --data_dir=../sets --out=scores.csv

A suite is one of
  cross-dataset  the ten of POMP's table 2: {cross_dataset}
  cross-domain   its four variants of ImageNet: {cross_domain}
  imagenet21k    validation images of ImageNet-21K
  pomp           all of these
  umg_clip       the 21 of UMG-CLIP's table 2, by the classifier's own prompt: {umg_clip}
or a JSON file, {{"sets": {{NAME: {{...}}}}}}, where a set may have
  metric     the main metric: accuracy (default), per_class, harmonic, ...
  average    the average that it counts in
  prompts    {{NAME: template, list of templates, imagenet | simple | vild, or FILE.json}}
  tfds       name of a TFDS data set in DIR, in place of a folder
  split, names, ...   arguments of its data source, image_folder, prepared or tfds
  limit      N: use only the first N images
The images of a set lie in DIR/NAME/CLASS, DIR/NAME/test/CLASS or DIR/NAME/val/CLASS; the optional DIR/NAME/names.txt
(or names.json) gives the class name of each folder; folders named by WordNet ids need it, or classnames.txt,
LOC_synset_mapping.txt or words.txt. A class counts by its first name. Or DIR/NAME was written by `python -m
ovseg_jax.prepare`, which reads each set of these suites by its name, such as country211, or by `coop` if CoOp has a
split file for it: the split test, or else val, is scored. A set without a folder is listed as missing, and each
average states how many sets it covers. A set whose main metric is not accuracy has a second line with its accuracy,
and an average of such sets is printed twice: of the main metric of each (POMP's table 11 names the mean over classes
for caltech101, oxford_pets, flowers102 and fgvc_aircraft), and of the accuracy of all (which the authors' evaluation
prints, and POMP's table 2 is made of). If the command was stopped, run it again with the same --out to continue.
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the description and the flags."""
    parser.description = _DESCRIPTION.format(
        cross_dataset=" ".join(CROSS_DATASET),
        cross_domain=" ".join(CROSS_DOMAIN),
        umg_clip=" ".join(UMG_CLIP),
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="WORKDIR", help="the folder (or bucket) of a training run")
    add("--suite", required=True, metavar="NAME|FILE", help="the data sets, see above")
    add("--data_dir", required=True, metavar="DIR", help="the folder that holds each set as DIR/NAME")
    add("--out", metavar="FILE.csv", help="also write all scores, a line for each set and prompt")
    add("--batch", type=int, default=64, metavar="N", help="images at once (default %(default)s)")
    add("--step", type=int, metavar="N", help="the checkpoint of this step (default: the latest)")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command, which prints its scores set by set."""
    score_suite(**vars(arguments))
