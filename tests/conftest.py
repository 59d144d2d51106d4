"""Eight virtual CPU devices, and every shape annotation of the package checked at call time."""

import os

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

from jaxtyping import install_import_hook

install_import_hook("ovseg_jax", "beartype.beartype")
