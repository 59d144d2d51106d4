"""What an import brings along: the API of people is quick to import, since what training needs is not in it."""

import os
import subprocess
import sys
from pathlib import Path

from ovseg_jax.methods import METHODS, method_type
from ovseg_jax.protocols import Trainable

HEAVY = "clu grain matplotlib optax orbax pycocotools tensorflow textblob torch transformers".split()


def test_the_segmenter_brings_nothing_that_it_may_not_need():
    code = f"import sys; from ovseg_jax import Segmenter; print(sorted(set({HEAVY}) & set(sys.modules)))"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_published_tower_brings_no_other_method():
    code = f"""
import sys
from ovseg_jax import predict, Segmenter
from ovseg_jax.methods.published import published_model
predict.parser()
print(sorted(set({HEAVY}) & set(sys.modules)), [name for name in sys.modules if name == "ovseg_jax.methods.umg_clip"])
"""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] []"


def test_every_method_has_the_name_of_its_class():
    for name in METHODS:
        assert issubclass(method_type(name), Trainable)


def test_the_list_of_data_sets_needs_no_jax():
    code = """
import contextlib, runpy, sys
sys.argv = ["prepare", "--list"]
with contextlib.suppress(SystemExit):
    runpy.run_module("ovseg_jax.prepare", run_name="__main__")
assert not {"jax", "flax", "apache_beam", "tensorflow"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "ade20k_150" in done.stdout
