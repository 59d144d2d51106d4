"""Eight virtual CPU devices, fast compilation, and every shape annotation of the package checked at call time."""

import gc
import os

from tests.fast import xla_flags

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}"

from jaxtyping import install_import_hook

install_import_hook("ovseg_jax", "beartype.beartype")

# Traced programs are kept to the end, and a full collection walks them all: let there be few.
gc.set_threshold(100_000, 50, 100)
