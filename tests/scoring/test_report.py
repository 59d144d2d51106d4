"""Reports as text, JSON and CSV."""

import argparse
import csv
import io
import json

import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.scoring.report import Report, add_report_flags, check_report_flags, publish

REPORT = Report(
    "panoptic",
    {"all": {"PQ": 200 / 3, "SQ": 80.0}, "stuff": {"PQ": None, "segments": 4}},
    [{"class": "dog, brown", "PQ": 100 / 3}, {"class": "sky", "PQ": None}],
    {"images": 5, "ignored": [0, 255]},
    {"no truth": ["a", "b", "c", "d"], "size": ["e"]},
)


def flags(*given):
    parser = argparse.ArgumentParser()
    add_report_flags(parser)
    return parser.parse_args(given)


def test_text():
    assert REPORT.text().splitlines() == [
        "class              PQ",
        "dog, brown      33.33",
        "sky                 -",
        "",
        "images: 5",
        "ignored: 0, 255",
        "left out, no truth: 4 (a, b, c, ...)",
        "left out, size: 1 (e)",
        "              PQ       SQ  segments",
        "all        66.67    80.00",
        "stuff          -                  4",
    ]


def test_many_classes_are_only_written():
    report = Report("semantic", {"all": {"mIoU": 1.0}}, [{"class": str(k), "IoU": 1.0} for k in range(65)])
    assert report.text().splitlines()[0] == "65 classes: --csv=FILE writes a line for each"


def test_files_hold_all_digits(tmp_path, capsys):
    publish(REPORT, flags(f"--json={tmp_path}/r.json", f"--csv={tmp_path}/r.csv"))
    assert capsys.readouterr().out == REPORT.text() + "\n"
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["scores"] == {"all": {"PQ": 200 / 3, "SQ": 80.0}, "stuff": {"PQ": None, "segments": 4}}
    assert found["skipped"]["no truth"] == {"count": 4, "names": ["a", "b", "c", "d"]}
    assert found["kind"] == "panoptic" and found["facts"] == {"images": 5, "ignored": [0, 255]}
    rows = list(csv.DictReader(io.StringIO((tmp_path / "r.csv").read_text())))
    assert rows == [{"class": "dog, brown", "PQ": str(100 / 3)}, {"class": "sky", "PQ": ""}]


def test_json_alone_is_all_that_is_printed(capsys):
    publish(REPORT, flags("--json"))
    assert json.loads(capsys.readouterr().out)["classes"][1] == {"class": "sky", "PQ": None}


def test_outputs_are_checked(tmp_path):
    (tmp_path / "gt.json").touch()
    check_report_flags(flags("--json", f"--csv={tmp_path}/r.csv"), {})
    for given, message in (
        ([f"--json={tmp_path}/gt.json"], "--json=.*gt.json is also the input of --gt"),
        ([f"--csv={tmp_path}/none/r.csv"], "--csv=.*cannot be written: .*none is not a writable folder"),
        ([f"--json={tmp_path}/r", f"--csv={tmp_path}/r"], "--json and --csv name the same file"),
    ):
        with pytest.raises(UserError, match=message):
            check_report_flags(flags(*given), {"--gt": str(tmp_path / "gt.json")})
