"""A prompt put to segmentation: `python -m ovseg_jax.transfer --proposals=WORKDIR --checkpoint=WORKDIR2`."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
from ml_collections import ConfigDict

from ovseg_jax.cli.console import complain, quieten, use_compilation_cache
from ovseg_jax.data.source_base import check_provides
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.load import load_run
from ovseg_jax.experiment.transfer import FILLS, TransferEvaluator, rules_of
from ovseg_jax.parallel.sharding import make_mesh
from ovseg_jax.protocols import Classifier, Segmenting
from ovseg_jax.towers.prompt_file import Prompt
from ovseg_jax.towers.templates import TEMPLATES, read_templates
from ovseg_jax.vocab.splits import UNSEEN, load_split

_DESCRIPTION = """\
Segments with the masks of one run and the classifier of another (ZSSeg's two stages; POMP's tables 4, 5 and 13), and
scores each prompt: a line for each, in percent.

  python -m ovseg_jax.transfer --proposals=runs/openseg --checkpoint=runs/pomp
  python -m ovseg_jax.transfer --proposals=runs/openseg --checkpoint=runs/pomp \\
      --data=coco,data_dir=../coco_stuff,split=val2017 --split=coco_stuff

A proposal's class is judged twice, by the proposal network (p) and, cut out, by the classifier (q). Classes that the
proposal network was trained with score p^w q^(1-w), all others p^(1-w) q^w; --ensemble=0 is q alone. mIoU divides by
the classes in truth or prediction, mIoU_gt by those in truth; hIoU is the harmonic mean over seen and unseen classes.
"""

LEARNED, SINGLE = "learned", "single"
HARD = {SINGLE: ("a sculpture of a {}.",)}
"""The single prompt of papers/000, table 13."""

# Column, metric, as in `evals.confusion.scores`.
_COLUMNS = (
    *(("mIoU", "miou"), ("mIoU_gt", "miou_gt"), ("fwIoU", "fwiou"), ("mACC", "macc"), ("pACC", "pacc")),
    *(("hIoU", "hiou"), ("hIoU_gt", "hiou_gt"), ("seen", "miou/seen"), ("unseen", "miou/unseen")),
    *(("held_out", "miou/held_out"), ("chance", "chance_miou")),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; its exit status: 0, or 2 for a wrong request."""
    arguments = _parser().parse_args(argv)
    quieten()
    try:
        return _run(arguments)
    except UserError as error:
        return complain(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ovseg_jax.transfer",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--proposals", required=True, metavar="WORKDIR", help="a training run that proposes masks")
    add("--checkpoint", required=True, metavar="WORKDIR", help="a training run that classifies images")
    add(
        "--data",
        metavar="NAME,KEY=VALUE,...",
        help="a source of images with segments, such as folder,data_dir=DIR,kind=semantic; by default what the run "
        "of --proposals is evaluated on at its end",
    )
    add(
        "--split",
        metavar="NAME|TEXT|FILE.json",
        help=f"the unseen classes: {' or '.join(UNSEEN)}, 'cow; giraffe; ...', or a file that lists them; by default "
        "the data's own groups, and where it has none all classes are unseen, as in a cross-dataset evaluation",
    )
    add("--ensemble", type=float, default=0.8, metavar="W", help="w, see above (default %(default)s)")
    add(
        "--prompts",
        default=f"{SINGLE}; imagenet; vild; {LEARNED}",
        metavar="A;B;...",
        help=f"of {LEARNED} (the classifier's own), {', '.join((*HARD, *TEMPLATES))}, a template with {{}}, "
        "or FILE.json (default '%(default)s')",
    )
    add(
        "--threshold",
        type=float,
        default=0.5,
        metavar="T",
        help="mask value of a crop's pixels (default %(default)s)",
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
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from ovseg_jax.data.pipeline import eval_batches, make_source  # grain's import takes long

    # What can be wrong with the request is found before a model is loaded.
    prompts = read_prompts(arguments.prompts)
    mesh = make_mesh()
    proposals = load_run(
        arguments.proposals, mesh, kind=Segmenting, key="--proposals", lacking="proposes no masks"
    )
    classifier = load_run(arguments.checkpoint, mesh, kind=Classifier, lacking="classifies no images")
    evaluation = evaluation_of(proposals.config, arguments)
    source = make_source(evaluation.pop("source"))
    check_provides(source, ("image", "segments", "class_ids"), "--data")
    classes = load_split(source.classes, arguments.split) if arguments.split else source.classes
    processes = jax.process_count()
    batch_size = int(evaluation.pop("batch_size"))
    if batch_size < 1 or batch_size % processes:
        raise UserError(f"--batch={batch_size} does not divide by {processes} processes")
    batches = partial(
        eval_batches,
        source,
        {"data": {**proposals.config.data, "task": "segmentation", **evaluation}},
        batch_size=batch_size // processes,
        process_index=jax.process_index(),
        process_count=processes,
        limit=arguments.limit if arguments.limit is not None else evaluation.get("limit"),
    )
    rules = rules_of(proposals, classifier.config, arguments.ensemble, arguments.threshold, arguments.fill)
    evaluator = TransferEvaluator(
        "transfer", proposals, classifier.method, classes, batches, mesh, rules=rules, prompts=prompts
    )
    found = evaluator.compare(classifier.variables)
    if jax.process_index() == 0:
        print(table(found))
    return 0


def read_prompts(text: str) -> dict[str, tuple[str, ...] | Prompt | None]:
    """Each prompt of a list "single; vild; learned" as `read_templates` gives it; None for the classifier's own.

    Raises:
      UserError: the list is empty, or a prompt is none.
    """
    names = [name for part in text.split(";") if (name := part.strip())]
    if not names:
        raise UserError(f"--prompts={text!r} names no prompt: say for example --prompts='vild; {LEARNED}'")
    return {name: None if name == LEARNED else HARD.get(name) or read_templates(name) for name in names}


def evaluation_of(config: ConfigDict, arguments: argparse.Namespace) -> dict[str, Any]:
    """`source`, `batch_size` and what else of `config.data` differs, by the flags or the run's own evaluation.

    Raises:
      UserError: there is neither.
    """
    own = [
        dict(e.items())
        for key in ("final_evals", "evals")
        for _, e in sorted((config.get(key) or {}).items())
    ]
    evaluation: dict[str, Any] = next((e for e in own if e.get("type", "segmentation") == "segmentation"), {})
    if arguments.data:
        evaluation = {"source": read_source(arguments.data), "batch_size": evaluation.get("batch_size", 8)}
    if not evaluation:
        raise UserError(
            f"the run --proposals={arguments.proposals} was evaluated on nothing: say --data=NAME,KEY=VALUE,..."
        )
    if arguments.batch is not None:
        evaluation["batch_size"] = arguments.batch
    kept = ("source", "batch_size", "image_size", "label_size", "max_segments", "limit")
    return {key: evaluation[key] for key in kept if evaluation.get(key) is not None}


def read_source(text: str) -> dict[str, Any]:
    """What `make_source` takes from "coco,data_dir=DIR,split=val2017": whole numbers and true, false are read as such.

    Not in what is text by its nature: paths, splits and names of files.

    A value goes on to the next `,key=`, so that a path may hold commas.
    """
    name, *items = text.split(",")
    settings: list[str] = []
    for item in items:
        if "=" in item or not settings:
            settings.append(item)
        else:
            settings[-1] += "," + item
    pairs = [setting.partition("=") for setting in settings]
    if wrong := [key for key, equals, _ in pairs if not equals]:
        raise UserError(f"--data={text}: {wrong[0]!r} is not of the form key=value")
    words = {"true": True, "false": False}
    read = lambda v: int(v) if v.isdecimal() else words.get(v.lower(), v)
    return {
        "name": name.strip(),
        **{k.strip(): v if _is_text(k.strip()) else read(v) for k, _, v in pairs},
    }


def _is_text(key: str) -> bool:
    return key.endswith("dir") or key in ("split", "names", "labels", "group")


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """A line for each prompt; columns that no prompt has a number for are left out."""
    columns = [(title, key) for title, key in _COLUMNS if any(key in scores for scores in found.values())]
    width = max(12, *(len(name) + 2 for name in found))
    lines = ["prompt".ljust(width) + "".join(f"{title:>9}" for title, _ in columns)]
    for name, scores in found.items():
        cells = (f"{scores[key]:9.2f}" if key in scores else " " * 9 for _, key in columns)
        lines.append(name.ljust(width) + "".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    use_compilation_cache()
    sys.exit(main())
