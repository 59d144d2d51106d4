"""The wheel and the sdist hold all of the package, and work outside of a checkout; `ovseg VERB`."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from ovseg_jax import __main__ as command
from ovseg_jax.cli.flags import parse, shipped_config
from ovseg_jax.errors import UserError

ROOT = Path(__file__).parents[1]


def run(code, folder, path):
    env = {**os.environ, "PYTHONPATH": str(path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert not done.returncode, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and an sdist of a copy of the checkout, without what lies beside the package."""
    folder = tmp_path_factory.mktemp("built")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("ovseg_jax", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = "from setuptools.build_meta import *; print(build_wheel('out')); print(build_sdist('out'))"
    run(code, folder, "")
    return next((folder / "out").glob("*.whl")), next((folder / "out").glob("*.tar.gz"))


@pytest.mark.parametrize("origin", ["checkout", "sdist"])
def test_the_wheel_works_outside_of_a_checkout(origin, built, tmp_path):
    """Of the checkout, and as `pip install FILE.tar.gz` builds it, of the unpacked sdist."""
    wheel = built[0]
    if origin == "sdist":
        with tarfile.open(built[1]) as archive:
            archive.extractall(tmp_path, filter="data")
        folder = tmp_path / built[1].name.removesuffix(".tar.gz")
        run("from setuptools.build_meta import *; build_wheel('out')", folder, "")
        (wheel,) = (folder / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    found = {path.relative_to(tmp_path / "site") for path in (tmp_path / "site").rglob("*") if path.is_file()}
    own = [
        path.relative_to(ROOT)
        for path in (ROOT / "ovseg_jax").rglob("*")
        if path.suffix in (".py", ".txt", ".typed") and "__pycache__" not in path.parts
    ]
    configs = [Path("ovseg_jax") / path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.py")]
    assert len(own) > 300 and len(configs) > 15 and {*own, *configs} <= found
    code = """
from ovseg_jax.cli.flags import shipped_config
from ovseg_jax.configs import openseg
from ovseg_jax.configs.tables import pomp
print(shipped_config("--config=openseg:data=coco"))
print(shipped_config("--config=configs/tables/pomp.py"))
print(openseg.__file__)
"""
    site, lines = tmp_path / "site" / "ovseg_jax" / "configs", run(code, tmp_path, tmp_path / "site")
    expected = [
        f"--config={site}/openseg.py:data=coco",
        f"--config={site}/tables/pomp.py",
        f"{site}/openseg.py",
    ]
    assert lines == expected
    assert (
        "ovseg = ovseg_jax.__main__:main"
        in next((tmp_path / "site").glob("*.dist-info/entry_points.txt")).read_text()
    )


def test_a_file_in_the_folder_comes_before_the_librarys_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = str(ROOT / "configs" / "openseg.py")
    assert shipped_config("--config=configs/openseg.py:size=tiny") == f"--config={own}:size=tiny"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "openseg.py").write_text("")
    for argument in ("--config=configs/openseg.py", "--config=other", "--config=", "--config.steps=openseg"):
        assert shipped_config(argument) == argument


def test_a_config_that_does_not_exist_is_named_beside_those_that_do():
    with pytest.raises(UserError, match=r"--config=opensg is no file, .*: clip_dense, .*, openseg, .*zsseg$"):
        parse(["main", "--config=opensg:size=tiny"])


def test_the_sdist_holds_what_the_wheel_is_built_from(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "README.md", "LICENSE", "configs/openseg.py", "ovseg_jax/py.typed"} <= names
    assert "ovseg_jax/datasets/ade20k_full_ids.txt" in names


def test_the_verbs_are_the_commands(capsys, monkeypatch):
    found = command.verbs()
    modules = {
        path.stem for path in (ROOT / "ovseg_jax").glob("[a-z]*.py") if "def main(" in path.read_text()
    }
    assert set(found) == modules and found["predict"] == "segments images by words"
    monkeypatch.setattr(sys, "argv", ["ovseg"])
    assert command.main() == 0 and "  predict " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["ovseg", "paint"])
    assert command.main() == 1
    assert capsys.readouterr().err.startswith("error: the verb 'paint' is not one of ")
    monkeypatch.setattr(sys, "argv", ["ovseg", "prepare", "--list"])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert not stopped.value.code and "ade20k_150" in capsys.readouterr().out
