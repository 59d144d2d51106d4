"""Names of files, files of others, and records that survive a kill."""

import json
import os

import pytest
from etils import epath

from ovseg_jax.cli.outputs import (
    Journal,
    check_not_foreign,
    check_out_file,
    check_out_folder,
    output_names,
)
from ovseg_jax.errors import UserError


def names(*files, known=(), reserved=("predictions",)):
    chosen = output_names([epath.Path(file) for file in files], dict(known), reserved)
    return [chosen[file] for file in files]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["a.jpg", "b.jpg"], ["a", "b"]),
        (["a.jpg", "a.png", "b.jpg"], ["a.jpg", "a.png", "b"]),
        (["a.jpg", "a.jpg.png", "a.png"], ["a.jpg", "a.jpg.png", "a.png"]),
        (["a.jpg", "A.png"], ["a.jpg", "A.png"]),
        (["a.jpg", "A.JPG"], ["a.jpg", "A.JPG-2"]),
        (["predictions.jpg"], ["predictions.jpg"]),
        (["Predictions.jpg", "predictions.jpg"], ["Predictions.jpg", "predictions.jpg-2"]),
        (["x/a.jpg", "y/a.jpg"], ["a.jpg", "a.jpg-2"]),
        (["é.jpg", "é.png"], ["é.jpg", "é.png"]),  # one letter, and a letter with an accent
        (["straße.jpg", "STRASSE.png"], ["straße.jpg", "STRASSE.png"]),
    ],
)
def test_no_two_images_share_a_name(files, expected):
    assert names(*files) == expected
    assert sorted(names(*reversed(files))) == sorted(names(*files)) or "-2" in "".join(expected)


def test_names_are_short_enough_for_a_file_system():
    long = ["木" * 83 + ".jpg", "木" * 83 + ".png", "b" * 240 + ".jpg"]
    chosen = names(*long)
    assert len(set(chosen)) == 3 and all(len(os.fsencode(name + ".overlay.png")) < 250 for name in chosen)


def test_a_name_that_was_chosen_stays():
    assert names("a.jpg", "a.png", known={"a.jpg": "a"}) == ["a", "a.png"]


def test_files_of_others_are_not_replaced(tmp_path):
    (tmp_path / "A.json").write_text("mine")
    check_not_foreign(tmp_path, ["b.json"], [])
    check_not_foreign(tmp_path, ["a.json", "b.json"], ["a.json"])
    with pytest.raises(UserError, match=r"holds a file A.json that would be replaced.*--overwrite"):
        check_not_foreign(tmp_path, ["a.json", "b.json"], ["b.json"])


def test_a_file_that_cannot_be_written_or_is_read_too(tmp_path):
    (tmp_path / "a.json").write_text("")
    check_out_file(tmp_path / "b.json", {"--boxes": str(tmp_path / "a.json"), "--classes": None})
    (tmp_path / "link.json").symlink_to(tmp_path / "a.json")
    with pytest.raises(UserError, match="is also the input of --boxes"):
        check_out_file(tmp_path / "link.json", {"--boxes": str(tmp_path / "a.json")})
    for wrong in (tmp_path, tmp_path / "none" / "b.json", tmp_path / "a.json" / "b"):
        with pytest.raises(UserError, match="cannot be written"):
            check_out_file(wrong, {})
    with pytest.raises(UserError, match="cannot be created"):
        check_out_folder(tmp_path / "a.json" / "b")


def test_records_survive_a_kill(tmp_path):
    path = tmp_path / "j.jsonl"
    journal = Journal(path)
    journal.start({"threshold": 0.5, "tile": (3, 1)}, names={"a": "a"})
    journal.append({"image": "a"})
    journal.append({"image": "木\udcff"})
    with path.open("ab") as file:  # a line that a kill has cut short; nothing was closed
        file.write(b'{"image": "c", "seg')
    again = Journal(path)
    assert again.records == [{"image": "a"}, {"image": "木\udcff"}] and again.head["names"] == {"a": "a"}
    again.start({"tile": [3, 1], "threshold": 0.5}, names={"a": "a", "b": "b"})
    again.append({"image": "c"})
    again.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("image") for line in lines] == [None, "a", "木\udcff", "c"]
    other = Journal(path)
    other.start({"threshold": 0.6})
    assert not other.records
    other.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"a": 1}', "\x00\xff", "[" * 100_000, '{"request": 3}'])
def test_a_file_that_is_no_journal(tmp_path, content):
    (tmp_path / "j").write_text(content)
    journal = Journal(tmp_path / "j")
    assert journal.head == {} and journal.records == []
