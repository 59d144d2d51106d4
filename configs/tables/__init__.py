"""Every row of every table of papers/004 (openseg.py), 000 (pomp.py), 002 (pseg.py) and 003 (umg_clip.py): what trains
it, its scores.

python -m ovseg_jax.report --list
    all rows with their scores and commands; a row that cannot be run says why
python -m ovseg_jax.main --config=configs/tables/openseg.py:table=5,row=all-words
python -m ovseg_jax.main --config=configs/tables/pomp.py:table=1,row=POMP-B16,data_dir=DIR
    the run of a row; data lies below data/, or where the arguments of `OWN` say
python -m ovseg_jax.report runs/a runs/b --out=report.md --png=report.png
    the scores of runs below those of the papers
"""

import importlib
from collections.abc import Sequence

from ml_collections import ConfigDict

from ovseg_jax.config import parse_arg
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.paper_tables import PaperTable, Row, find_row

PAPERS = ("openseg", "pomp", "pseg", "umg_clip")
OWN = (
    "data_dir",
    "images",
    "retrieval",
    "narratives",
    "narratives_are",
    "pseudo",
    "eval_sets",
    "sets_are",
    "names",
    "weights",
    "text_weights",
    "seed",
)
"""Arguments that may follow `table` and `row`: those of the row's config that say where data lies, and its seed."""


def all_tables(papers: Sequence[str] = PAPERS) -> list[PaperTable]:
    """Returns the tables of some papers."""
    return [table for name in papers for table in importlib.import_module(f"{__name__}.{name}").TABLES]


def row_config(tables: Sequence[PaperTable], arg: str | None) -> ConfigDict:
    """Returns the config of a row, which holds the row's identity as `row`.

    Args:
      tables: the tables of a paper.
      arg: "table=2,row=NAME", and any of `OWN`.

    Raises:
      UserError: the table or row is unknown, it cannot be run, or an argument has no effect on its config.
    """
    args = parse_arg(arg, table="", row="", **dict.fromkeys(OWN, ""))
    table, row = find_row(tables, args.table, args.row)
    if not row.config:
        raise UserError(f"table {table.number}, row {row.name} cannot be run: {row.why}")
    own = {key: value for key in OWN if (value := getattr(args, key))}
    for key in ("narratives", "narratives_are", "pseudo"):
        if key in own and f"{key.removesuffix('_are')}=" not in row.args:
            raise UserError(
                f"{key}={own[key]} has no place in table {table.number}, row {row.name}: it trains without"
            )
    return build(table, row, own)


def build(table: PaperTable, row: Row, own: dict[str, str] | None = None) -> ConfigDict:
    """Returns the config of a row that can be run, with the values of `own` in place of its arguments."""
    arg = ",".join([row.args, *(f"{key}={value}" for key, value in (own or {}).items())])
    config = importlib.import_module(f"ovseg_jax.configs.{row.config}").get_config(arg.strip(","))
    config.update_from_flattened_dict(dict(row.overrides))
    config.row = table.place(row)
    return config
