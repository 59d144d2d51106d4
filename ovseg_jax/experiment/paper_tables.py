"""Published tables of scores as data: what `configs/tables` holds and `report` compares runs with."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ovseg_jax.errors import UserError

SUITE = "suite:"
"""Prefix of the key of a score of `score suite`, as "suite:dtd/accuracy[hard]", or of an average, as
"suite:cross-domain/accuracy"."""

Value = float | str | None


class Row(NamedTuple):
    """A row of a table.

    Attributes:
      name: short, without spaces, commas and slashes, since it is typed in a command and names a folder.
      values: the published scores in the order of the table's columns, or texts where the table has no scores; None
        where the paper has none.
      keys: where a run's own scores come from, a key for each column: of its `summary.json`, or one with `SUITE`; ""
        where a run gives none; "a&b" for the mean of two. Empty for a row that cannot be run.
      config: the file in `configs/` that trains the row's run, such as "openseg"; "" if none does.
      args: its argument.
      overrides: the keys that `--config.key=value` sets beside it.
      after: a command that scores the finished run in its folder WORKDIR; "" if training already does.
      differs: how the run differs from the paper's, or "".
      why: why the row cannot be run, which then has no config.
    """

    name: str
    values: tuple[Value, ...]
    keys: tuple[str, ...] = ()
    config: str = ""
    args: str = ""
    overrides: Mapping[str, str | int | float | bool] = {}
    after: str = ""
    differs: str = ""
    why: str = ""

    @property
    def recipe(self) -> tuple[Any, ...]:
        """What decides the run: rows with the same recipe share one."""
        return self.config, self.args, tuple(sorted(self.overrides.items()))

    @property
    def command(self) -> str:
        """Returns the command that trains the row's run, without `configs/tables`; "" if there is none."""
        if not self.config:
            return ""
        arg = f":{self.args}" if self.args else ""
        config = f"--config=configs/{self.config}.py{arg}"
        keys = [f"--config.{key}={value}" for key, value in self.overrides.items()]
        quoted = f'"{config}"' if re.search(r"[; ]", config) else config
        return " ".join(["python -m ovseg_jax.main", quoted, *keys])


class PaperTable(NamedTuple):
    """A table of a paper.

    Attributes:
      paper: the file in `configs/tables/`, such as "openseg".
      number: the number in the paper, appendix included.
      title: one line.
      columns: the titles of the columns.
      rows: the rows in the paper's order.
    """

    paper: str
    number: int
    title: str
    columns: Sequence[str]
    rows: Sequence[Row]

    def place(self, row: Row) -> str:
        """Returns the identity of a row, as a run's config holds it: "openseg:table=2,row=LSeg+"."""
        return f"{self.paper}:table={self.number},row={row.name}"

    def command(self, row: Row) -> str:
        """Returns the command that trains the row's run."""
        return f"python -m ovseg_jax.main --config=configs/tables/{self.place(row).replace(':', '.py:')}"


def find_row(tables: Iterable[PaperTable], table: str, row: str) -> tuple[PaperTable, Row]:
    """Returns a row and its table by number and name.

    Raises:
      UserError: there is none; the message lists the tables, or the rows of the table.
    """
    numbers = {str(each.number): each for each in tables}
    if table not in numbers:
        raise UserError(f"table={table or '(missing)'}: the tables are {', '.join(numbers)}")
    found = numbers[table]
    rows = {each.name: each for each in found.rows}
    if row not in rows:
        close = difflib.get_close_matches(row, rows, 1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UserError(
            f"table={table},row={row or '(missing)'}{hint}: the rows of table {table} are {', '.join(rows)}"
        )
    return found, rows[row]


def list_rows(tables: Iterable[PaperTable]) -> str:
    """Returns every row with its published scores, and its commands or why it cannot be run."""
    lines: list[str] = []
    for table in tables:
        lines += [f"{table.paper}, table {table.number}: {table.title}", f"  {' | '.join(table.columns)}"]
        for row in table.rows:
            lines.append(f"  {row.name}: {' | '.join(map(shown, row.values))}")
            if row.config:
                lines += [f"    {table.command(row)}", f"      = {row.command}"]
            for title in ("after", "differs", "why"):
                if said := getattr(row, title):
                    label = {"why": "cannot be run", "differs": "differs from the paper"}.get(title, title)
                    lines.append(f"    {label}: {said}")
        lines.append("")
    return "\n".join(lines[:-1])


def shown(value: Value) -> str:
    """Formats a score as the papers do; "-" for none."""
    if isinstance(value, float):
        return f"{value:.1f}"
    return "-" if value is None else str(value)
