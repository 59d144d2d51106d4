"""Published tables of scores as data: what `configs/tables` lists and `report` compares runs with."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ovseg_jax.errors import UserError

SUITE = "scores.csv:"
"""Begins a key of the scores that `score suite --out=WORKDIR/scores.csv` writes, as "scores.csv:dtd/accuracy[hard]"."""


class Row(NamedTuple):
    """A row of a table.

    Attributes:
      name: short, without spaces and slashes, since it is typed in a command and names a folder.
      values: the published scores in the order of the table's columns; None where the paper has none.
      config: the file in `configs/` that reproduces the row, such as "openseg"; "" if none does.
      args: its argument.
      overrides: the keys that `--config.key=value` sets beside it.
      suffix: what the row adds to the keys of the columns, such as "[hard]", the prompt that it scores.
      after: a command that scores the finished run in its folder WORKDIR; "" if training already does.
      differs: a sentence on how the reproduction differs from the paper's, or "".
      why: a sentence on why the row cannot be reproduced, which then has no config.
    """

    name: str
    values: tuple[float | None, ...]
    config: str = ""
    args: str = ""
    overrides: Mapping[str, str | int | float | bool] = {}
    suffix: str = ""
    after: str = ""
    differs: str = ""
    why: str = ""

    @property
    def command(self) -> str:
        """Returns the command that trains the row's run; "" if it cannot be reproduced."""
        if not self.config:
            return ""
        arg = f":{self.args}" if self.args else ""
        config = f"--config=configs/{self.config}.py{arg}"
        keys = [f"--config.{key}={value}" for key, value in self.overrides.items()]
        return " ".join(["python -m ovseg_jax.main", f'"{config}"' if ";" in config else config, *keys])


class PaperTable(NamedTuple):
    """A table of a paper.

    Attributes:
      paper: the file in `configs/tables/`, such as "openseg".
      number: of the table in the paper, appendix included.
      title: one line.
      columns: the titles of the columns, and where ours come from: a key of a run's `summary.json`, a key with `SUITE`,
        or "" where no run gives the number.
      rows: the rows in the paper's order.
    """

    paper: str
    number: int
    title: str
    columns: Mapping[str, str]
    rows: Sequence[Row]

    def keys(self, row: Row) -> list[str]:
        """Returns where each of the row's scores comes from in a run; "" where no run gives it."""
        return [key and key + row.suffix for key in self.columns.values()]

    def place(self, row: Row) -> str:
        """Returns the identity of a row, as a run's config holds it: "openseg:table=2,row=LSeg+"."""
        return f"{self.paper}:table={self.number},row={row.name}"


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
