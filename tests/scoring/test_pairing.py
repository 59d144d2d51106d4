"""Matching of predictions with truths, parallel reading, and the record of what was left out."""

import argparse
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.scoring import files
from ovseg_jax.scoring.files import Fault, Pair, Skips, list_files, pair_files, read_list, results

PNG = (".png",)


def make(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return str(root)


def test_files_of_a_folder(tmp_path):
    root = make(tmp_path, "b/1.png", "a.png", "b/c/2.PNG", ".hidden/3.png", "b/.4.png", "notes.txt")
    found = list_files(root, "--gt", PNG)
    assert found == {"a": f"{root}/a.png", "b/1": f"{root}/b/1.png", "b/c/2": f"{root}/b/c/2.PNG"}
    assert list_files(f"{root}/a.png", "--gt", PNG) == {"": f"{root}/a.png"}


def test_an_ending_in_place_of_suffixes(tmp_path):
    root = make(tmp_path, "x/1_gt_ids.png", "x/1_gt_color.png", "x/2_gt_ids.png")
    assert list(list_files(root, "--gt", PNG, "_gt_ids.png")) == ["x/1", "x/2"]
    with pytest.raises(UserError, match=r"--gt=.* holds no file with the name that ends in _none.png"):
        list_files(root, "--gt", PNG, "_none.png")


def test_a_folder_that_cannot_be_scored(tmp_path):
    with pytest.raises(UserError, match=r"--gt=.* is neither a folder nor a file"):
        list_files(str(tmp_path / "none"), "--gt", PNG)
    with pytest.raises(UserError, match=r"holds no file with the suffix .png"):
        list_files(make(tmp_path / "empty", "a.txt"), "--gt", PNG)
    with pytest.raises(UserError, match=r"holds both a.png and a.tif: keep one"):
        list_files(make(tmp_path / "two", "a.png", "a.tif"), "--gt", (".png", ".tif"))


def sides(predictions, truths):
    return {name: f"p/{name}.png" for name in predictions}, {name: f"t/{name}.png" for name in truths}


def test_files_match_by_path_or_else_by_their_last_part():
    pairs = pair_files(*sides(["x/1", "x/2"], ["x/2", "x/1"]), Skips())
    assert pairs == [Pair("x/1", "p/x/1.png", "t/x/1.png"), Pair("x/2", "p/x/2.png", "t/x/2.png")]
    assert pair_files(*sides(["1"], ["val/1"]), Skips()) == [Pair("1", "p/1.png", "t/val/1.png")]
    with pytest.raises(UserError, match=r"--pred holds '1' and so on, --gt 'a/1' and so on"):
        pair_files(*sides(["1"], ["a/1", "b/1"]), Skips())
    assert pair_files({"": "p.png"}, {"": "t.png"}, Skips()) == [Pair("t", "p.png", "t.png")]


def test_what_has_no_partner_is_an_error_or_counted():
    both = sides(["1", "2", "5"], ["1", "3", "4"])
    with pytest.raises(
        UserError, match=r"2 of 3 truths have no prediction, such as '3'; --missing=skip leaves"
    ):
        pair_files(*both, Skips())
    with pytest.raises(UserError, match=r"1 of 2 predictions have no truth, such as '2'"):
        pair_files(*sides(["1", "2"], ["1"]), Skips())
    skips = Skips("skip")
    assert [pair.name for pair in pair_files(*both, skips)] == ["1"]
    assert skips.names == {"no prediction": ["3", "4"], "no truth": ["2", "5"]}


def test_a_list_names_what_is_scored():
    both = sides(["x/1", "x/2", "x/3"], ["x/1", "x/2", "x/4"])
    assert [pair.name for pair in pair_files(*both, Skips(), ["2", "x/1"])] == ["x/1", "x/2"]
    with pytest.raises(UserError, match=r"1 of 2 names in --list have no truth, such as '3'"):
        pair_files(*both, Skips(), ["1", "3"])
    with pytest.raises(UserError, match=r"1 of 2 truths have no prediction, such as 'x/4'"):
        pair_files(*both, Skips(), ["1", "4"])
    skips = Skips("skip")
    assert [pair.name for pair in pair_files(*both, skips, ["1", "3", "4"])] == ["x/1"]
    assert skips.names == {"no truth": ["3"], "no prediction": ["x/4"]}


def test_lines_of_a_list(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("a.png\n\n b.c \nd/e\n")
    assert read_list(str(path), PNG) == ["a", "b.c", "d/e"]
    path.write_text("a\nb\na.png\n")
    with pytest.raises(UserError, match=r"list.txt cannot be read: it names 'a' twice"):
        read_list(str(path), PNG)
    path.write_text("\n")
    with pytest.raises(UserError, match=r"it names no image"):
        read_list(str(path), PNG)


def square(number):
    if number == 7:
        raise Fault("unlucky", "7 is unlucky")
    if number == 9:
        raise UserError("9 cannot be read")
    return number * number, os.getpid()


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_whatever_the_number_of_processes(workers):
    skips, items = Skips("skip"), list(range(200))
    found = list(results(square, items, skips, workers=workers))
    assert [(item, value) for item, (value, _) in found] == [(k, k * k) for k in items if k not in (7, 9)]
    assert skips.names == {"unlucky": ["7"], "unreadable": ["9"]}
    processes = {process for _, (_, process) in found}
    assert (processes == {os.getpid()}) == (workers == 1)
    with pytest.raises(UserError, match=r"^7 is unlucky; --missing=skip"):
        list(results(square, items, Skips(), workers=workers))


def die(number):
    if number == 150:
        os._exit(1)


def test_a_process_that_is_killed():
    with pytest.raises(UserError, match=r"one of the 2 processes that read files ended"):
        list(results(die, list(range(200)), Skips(), workers=2))


def test_forked_processes_in_a_command():
    """As a command runs them: without JAX, so forked."""
    code = (
        "from tests.scoring.test_pairing import square, results, Skips\n"
        "import sys; sys.modules.pop('jax', None)\n"
        "found = [v for _, (v, _) in results(square, list(range(200)), Skips('skip'), workers=2)]\n"
        "print(sum(found))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert int(done.stdout) == sum(k * k for k in range(200)) - 7 * 7 - 9 * 9 and not done.stderr


def test_a_fault_crosses_processes():
    fault = pickle.loads(pickle.dumps(Fault("size", "a is small")))
    assert fault.reason == "size" and str(fault) == "a is small"


def test_number_of_processes():
    assert files.workers_of(argparse.Namespace(workers=3)) == 3
    assert files.workers_of(argparse.Namespace(workers=None)) >= 1
    with pytest.raises(UserError, match=r"--workers=0 is less than 1"):
        files.workers_of(argparse.Namespace(workers=0))
