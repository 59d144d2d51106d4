"""Flags of XLA with which the programs of tests compile several times faster."""

from importlib import metadata


def xla_flags(devices: int) -> str:
    """Returns XLA_FLAGS for `devices` virtual CPU devices and fast compilation.

    Most of a test's time is compilation, and most of that is LLVM: its optimiser, and the code that XLA's fusion
    emitters give it. jaxlib 0.12 has no other emitters, and refuses flags that it does not know.
    """
    flags = [f"--xla_force_host_platform_device_count={devices}", "--xla_backend_optimization_level=0"]
    if metadata.version("jaxlib").startswith("0.10."):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(flags)
