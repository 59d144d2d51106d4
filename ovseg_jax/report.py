"""The command that prints runs beside the papers' tables: `python -m ovseg_jax.report WORKDIR... [--html=FILE]`."""

import argparse
import sys
from collections.abc import Sequence

from ovseg_jax.cli.console import Parser, run_command, start
from ovseg_jax.errors import UserError

_DESCRIPTION = """\
Prints the scores of finished runs below the rows of the papers that they were started from, as Markdown.

  python -m ovseg_jax.report --list
      every row of every table, with its published scores, and its command or why it cannot be run
  python -m ovseg_jax.main --config=configs/tables/openseg.py:table=5,row=noun+adj
      the run of a row
  python -m ovseg_jax.report runs/a runs/b --out=report.md --png=report.png
  python -m ovseg_jax.report runs/a runs/b --html=report.html
      any runs, also unfinished ones, on one page: table of scores, differing keys, curves, pictures

A run stands below every row of the same arguments, also those of other tables. Scores of `score suite` count if it
wrote them to WORKDIR/scores.csv.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run_command(parser, _run, argv)


def parser() -> Parser:
    """Returns the command's parser."""
    parser = Parser("report", _DESCRIPTION)
    add = parser.add_argument
    add("workdirs", nargs="*", metavar="WORKDIR", help="the folder (or bucket) of a run")
    add("--list", action="store_true", help="print all rows with their commands instead")
    add("--out", metavar="FILE.md", help="also write the Markdown into a file")
    add("--png", metavar="FILE.png", help="also draw the tables")
    add("--html", metavar="FILE.html", help="write a page of all runs, in place of the tables of papers")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    from ovseg_jax.cli.outputs import check_out_file
    from ovseg_jax.configs.tables import all_tables
    from ovseg_jax.experiment import paper_report, paper_tables, run_page
    from ovseg_jax.files import write_whole

    if arguments.list == bool(arguments.workdirs):
        raise UserError("give either the folders of finished runs, or --list")
    if arguments.list:
        if arguments.out or arguments.png or arguments.html:
            raise UserError("--list only prints, so --out, --png and --html have no effect")
        print(paper_tables.list_rows(all_tables()))
        return
    for flag, out, suffix in (
        ("--out", arguments.out, ".md"),
        ("--png", arguments.png, ".png"),
        ("--html", arguments.html, ".html"),
    ):
        if out:
            check_out_file(out, {}, flag)
            # So that a mistyped path replaces no file of a run.
            if not out.lower().endswith(suffix):
                raise UserError(f"{flag}={out} must end in {suffix}")
    workdirs = list(dict.fromkeys(arguments.workdirs))
    if arguments.html:
        for sentence in run_page.write(arguments.html, workdirs):
            print(sentence, file=sys.stderr)
        if not arguments.out and not arguments.png:
            return
    runs = [paper_report.read_run(workdir) for workdir in workdirs]
    found = list(paper_report.compare(all_tables(), runs))
    placed = {line.name for _, lines, _ in found for line in lines if line.run}
    for run in runs:
        if run.line not in placed:
            print(
                f"{run.workdir} belongs to no row of a table: start it from configs/tables", file=sys.stderr
            )
    if not found:
        raise UserError("none of the runs belongs to a row of a table; --list shows the rows")
    content = paper_report.markdown(found)
    print(content, end="")
    if arguments.out:
        write_whole(arguments.out, content)
    if arguments.png:
        paper_report.draw(found, arguments.png)


if __name__ == "__main__":
    start(main, compiles=False)
