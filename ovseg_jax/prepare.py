"""The command that prepares published data sets: `python -m ovseg_jax.prepare DATASET --source=DIR --out=DIR2`."""

import argparse
from collections.abc import Sequence

from ovseg_jax.cli.console import Parser, run_command, start
from ovseg_jax.errors import UserError

_DESCRIPTION = """\
Converts a data set, as it is downloaded, to ArrayRecord files that every method trains from.

  python -m ovseg_jax.prepare --list                names the data sets
  python -m ovseg_jax.prepare DATASET --list        says where its files come from, its licence, splits and options
  python -m ovseg_jax.prepare DATASET --source=DIR --out=DIR2

DIR holds the downloaded files, as archives or unpacked. If the command was stopped, run it again to continue: finished
shards are kept. The conversion is an Apache Beam pipeline, on this machine's cores or on any runner of Beam:
--runner=DataflowRunner --beam=--project=P --beam=--region=R with --source and --out in a bucket, SparkRunner or
FlinkRunner. It has run on Beam's own runners on one machine, not yet on Dataflow, Spark or Flink.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run_command(parser, _run, argv)


def parser() -> Parser:
    """Returns the command's parser."""
    parser = Parser("prepare", _DESCRIPTION)
    add = parser.add_argument
    add("dataset", nargs="?", default="", metavar="DATASET", help="its name, or module:Class of your reader")
    add("--source", default="", metavar="DIR", help="the folder with the downloaded files")
    add(
        "--out",
        default="",
        metavar="DIR",
        help="the folder to write to; more splits may be added to it later",
    )
    add(
        "--split", action="append", default=[], metavar="NAME", help="a split (default: all); may be repeated"
    )
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the data set")
    add("--list", action="store_true", help="print the information above, and prepare nothing")
    add("--workers", type=int, default=0, metavar="N", help="processes on this machine (default: its cores)")
    add(
        "--shard_examples",
        type=int,
        default=1024,
        metavar="N",
        help="examples in a file, more where there would be over 1024 files (default %(default)s)",
    )
    add("--runner", default="direct", metavar="NAME", help="direct (this machine), or a runner of Beam")
    add("--beam", action="append", default=[], metavar="OPTION", help="an option of the runner, --NAME=VALUE")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    from ovseg_jax.datasets.prepare import prepare
    from ovseg_jax.datasets.registry import describe, find_dataset, list_datasets

    if arguments.list:
        print(describe(find_dataset(arguments.dataset)) if arguments.dataset else list_datasets())
        return
    if missing := [flag for flag in ("dataset", "source", "out") if not getattr(arguments, flag)]:
        named = "a data set" if missing[0] == "dataset" else f"--{missing[0]}=DIR"
        raise UserError(f"name {named}: python -m ovseg_jax.prepare DATASET --source=DIR --out=DIR2")
    if wrong := [option for option in arguments.option if "=" not in option]:
        raise UserError(f"--option={wrong[0]} is not of the form NAME=VALUE")
    options = dict(option.split("=", 1) for option in arguments.option)
    if len(options) < len(arguments.option):
        raise UserError("an --option is given twice")
    manifest = prepare(
        find_dataset(arguments.dataset)(arguments.source, **options),
        arguments.out,
        arguments.split,
        arguments.shard_examples,
        arguments.runner,
        arguments.workers,
        arguments.beam,
    )
    for split, entry in manifest["splits"].items():
        size = sum(shard["bytes"] for shard in entry["shards"])
        print(f"{split}: {entry['examples']} examples, {len(entry['shards'])} files, {size / 1e9:.3g} GB")
        for note in entry["notes"]:
            print(f"  {note}")


if __name__ == "__main__":
    start(main, compiles=False)
