"""Eight virtual CPU devices, fast compilation, and every shape annotation of the package checked at call time."""

import gc
import os

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # Most of a test's time is compilation, and most of that is LLVM's optimiser.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"

from jaxtyping import install_import_hook

install_import_hook("ovseg_jax", "beartype.beartype")

# Traced programs are kept to the end, and a full collection walks them all: let there be few.
gc.set_threshold(100_000, 50, 100)
