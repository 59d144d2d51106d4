"""The report of a kind of `score`: a grid of scores, a row for each class, and what was left out."""

import argparse
import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ovseg_jax.cli.outputs import check_out_file
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.tables import Cell, Table
from ovseg_jax.files import write_whole

_SHOWN = 64
"""The most classes that are printed; more are only written."""


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a kind of `score`.

    Attributes:
      kind: the kind.
      scores: {row: {column: value}}, such as {"things": {"PQ": 50.1}}; in percent; None where a score is undefined,
        because no class or image counts.
      classes: a row for each class with the same keys, the first "class"; None where a value is undefined.
      facts: what the scores are about, by name: number of images, protocol, ignored values.
      skipped: the names of what was left out, by reason; see `files.Skips`.
    """

    kind: str
    scores: Mapping[str, Mapping[str, float | None]]
    classes: Sequence[Mapping[str, Cell]] = ()
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    skipped: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    def text(self) -> str:
        """Formats the report: classes, then facts and what was left out, then scores, with "-" where undefined."""
        lines = []
        if 0 < len(self.classes) <= _SHOWN:
            first, *columns = self.classes[0]
            table = Table({first: [str(row[first]) for row in self.classes]}, columns)
            rows = (table.line(row[first], *map(_cell, list(row.values())[1:])) for row in self.classes)
            lines += [table.head, *rows, ""]
        elif self.classes:
            lines += [f"{len(self.classes)} classes: --csv=FILE writes a line for each", ""]
        lines += [f"{name}: {_plain(value)}" for name, value in self.facts.items()]
        lines += [f"left out, {reason}: {_few(names)}" for reason, names in self.skipped.items()]
        columns = list(dict.fromkeys(column for row in self.scores.values() for column in row))
        table = Table({"": self.scores}, columns)
        lines.append(table.head)
        for name, row in self.scores.items():
            lines.append(table.line(name, *(_cell(row[c]) if c in row else None for c in columns)))
        return "\n".join(lines)

    def json(self) -> str:
        """Formats the report as JSON, with all digits, and null where a score is undefined."""
        left_out = {
            reason: {"count": len(names), "names": list(names)} for reason, names in self.skipped.items()
        }
        found = dataclasses.asdict(self) | {"skipped": left_out}
        return json.dumps(found, indent=1, ensure_ascii=False) + "\n"

    def csv(self) -> str:
        """Formats the classes as CSV, with all digits, and an empty cell where a value is undefined."""
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, list(self.classes[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.classes)
        return file.getvalue()


def _cell(value: Cell) -> Cell:
    return "-" if value is None else value


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _few(names: Sequence[str]) -> str:
    """Returns the number of names and the first three."""
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} ({', '.join(names[:3])}{more})"


def add_report_flags(parser: argparse.ArgumentParser, per_class: bool = True) -> None:
    """Adds the flags of the report's files.

    Args:
      parser: the parser of a kind.
      per_class: whether its report has rows for classes.
    """
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write the report as JSON into FILE; without FILE print it in place of the tables",
    )
    if per_class:
        parser.add_argument("--csv", metavar="FILE", help="write a line for each class into FILE")


def check_report_flags(arguments: argparse.Namespace, inputs: Mapping[str, str | None]) -> None:
    """Checks that the report's files can be written, before anything is scored.

    Args:
      arguments: the flags of a kind.
      inputs: its input files, by flag.

    Raises:
      UserError: one cannot be written, or is an input.
    """
    files = {flag: getattr(arguments, flag, None) for flag in ("json", "csv")}
    given = {f"--{flag}": path for flag, path in files.items() if path and path != "-"}
    for flag, path in given.items():
        check_out_file(path, inputs, flag)
    if len(set(given.values())) < len(given):
        raise UserError(f"--json and --csv name the same file {files['csv']}")


def publish(report: Report, arguments: argparse.Namespace) -> None:
    """Prints a report and writes its files; the flags are those of `add_report_flags`.

    Raises:
      UserError: a file cannot be written.
    """
    print(
        report.json() if arguments.json == "-" else report.text(), end="" if arguments.json == "-" else "\n"
    )
    if arguments.json not in (None, "-"):
        write_whole(arguments.json, report.json())
    if getattr(arguments, "csv", None):
        write_whole(arguments.csv, report.csv())
