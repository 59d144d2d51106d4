"""Eight virtual CPU devices, fast compilation, and every shape annotation of the package checked at call time."""

import functools
import gc
import os
from pathlib import Path

from tests.extras import require
from tests.fast import share_programs, xla_flags

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
# pytest-xdist's workers share the cores, and PyTorch's threads would wait for each other in busy loops.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}"

import jax
import pytest
from jaxtyping import install_import_hook

# Without what has few arrays, and functions of words that are called a million times.
package = Path(__file__).parents[1] / "ovseg_jax"
wordy = {"vocab", "reading", "data.scenes.text", "data.scenes.objects"}
rooms = {path.stem for path in package.glob("[a-z]*")} - {"data"}
rooms |= {f"data.{path.stem}" for path in (package / "data").glob("[a-z]*")} - {"data.scenes"}
rooms |= {f"data.scenes.{path.stem}" for path in (package / "data" / "scenes").glob("[a-z]*")}
install_import_hook([f"ovseg_jax.{room}" for room in rooms - wordy], "beartype.beartype")

# Traced programs are kept to the end, and a full collection walks them all: let there be few.
gc.set_threshold(100_000, 50, 100)

share_programs()
# Where an operation stands in Python is of no use to tests, and took 6% of the processor's time of one of their files.
jax.config.update("jax_traceback_in_locations_limit", 0)


@pytest.fixture
def quick_onnx(monkeypatch):
    """Leaves out the optimiser of ONNX graphs, half of an export's time; tests/test_export.py has it."""
    torch = require("torch")
    monkeypatch.setattr(torch.onnx, "export", functools.partial(torch.onnx.export, optimize=False))
