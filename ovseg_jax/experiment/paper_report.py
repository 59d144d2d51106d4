"""Runs beside the rows of published tables, for `report`."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from etils import epath

from ovseg_jax.config import from_json
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.paper_tables import SUITE, PaperTable, Row, Value, shown
from ovseg_jax.experiment.scores import SUITES
from ovseg_jax.files import read_recorded, verify, write_whole
from ovseg_jax.reading import read_json, read_text, reading, text

SUMMARY_FILE, CONFIG_FILE = "summary.json", "config.json"
SUITE_FILE = "scores.csv"
"""The file in a run's folder that `score suite --out=WORKDIR/scores.csv` writes."""


class Scored(NamedTuple):
    """A finished run.

    Attributes:
      workdir: its folder.
      row: the identity of its row, see `PaperTable.place`; "" if it was not started from `configs/tables`.
      seed: its seed.
      scores: its scores by key, see `Row.keys`.
    """

    workdir: str
    row: str
    seed: int
    scores: Mapping[str, float]

    @property
    def line(self) -> str:
        """The name of its lines in a report."""
        return f"{self.workdir}, seed {self.seed}"


class Line(NamedTuple):
    """A line of a report: a published row, or a run below it.

    Attributes:
      name: the row's name, or the run's folder and seed.
      values: the scores, one for each column.
      run: whether it is a run.
    """

    name: str
    values: Sequence[Value]
    run: bool


class Compared(NamedTuple):
    """A table with the runs of its rows."""

    table: PaperTable
    lines: Sequence[Line]
    notes: Sequence[str]


def read_run(workdir: epath.PathLike) -> Scored:
    """Reads the scores of a run: its summary, and `SUITE_FILE` if it is there.

    Raises:
      UserError: there is no run, it has not finished, or a file is damaged.
    """
    folder = epath.Path(workdir)
    path, summary = folder / CONFIG_FILE, folder / SUMMARY_FILE
    if not path.exists():
        raise UserError(f"{workdir} holds no run: there is no {CONFIG_FILE}")
    with reading(path, "the config"):
        config = from_json(read_recorded(path))
        row, seed = text(config.get("row", ""), "row"), int(config.get("seed", 0))
    if not summary.exists():
        raise UserError(f"{workdir} has not finished: there is no {SUMMARY_FILE}")
    scores = read_scores(summary)
    if (folder / SUITE_FILE).exists():
        scores |= read_suite_scores(folder / SUITE_FILE)
    return Scored(str(workdir), row, seed, scores)


def read_scores(path: epath.PathLike) -> dict[str, float]:
    """Reads the numbers of a summary.

    Raises:
      UserError: the file is damaged.
    """
    found = read_json(path, "the summary")
    with reading(path, "the summary"):
        verify(path)
        if not isinstance(found, dict):
            raise ValueError("it is not an object")
        return {key: float(value) for key, value in found.items() if isinstance(value, int | float)}


def read_suite_scores(path: epath.PathLike) -> dict[str, float]:
    """Reads the CSV file of `score suite`: keys as "suite:dtd/accuracy[hard]", and averages in the place of sets.

    An average, the mean of one metric over its sets, is left out unless all of them were scored. POMP's own averages
    (papers/000, table 2) are of the overall accuracy, as its authors' code computes them.

    Raises:
      UserError: the file is damaged.
    """
    found: dict[str, float] = {}
    content = read_text(path, "the scores")
    with reading(path, "the scores"):
        prompts = set()
        for line in _lines(content):
            name, prompt = text(line["set"], "set"), text(line["prompt"], "prompt")
            prompts.add(f"[{prompt}]" if prompt else "")
            for metric in ("accuracy", "per_class"):
                found[f"{SUITE}{name}/{metric}" + (f"[{prompt}]" if prompt else "")] = float(line[metric])
        for average in ("cross-dataset", "cross-domain", "umg_clip"):
            for metric, suffix in ((m, p) for m in ("accuracy", "per_class") for p in prompts):
                own = [f"{SUITE}{name}/{metric}{suffix}" for name in SUITES[average]]
                if found.keys() >= set(own):
                    found[f"{SUITE}{average}/{metric}{suffix}"] = sum(found[key] for key in own) / len(own)
    return found


def _lines(content: str) -> list[dict[str, str]]:
    try:
        return list(csv.DictReader(io.StringIO(content), strict=True))
    except csv.Error as error:
        raise ValueError(f"it is not CSV: {error}") from error


def compare(tables: Iterable[PaperTable], runs: Sequence[Scored]) -> Iterator[Compared]:
    """Yields each table that a run has a row in, with the runs below their rows.

    A run stands below every row of its recipe, such as the best row of a table and that of an ablation.
    """
    tables = list(tables)
    recipes = {table.place(row): row.recipe for table in tables for row in table.rows if row.config}
    for table in tables:
        lines: list[Line] = []
        notes: list[str] = []
        there = False
        for row in table.rows:
            lines.append(Line(row.name, row.values, False))
            own = [run for run in runs if row.config and recipes.get(run.row) == row.recipe]
            lines += [Line(run.line, scores_of(row, run), True) for run in own]
            if own and row.differs:
                notes.append(f"{row.name}: {row.differs}")
            there |= bool(own)
        if there:
            yield Compared(table, lines, notes)


def scores_of(row: Row, run: Scored) -> tuple[float | None, ...]:
    """Returns a run's score for each column of a row, see `Row.keys`; None where the run has none."""
    return tuple(_score(run.scores, key) for key in row.keys)


def _score(scores: Mapping[str, float], key: str) -> float | None:
    wanted = key.split("&")
    found = [scores[each] for each in wanted if each in scores]
    return sum(found) / len(found) if len(found) == len(wanted) else None


def markdown(compared: Iterable[Compared]) -> str:
    """Formats tables as Markdown; lines of runs are in italics."""
    blocks = []
    for table, lines, notes in compared:
        rows = [["", *table.columns], ["---"] * (len(table.columns) + 1)]
        for line in lines:
            cells = [line.name, *map(shown, line.values)]
            rows.append([f"*{cell}*" if cell != "-" else cell for cell in cells] if line.run else cells)
        head = f"### {table.paper}, table {table.number}: {table.title}\n"
        said = [f"\n{note}" for note in notes]
        blocks.append("\n".join([head, *(f"| {' | '.join(row)} |" for row in rows), *said]))
    return "\n\n".join(blocks) + "\n"


def draw(compared: Sequence[Compared], path: epath.PathLike) -> None:
    """Draws tables below each other as a PNG, the lines of runs shaded.

    Raises:
      UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # its import takes long

    heights = [len(lines) + 3 for _, lines, _ in compared]
    width = max(4 + 1.1 * len(table.columns) for table, _, _ in compared)
    figure = Figure(figsize=(width, 0.26 * sum(heights)), dpi=150)
    axes = figure.subplots(len(compared), squeeze=False, height_ratios=heights)[:, 0]
    for each, (table, lines, _) in zip(axes, compared, strict=True):
        each.axis("off")
        each.set_title(f"{table.paper}, table {table.number}: {table.title}", fontsize=9, loc="left")
        drawn = each.table(
            cellText=[[line.name, *map(shown, line.values)] for line in lines],
            colLabels=["", *table.columns],
            bbox=(0, 0, 1, 1),
            cellLoc="center",
        )
        drawn.auto_set_font_size(False)
        drawn.set_fontsize(7)
        drawn.auto_set_column_width(list(range(len(table.columns) + 1)))
        for (place, _), cell in drawn.get_celld().items():
            cell.set_linewidth(0.3)
            if place and lines[place - 1].run:
                cell.set_facecolor("#dbe9f6")
    content = io.BytesIO()
    figure.savefig(content, format="png", bbox_inches="tight")
    write_whole(path, content.getvalue())
