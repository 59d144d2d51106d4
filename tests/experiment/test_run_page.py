"""The page of many runs that `report --html` writes."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ovseg_jax import report
from ovseg_jax.configs import openseg
from ovseg_jax.experiment.run_page import POINTS
from ovseg_jax.train.checkpoints import write_config
from ovseg_jax.viz.html import chart, ticks

VOID = {"meta", "img", "wbr"}


class Page(HTMLParser):
    """Counts the tags of a page, all of which are closed, and keeps its text and what it refers to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses, self.texts = [], [], [], []
        self.feed(text)
        assert not self.open
        self.text = " ".join(self.texts)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.addresses += [value for key, value in attributes if key in ("src", "href", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag, kind=""):
        return [
            found
            for name, found in self.tags
            if name == tag and kind in ["", *found.get("class", "").split()]
        ]


def run_in(folder, argument="", records=(), scores=None, **changes):
    config = openseg.get_config(argument)
    config.update_from_flattened_dict(changes)
    folder.mkdir()
    write_config(folder, config)
    if records:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if scores is not None:
        facts = {"steps": 1500, "seconds": 90.0, "images_per_second": 50.0}
        (folder / "summary.json").write_text(json.dumps({**facts, **scores}))
    return folder


def losses(*values):
    return [{"step": 10 * i + 10, "loss": x, "learning_rate": 1e-3} for i, x in enumerate(values)]


def test_runs_on_one_page(tmp_path, capsys):
    first = run_in(
        tmp_path / "first", "", losses(4.0, 2.0, 1.0), {"test/miou": 50.0, "test/chance_miou": 1.0}
    )
    second = run_in(
        tmp_path / "a<b>&",
        "seed=3",
        losses(3.0, 2.5),
        {"test/miou": 60.0, "test/macc": 1.5},
        **{"loss.temperature": 0.25},
    )
    (second / "pictures").mkdir()
    Image.fromarray(np.full((40, 1500, 3), (200, 0, 0), np.uint8)).save(second / "pictures" / "test.png")
    (second / "pictures" / "broken.png").write_bytes(b"no picture")
    going = run_in(tmp_path / "going", "", [*losses(5.0), {"step": 10, "validation/miou": 7.5}])
    empty = run_in(tmp_path / "empty")
    damaged = run_in(tmp_path / "damaged", "", losses(1.0, 2.0, 3.0))
    (damaged / "metrics.jsonl").write_text('{"step": 1}\n[]\n{"step": 3}\n')
    (tmp_path / "none").mkdir()
    out = tmp_path / "page.html"
    folders = [str(x) for x in (first, second, going, empty, damaged, tmp_path / "none")]
    assert report.main([*folders, f"--html={out}"]) == 0
    said = capsys.readouterr()
    assert said.err == f"{tmp_path / 'none'} holds no run: there is no config.json.\n" and not said.out

    page = Page(out.read_text("utf-8"))
    assert not page.all("script") and not page.all("link")
    assert all(address.startswith(("#run", "data:image/")) for address in page.addresses)
    ids = {tag["id"] for tag in page.all("section")}
    assert {address[1:] for address in page.addresses if address[0] == "#"} == ids and len(ids) == 5
    assert "holds no run" in page.text and "It has logged nothing yet." in page.text
    steps = openseg.get_config().steps
    assert f"It has not finished: it is at step 10 of {steps:,}." in page.text
    assert re.search(r"metrics.jsonl, line 2, cannot be read: .*\.", page.text)
    assert "broken.png" in page.text and f"{second}" in page.text
    # The best score is bold; chance is not shown; what is no main score is folded.
    text = out.read_text("utf-8")
    assert text.count("<b>60.0</b>") == 2 and "<b>50.0" not in text and "<td>50.0</td>" in text
    assert "chance" not in page.text and "all 3 scores" in page.text and ">7.5" in text
    row = next(line for line in text.split("<tr>") if "a&lt;b&gt;&amp;" in line and "openseg" in line)
    assert re.findall(r"<td>(?:<b>)?([^<]*)", row)[:6] == ["openseg", "3", "1,500", "1.5", "50.0", "60.0"]
    part = text[text.index('id="run1"') : text.index('id="run2"')]
    keys = re.findall(r'<th scope="row">([^<]*)</th><td>([^<]*)</td><td>([^<]*)', part)
    assert ("loss.temperature", "0.25", "0.1") in keys and ("seed", "3", "0") in keys and len(keys) == 2
    (picture,) = page.all("img")
    assert picture["alt"] == "test"
    assert f"Its config is that of {first}." in page.text


def test_lines_are_where_their_values_are(tmp_path):
    """Of a long line the means of its parts, and its last value, are drawn."""
    values = np.linspace(8.0, 2.0, 2 * POINTS)
    run = run_in(tmp_path / "long", "", losses(*values.tolist()))
    other = run_in(tmp_path / "short", "", losses(8.0, 2.0, 5.0))
    out = tmp_path / "page.html"
    assert report.main([str(run), str(other), f"--html={out}"]) == 0
    page = Page(out.read_text("utf-8"))
    long, short = (
        np.array([point.split(",") for point in line["points"].split()], float)
        for line in page.all("polyline")[:2]
    )
    assert len(long) == POINTS + 1 and len(short) == 3
    top, bottom = short[0, 1], short[1, 1]
    assert short[2, 1] == pytest.approx((top + bottom) / 2, abs=0.06)
    means = values.reshape(POINTS, 2).mean(1)
    np.testing.assert_allclose(long[:-1, 1], top + (8 - means) / 6 * (bottom - top), atol=0.06)
    np.testing.assert_allclose(long[-1], [long[:, 0].max(), bottom], atol=0.06)
    assert page.all("polyline")[0]["class"] != page.all("polyline")[1]["class"]


def test_charts_of_values_that_stay_the_same():
    page = Page(chart("a & b", {0: ("x", [(5.0, 0.0)]), 9: ("y", [(5.0, 0.0), (5.0, 0.0)])}))
    assert page.all("svg")[0]["aria-label"] == "a & b" and len(page.all("circle")) == 1
    assert page.all("polyline")[0]["stroke-dasharray"] and "nan" not in page.text
    assert "x: 0 at step 5" in page.text


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [
        (0.0, 100.0, [0, 20, 40, 60, 80, 100]),
        (0.11, 0.52, [0.2, 0.3, 0.4, 0.5]),
        (-3.0, 2e6, [0, 5e5, 1e6, 1.5e6]),
    ],
)
def test_ticks_are_round(low, high, found):
    assert ticks(low, high)[: len(found)] == pytest.approx(found)


def test_a_page_of_no_run_is_a_sentence(tmp_path, capsys):
    assert report.main([str(tmp_path), f"--html={tmp_path}/page.html"]) == 1
    assert "holds no run" in capsys.readouterr().err and not (tmp_path / "page.html").exists()
    assert report.main(["--list", "--html=x"]) == 1
    (tmp_path / "config.json").write_text("{}")
    assert report.main([str(tmp_path), f"--html={tmp_path}/config.json"]) == 1
    assert "must end in .html" in capsys.readouterr().err and (tmp_path / "config.json").read_text() == "{}"
    (tmp_path / "config.json").unlink()
    assert (
        report.main([str(tmp_path), f"--html={tmp_path}"]) == 1 and "is a folder" in capsys.readouterr().err
    )
