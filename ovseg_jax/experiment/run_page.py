"""Many runs on one HTML page, for `report --html`: a table, curves and pictures, without scripts or network."""

import functools
import html
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from ovseg_jax.data.images import read_image
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.changes import differing
from ovseg_jax.experiment.paper_report import SUMMARY_FILE, read_scores
from ovseg_jax.files import write_whole
from ovseg_jax.train.checkpoints import read_config
from ovseg_jax.train.metrics import read_metrics, series
from ovseg_jax.viz.curves import panel
from ovseg_jax.viz.html import CHART_CSS, chart, data_uri, style_of

POINTS = 300  # of a line; longer ones are averaged
WIDEST = 1000  # pixels of a picture
_SHOWN = 10  # differences of a run before the rest is folded
_MAIN = re.compile(r"/(miou|grounding_miou|pq|ap|accuracy|R@1)(/(seen|unseen|held_out|stuff))?$")
_CURVES = re.compile(r"(^|_)loss$|" + _MAIN.pattern)
_ASIDE = re.compile(r"chance|_gt\b|@.*@|@none|@truth")  # as in the terminal


class Shown(NamedTuple):
    """A run of the page.

    Attributes:
      name: its folder.
      config: its config.
      scores: those of its summary, else the last ones of its metrics, by "<evaluation>/<metric>".
      facts: steps, seconds and images_per_second of its summary.
      records: its metrics, see `train.metrics`.
      notes: sentences about what is missing.
    """

    name: str
    config: ConfigDict
    scores: Mapping[str, float]
    facts: Mapping[str, float]
    records: Sequence[Mapping[str, Any]]
    notes: Sequence[str]


def read_shown(workdir: epath.PathLike) -> Shown:
    """Reads a run, which may be unfinished; damaged metrics or a damaged summary become a note.

    Raises:
      UserError: there is no run, or its config is damaged.
    """
    folder = epath.Path(workdir)
    config = read_config(folder)
    if config is None:
        raise UserError(f"{workdir} holds no run: there is no config.json")
    notes: list[str] = []
    records = _or_note(lambda: read_metrics(folder), [], notes)
    summary: dict[str, float] = {}
    if (folder / SUMMARY_FILE).exists():
        summary = _or_note(lambda: read_scores(folder / SUMMARY_FILE), {}, notes)
    elif records:
        notes.append(
            f"It has not finished: it is at step {records[-1]['step']:,} of {config.get('steps', '?'):,}."
        )
    else:
        notes.append("It has logged nothing yet.")
    finals = {key: value for key, value in summary.items() if "/" in key}
    return Shown(str(workdir), config, finals or _last(records), summary, records, notes)


def _or_note(read: Callable[[], Any], otherwise: Any, notes: list[str]) -> Any:
    try:
        return read()
    except UserError as error:
        notes.append(f"{error}".rstrip(".") + ".")
        return otherwise


def _last(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for record in records:
        found |= {k: v for k, v in record.items() if "/" in k and isinstance(v, int | float)}
    return found


def write(path: epath.PathLike, workdirs: Sequence[str]) -> list[str]:
    """Writes the page of the runs in folders, and returns a sentence for each folder that could not be read.

    Raises:
      UserError: none could be read, or the file cannot be written.
    """
    runs: list[Shown] = []
    refused: list[str] = []
    for workdir in workdirs:
        found = _or_note(functools.partial(read_shown, workdir), None, refused)
        runs += [] if found is None else [found]
    if not runs:
        raise UserError(" ".join(refused))
    write_whole(path, page(runs, refused))
    return refused


def page(runs: Sequence[Shown], refused: Sequence[str] = ()) -> str:
    """Returns the HTML of a page.

    Args:
      runs: the runs; differences are those from the first.
      refused: sentences about folders that could not be read.
    """
    legend = "".join(
        f'<li>{_swatch(i)}<a href="#run{i}">{_e(run.name)}</a></li>' for i, run in enumerate(runs)
    )
    body = [
        f"<h1>{len(runs)} run{'s' * (len(runs) != 1)}</h1>",
        *(f'<p class="bad">{_e(sentence)}</p>' for sentence in refused),
        f'<ul class="legend">{legend}</ul>',
        f"<h2>Scores</h2>{_table(runs)}<h2>Curves</h2>{_curves(runs)}<h2>Runs</h2>",
        *(_section(i, run, runs[0]) for i, run in enumerate(runs)),
    ]
    # The page may load nothing, so that opening it contacts no server.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>ovseg_jax: runs</title><style>{CHART_CSS}{_CSS}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def _table(runs: Sequence[Shown]) -> str:
    """Returns the table of the main scores, and a folded one of all: one line per run, the best of a column in bold."""
    names = list(dict.fromkeys(key for run in runs for key in run.scores if not _ASIDE.search(key)))
    main = [key for key in names if _MAIN.search(key)]
    fixed = ("run", "config", "seed", "steps", "minutes", "images/s")
    lead = []
    for i, run in enumerate(runs):
        minutes = run.facts["seconds"] / 60 if "seconds" in run.facts else None
        steps = run.facts.get("steps", run.records[-1]["step"] if run.records else 0)
        head = f'<th scope="row">{_swatch(i)}<a href="#run{i}">{_e(run.name)}</a></th>'
        kind = run.config.get("row") or run.config["method"]
        cells = (_e(kind), _e(run.config.get("seed", 0)), f"{steps:,.0f}", _number(minutes))
        lead.append(
            head + "".join(f"<td>{c}</td>" for c in (*cells, _number(run.facts.get("images_per_second"))))
        )
    whole = _scroll(fixed, main, runs, lead)
    if len(names) > len(main):
        names_only = [re.sub("</th>.*", "</th>", line) for line in lead]
        every = _scroll(("run",), names, runs, names_only)
        whole += f"<details><summary>all {len(names)} scores</summary>{every}</details>"
    if len(runs) > 1:
        whole += (
            "<p>In bold: the best of its column. A run that has not finished shows its last validation.</p>"
        )
    return whole


def _scroll(fixed: Sequence[str], keys: Sequence[str], runs: Sequence[Shown], lead: Sequence[str]) -> str:
    rows = []
    best = {key: max(run.scores[key] for run in runs if key in run.scores) for key in keys}
    for run, first in zip(runs, lead, strict=True):
        cells = []
        for key in keys:
            value = run.scores.get(key)
            bold = len(runs) > 1 and value == best[key]
            cells.append(f"<td>{'<b>' * bold}{_number(value)}{'</b>' * bold}</td>")
        rows.append(f"<tr>{first}{''.join(cells)}</tr>")
    # A word may break behind a slash.
    heads = "".join(f'<th scope="col">{_e(name).replace("/", "/<wbr>")}</th>' for name in (*fixed, *keys))
    return f'<div class="wide" tabindex="0"><table><tr>{heads}</tr>{"".join(rows)}</table></div>'


def _curves(runs: Sequence[Shown]) -> str:
    """Returns a chart for each metric with a line for each run; all but losses and main scores are folded."""
    names = dict.fromkeys(key for run in runs for record in run.records for key in record)
    shown: dict[bool, list[str]] = {True: [], False: []}
    for key in sorted(names, key=lambda key: (_rank(key), key != "loss")):
        if key == "step" or _ASIDE.search(key) or panel(key)[0] is None:
            continue
        lines = {i: (run.name, _thinned(*series(run.records, key))) for i, run in enumerate(runs)}
        lines = {i: line for i, line in lines.items() if line[1]}
        if lines:
            last = "".join(f"<span>{_swatch(i)}{line[-1][1]:.4g}</span>" for i, (_, line) in lines.items())
            drawn = f"<figure><figcaption>{_e(key)}</figcaption>{chart(key, lines)}<p>{last}</p></figure>"
            shown[bool(_CURVES.search(key))].append(drawn)
    if not any(shown.values()):
        return "<p>None of the runs has logged anything.</p>"
    whole = f'<div class="charts">{"".join(shown[True])}</div>'
    if rest := shown[False]:
        inside = f'<summary>{len(rest)} more curves</summary><div class="charts">{"".join(rest)}</div>'
        whole += f"<details>{inside}</details>"
    return whole


def _rank(key: str) -> int:
    found = panel(key)[0]
    return found[0] if found else 9


def _thinned(steps: Sequence[int], values: Sequence[float]) -> list[tuple[float, float]]:
    if len(steps) <= POINTS:
        return list(zip(map(float, steps), values, strict=True))
    parts = (np.array_split(np.array(each, float), POINTS) for each in (steps, values))
    means = [(float(x.mean()), float(y.mean())) for x, y in zip(*parts, strict=True)]
    return [*means, (float(steps[-1]), values[-1])]


def _section(index: int, run: Shown, first: Shown) -> str:
    """Returns the section of one run: notes, differences of its config from the first run's, pictures."""
    parts = [f'<p class="bad">{_e(note)}</p>' for note in run.notes]
    if index:
        # First the keys that both runs have.
        changes = sorted(differing(first.config, run.config), key=lambda change: "absent" in change[1:])
        rows = [
            f'<tr><th scope="row">{_e(key)}</th><td>{_e(now)}</td><td>{_e(was)}</td></tr>'
            for key, was, now in changes
        ]
        head = f"<tr><th>key</th><th>here</th><th>in {_e(first.name)}</th></tr>"
        tables = [
            f'<div class="wide" tabindex="0"><table class="keys">{head}{"".join(part)}</table></div>'
            for part in (rows[:_SHOWN], rows[_SHOWN:])
            if part
        ]
        parts += tables[:1] or [f"<p>Its config is that of {_e(first.name)}.</p>"]
        if len(tables) > 1:
            parts.append(f"<details><summary>{len(rows) - _SHOWN} more keys</summary>{tables[1]}</details>")
    for path in sorted(epath.Path(run.name).glob("pictures/*.png")):
        parts.append(_picture(path))
    return f'<section id="run{index}"><h3>{_swatch(index)}{_e(run.name)}</h3>{"".join(parts)}</section>'


def _picture(path: epath.Path) -> str:
    try:
        drawn = Image.fromarray(read_image(path))
    except UserError as error:
        return f'<p class="bad">{_e(error)}.</p>'
    drawn.thumbnail((WIDEST, 10 * WIDEST))
    name = _e(path.stem)
    return (
        f'<details open><summary>{name}</summary><img src="{data_uri(drawn, "WEBP")}" alt="{name}"></details>'
    )


def _swatch(index: int) -> str:
    kind, dashes = style_of(index)
    return (
        f'<svg class="swatch" viewBox="0 0 24 8" aria-hidden="true"><path class="line {kind}" '
        f'stroke-dasharray="{dashes}" d="M0 4H24"/></svg>'
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _e(text: Any) -> str:
    return html.escape(str(text))


_CSS = """
:root { --rule: color-mix(in srgb, currentColor 18%, transparent);
  --faint: color-mix(in srgb, currentColor 75%, transparent); }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 12px 16px 48px; max-width: 1200px; }
h1, h2, h3 { line-height: 1.2; overflow-wrap: anywhere; }
a { color: inherit; }
.legend { list-style: none; padding: 6px 0; margin: 0; display: flex; flex-wrap: wrap; gap: 2px 18px; position: sticky;
  top: 0; background: Canvas; overflow-wrap: anywhere; max-height: 30vh; overflow-y: auto; }
.swatch { width: 24px; height: 8px; margin-right: 7px; vertical-align: 2px; overflow: visible; }
.swatch .line { fill: none; stroke: var(--c); stroke-width: 3; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 3px 9px; border-bottom: 1px solid var(--rule);
  font-weight: 400; white-space: nowrap; }
tr:first-child th { vertical-align: bottom; white-space: normal; color: var(--faint); }
th:first-child { text-align: left; }
.keys :is(th, td) { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr)); gap: 14px 22px; }
figure { margin: 0; }
figcaption { font-weight: 600; overflow-wrap: anywhere; }
figure p { margin: 0; font-size: 13px; display: flex; flex-wrap: wrap; gap: 0 14px; }
summary { cursor: pointer; margin: 8px 0; }
section { scroll-margin-top: 60px; border-top: 1px solid var(--rule); }
section img { max-width: 100%; height: auto; background: white; }
.bad { border-left: 4px solid #d55e00; padding-left: 8px; overflow-wrap: anywhere; }
"""
