"""Tables of scores, as commands print them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

TABLE_2 = ("A-847", "PC-459", "A-150", "PC-59", "PAS-20")  # papers/004
ENGINEERED = "+eng"
"""Suffix of an evaluation with more names for the classes of a set (papers/004, appendix I)."""

LABELS = {"A-150": "ade20k_150", "PC-59": "pascal_context_59", "PAS-20": "voc_2012"}
"""The label files of the package with more names for sets of Table 2."""

Cell = str | int | float | None


class Table:
    """Formats a table line by line, so that a line can be printed before the next one is known.

    Columns of texts come first, then columns of numbers; each is as wide as its contents need.

    Attributes:
      head: the line of titles.
    """

    def __init__(self, texts: Mapping[str, Iterable[str]], numbers: Iterable[str]):
        """Chooses the widths.

        Args:
          texts: the columns of texts, as {title: all texts that may stand there}.
          numbers: the titles of the columns of numbers.
        """
        numbers = list(numbers)
        self._texts = [2 + max(map(len, (title, *found))) for title, found in texts.items()]
        self._numbers = [max(9, 2 + len(title)) for title in numbers]
        self.head = self.line(*texts, *numbers)

    def line(self, *cells: Cell) -> str:
        """Formats a line. Fractions get two decimals; None is an empty cell, and so are cells that are left out."""
        shown = ["" if c is None else f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells]
        count = len(self._texts)
        left = "".join(f"{cell:<{width}}" for cell, width in zip(shown, self._texts, strict=False))
        right = "".join(f"{cell:>{width}}" for cell, width in zip(shown[count:], self._numbers, strict=False))
        return (left + right).rstrip()


class _Block(NamedTuple):
    """The lines of one evaluation: its columns, and a row of cells for each label."""

    columns: Sequence[str]
    rows: Mapping[str, Sequence[Cell]]


def score_table(scores: Mapping[str, float]) -> str:
    """Formats a table for each evaluation, and one of all segmentation evaluations side by side.

    Args:
      scores: "<evaluation>/<metric>" -> value.
    """
    own: dict[str, dict[str, float]] = {}
    for key, value in scores.items():
        evaluation, _, metric = key.partition("/")
        own.setdefault(evaluation, {})[metric] = value
    blocks = {name: _block(found) for name, found in own.items()}
    labels = [f"    {label}" for block in blocks.values() for label in block.rows]
    lines = []
    for name, block in blocks.items():
        table = Table({f"  {name}": labels}, block.columns)
        lines += [table.head, *(table.line(f"    {label}", *cells) for label, cells in block.rows.items())]
    return "\n".join([*lines, *_side_by_side(scores)])


def _block(scores: Mapping[str, float]) -> _Block:
    """Arranges mIoU, also of groups, with both divisors and chance, then the rest; or the prompts side by side."""
    if any("[" in metric for metric in scores) or not any("miou" in metric for metric in scores):
        return _by_prompt(scores)
    rows: dict[str, Sequence[Cell]] = {}
    for metric in scores:
        if metric.split("/")[0] == "miou" or metric.startswith("miou@"):
            label = metric.removeprefix("miou").lstrip("/") or "all classes"
            columns = ("miou", "miou_gt", "chance_miou")
            rows[label] = [scores.get(metric.replace("miou", column, 1)) for column in columns]
    rest = [metric for metric in scores if "miou" not in metric or metric.startswith("grounding")]
    return _Block(("mIoU", "mIoU_gt", "chance"), rows | {metric: [scores[metric]] for metric in rest})


def _by_prompt(scores: Mapping[str, float]) -> _Block:
    """Arranges a row for each metric, a column for each prompt ("accuracy", "accuracy[hard]")."""
    cells: dict[str, dict[str, float]] = {}
    for key, value in scores.items():
        metric, _, prompt = key.removesuffix("]").partition("[")
        cells.setdefault(metric, {})[prompt] = value
    prompts = list(dict.fromkeys(prompt for row in cells.values() for prompt in row))
    return _Block(prompts, {metric: [row.get(p) for p in prompts] for metric, row in cells.items()})


def _side_by_side(scores: Mapping[str, float]) -> list[str]:
    """Formats the sets of OpenSeg's Table 2 in its order, then the others, with one decimal as there."""
    found = [name.removesuffix("/miou").removesuffix(ENGINEERED) for name in scores if name.endswith("/miou")]
    names = list(dict.fromkeys([*(name for name in TABLE_2 if name in found), *found]))
    if len(names) < 2:
        return []
    metrics = {"mIoU": "miou", "mIoU_gt": "miou_gt", "mIoU, classes given": "grounding_miou"}
    rows = {
        f"  {label}{', more names' if suffix else ''}": [
            scores.get(f"{name}{suffix}/{metric}") for name in names
        ]
        for suffix in ("", ENGINEERED)
        for label, metric in metrics.items()
    }
    rows = {label: row for label, row in rows.items() if any(value is not None for value in row)}
    table = Table({"": rows}, names)
    shown = lambda row: ["" if value is None else f"{value:.1f}" for value in row]
    return [table.head, *(table.line(label, *shown(row)) for label, row in rows.items())]
