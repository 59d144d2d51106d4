"""The command that opens a page to segment pictures by words: `python -m ovseg_jax.demo --checkpoint=WORKDIR`."""

import argparse
from collections.abc import Sequence

from ovseg_jax.cli.console import NameOrList, Parser, run_command, start, texts_folder
from ovseg_jax.errors import UserError

_DESCRIPTION = """\
Serves a page, on this machine alone, to try a model in a browser (needs the extra `demo`).

  python -m ovseg_jax.demo --checkpoint=runs/openseg
  python -m ovseg_jax.demo --checkpoint=runs/openseg --checkpoint=runs/pseg
  python -m ovseg_jax.demo --model=tipsv2_l14 --words=lvis.txt --port=7861

Upload a picture or pick one, type words, and see coloured segments with a legend; point at one for its word and score,
click to ask what is there. Two models stand side by side. Nothing leaves the machine, and no visitor sees another's
picture.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run_command(parser, _run, argv)


def parser() -> Parser:
    """Returns the command's parser."""
    from ovseg_jax.methods.published import listed

    parser = Parser("demo", _DESCRIPTION)
    add = parser.add_argument
    add(
        "--checkpoint",
        action="append",
        metavar="WORKDIR",
        help="the folder (or bucket) of a training run; twice for two models side by side",
    )
    add(
        "--model",
        action=NameOrList,
        listed=listed,
        metavar="NAME",
        help="a published model in place of, or beside, a --checkpoint; --model=list lists them",
    )
    add("--weights", metavar="PATH", help="with --model: the folder or file of its weights")
    add(
        "--words",
        metavar="FILE",
        help="the label file whose names a click chooses from (default: the first name of each category of the "
        "shipped ones, 240); they are embedded at the first click, which takes long for a large text tower on a CPU",
    )
    add("--images", metavar="FOLDER", help="pictures to pick (default: drawn ones, of the embedded scenes)")
    add("--port", type=int, default=7860, metavar="N", help="the port of the page (default %(default)s)")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from ovseg_jax.data.images import list_images, read_image
    from ovseg_jax.data.sources.build import make_source
    from ovseg_jax.inference.segmenter import Segmenter
    from ovseg_jax.page.app import Model, Page, serving
    from ovseg_jax.vocab.classes import LABEL_FILES, read_label_file, read_words

    runs = arguments.checkpoint or []
    if not 1 <= len(runs) + bool(arguments.model) <= 2:
        raise UserError(
            "give one or two models: --checkpoint, a run, or --model, a published one (--model=list)"
        )
    if arguments.weights and not arguments.model:
        raise UserError("--weights needs --model")
    if not 0 < arguments.port < 65536:
        raise UserError(f"--port={arguments.port} is not a port: give one from 1 to 65535")
    lists = [read_label_file(name) for name in LABEL_FILES]
    if arguments.words:
        lists.insert(0, read_words(arguments.words))
        words = lists[0].flat()[0]
    else:
        words = [each.display(k) for each in lists for k in range(len(each))]
    if arguments.images:
        examples = [read_image(path) for path in list_images(arguments.images)[:24]]
    else:
        scenes = make_source({"name": "scenes", "split": "validation", "size": "small", "num_examples": 8})
        examples = [scenes[i]["image"] for i in range(8)]
    texts = texts_folder()
    models = [Model(Path(run).name, Segmenter.from_checkpoint(run, texts=texts)) for run in runs]
    if arguments.model:
        published = Segmenter.from_pretrained(arguments.model, arguments.weights or "", texts=texts)
        models.append(Model(arguments.model, published))
    with serving(Page(models, lists, words, examples), arguments.port) as blocks:
        print(f"the page is at {blocks.local_url} (Ctrl-C ends it)", flush=True)
        blocks.block_thread()


if __name__ == "__main__":
    start(main)
