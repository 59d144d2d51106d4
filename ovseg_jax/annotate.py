"""The command that annotates images by other models: `python -m ovseg_jax.annotate --images=DIR --out=DIR2 ...`."""

import argparse
from collections.abc import Sequence

from ovseg_jax.annotation.workflow import Rules
from ovseg_jax.cli.console import FAILED, Parser, run_command, start

_DESCRIPTION = """\
Annotates images by other models: tags, captions, boxes, captions of regions, masks (UMG-CLIP's workflow, papers/003).

  python -m ovseg_jax.annotate --images=DIR --out=DIR2 --captions=blip2 --boxes=owlv2,labels=coco_things --masks=sam

Each kind of annotation comes from plugs, NAME,key=value,...; with several flags of a kind the plugs vote. NAME is one
of those below, or "module:function" of yours. Weights come from the hub, or model=FOLDER.
  --tags             qwen_vl; towers,classes=FILE (our CLIP and EVA-CLIP, in JAX)
  --captions         blip2, florence2, qwen_vl; prompts="A;B"
  --scores           towers; towers,model=WORKDIR of a run: the captions with the lowest scores are dropped
  --boxes            grounding_dino,labels=FILE; owlv2,labels=FILE; rt_detr
  --region_captions  blip2, florence2, qwen_vl
  --masks            sam, sam2, sam3: of boxes; those that change when their box moves are dropped
  --stuff            mask2former, oneformer: backgrounds
DIR2 gets the layout of `data.sources.folder`, UMG-41M's JSON, COCO's panoptic files, statistics and pictures. If the
command was stopped, run it again to continue; images that failed are listed in failed.json and tried again. Rules
marked "kept" choose among the annotations that were made, so they may change without annotating again. Several
processes on this machine: --runner=direct (`pip install -e '.[prepare]'`); many machines: --runner=DataflowRunner
--beam=--project=P ... with folders in a bucket, SparkRunner or FlinkRunner. It has run on Beam's direct and portable
runners on one machine, not yet on Dataflow, Spark or Flink.
"""

_RULES = {
    "tag_votes": "number of plugs that must give a tag",
    "box_score": "least confidence of a box",
    "box_iou": "largest IoU of two boxes",
    "shift": "largest move of a box, in shares of its sides, to test the stability of its mask",
    "score_regions": "also score labels and captions of regions",
    "stuff_regions": "give backgrounds boxes and captions too",
    "caption_quantile": "kept: share of captions to drop by their score",
    "caption_score": "kept: least score of a caption",
    "region_quantile": "kept: share of scored labels and captions of regions to drop",
    "region_score": "kept: least score of the label or a caption of a region",
    "stability": "kept: least stability of a mask",
    "visible": "kept: least visible share of a mask",
    "stuff_area": "kept: least visible pixels of a background",
}
_KINDS = ("tags", "captions", "scores", "boxes", "region_captions", "masks", "stuff")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status is 1 also if some images could not be annotated."""
    return run_command(parser, _run, argv)


def parser() -> Parser:
    """Returns the command's parser."""
    parser = Parser("annotate", _DESCRIPTION)
    add = parser.add_argument
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--images", default="", metavar="DIR", help="a folder of images")
    where.add_argument(
        "--data", default="", metavar="NAME,KEY=VALUE,...", help="or a source, as in a config's data"
    )
    add("--out", required=True, metavar="DIR", help="the folder to write to")
    for kind in _KINDS:
        add(f"--{kind}", action="append", default=[], metavar="PLUG", help="see above")
    for name, text in _RULES.items():
        default = getattr(Rules(), name)
        if isinstance(default, bool):
            add(f"--{name}", action="store_true", help=text)
        else:
            add(
                f"--{name}",
                type=type(default),
                default=default,
                metavar="X",
                help=f"{text} (default %(default)s)",
            )
    add("--batch", type=int, default=8, metavar="N", help="images at once (default %(default)s)")
    add("--shard", type=int, default=256, metavar="N", help="images of a unit of work (default %(default)s)")
    add(
        "--runner",
        default="",
        metavar="NAME",
        help="direct, for processes on this machine, or a runner of Beam",
    )
    add(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes of --runner=direct (default: its cores)",
    )
    add("--beam", action="append", default=[], metavar="OPTION", help="an option of the runner, --NAME=VALUE")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from ovseg_jax.annotation.plug import parse_plug
    from ovseg_jax.annotation.run import Runner, annotate_source
    from ovseg_jax.experiment.transfer_table import read_source

    source = (
        read_source(arguments.data)
        if arguments.data
        else {"name": "ovseg_jax.annotation.run:Images", "data_dir": arguments.images}
    )
    done = annotate_source(
        source,
        {kind: [parse_plug(text) for text in getattr(arguments, kind)] for kind in _KINDS},
        Rules(**{name: getattr(arguments, name) for name in Rules._fields}),
        arguments.out,
        arguments.batch,
        arguments.shard,
        Runner(arguments.runner, arguments.workers, arguments.beam),
    )
    found = done.statistics
    print(
        f"{done.made} images annotated, {done.there} before, {len(done.failed)} failed; {found['regions']} regions of "
        f"{found['categories']} categories. {arguments.out} holds sheet.png, worst.png and statistics.json"
    )
    if done.failed:
        name, reason = next(iter(done.failed.items()))
        print(f"{name}: {reason}" + (", and others in failed.json" if len(done.failed) > 1 else ""))
    return FAILED if done.failed else 0


if __name__ == "__main__":
    start(main)
