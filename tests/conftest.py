"""Eight virtual CPU devices, fast compilation, and every shape annotation of the package checked at call time."""

import gc
import os
from pathlib import Path

from tests.fast import xla_flags

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}"

from jaxtyping import install_import_hook

# Without `vocab`: its arrays are few, and its functions of words are called a million times.
rooms = [
    path.stem for path in (Path(__file__).parents[1] / "ovseg_jax").glob("[a-z]*") if path.stem != "vocab"
]
install_import_hook([f"ovseg_jax.{room}" for room in rooms], "beartype.beartype")

# Traced programs are kept to the end, and a full collection walks them all: let there be few.
gc.set_threshold(100_000, 50, 100)
