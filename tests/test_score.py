"""The command `score`: its kinds, and what each of them imports."""

import subprocess
import sys

import pytest

from ovseg_jax import score


def test_help_lists_the_kinds_and_imports_none(capsys):
    with pytest.raises(SystemExit) as stop:
        score.parser().parse_args(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert [kind for kind in score._KINDS if f"\n    {kind}" not in out] == []


def test_a_kind_explains_itself(capsys):
    with pytest.raises(SystemExit):
        score.parser().parse_args(["suite", "--help"])
    out = capsys.readouterr().out
    assert (
        "usage: python -m ovseg_jax.score suite" in out
        and "cross-dataset  the ten" in out
        and "--batch" in out
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: KIND; python -m ovseg_jax.score --help lists the flags"),
        (["suit"], "argument KIND: invalid choice: 'suit' (choose from "),
        (
            ["suite", "--suite=pomp"],
            "required: --checkpoint, --data_dir; python -m ovseg_jax.score suite --help",
        ),
        (
            ["transfer", "--proposals=a", "--checkpoint=b", "--sp=c"],
            "unrecognized arguments: --sp=c; python -m",
        ),
        (
            ["suite", "x", "--checkpoint=a", "--suite=b", "--data_dir=c"],
            "unrecognized arguments: x; python -m",
        ),
    ],
)
def test_a_wrong_request_is_one_sentence(capsys, arguments, message):
    assert score.main(arguments) == 1
    out, err = capsys.readouterr()
    assert not out and message in err and err.count("\n") == 1


@pytest.mark.parametrize("kind", [kind for kind in score._KINDS if kind not in score._RUNS])
def test_kinds_of_files_start_without_jax(kind):
    """They need a tenth of a second; JAX needs several."""
    code = f"""
import contextlib, sys
from ovseg_jax import score
with contextlib.suppress(SystemExit):
    score.main([{kind!r}, "--help"])
assert not {{"jax", "flax", "grain", "matplotlib"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
