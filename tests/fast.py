"""What makes the programs of tests compile several times faster."""

import hashlib
from collections import OrderedDict
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


def share_programs(kept: int = 100) -> None:
    """Gives a program that was compiled before in this process again, if it is among the last `kept`.

    JAX does so for one function. Tests make a method, its train step and its evaluators anew, often of one config:
    a run that goes on where another was killed, a parameter that only the loader reads.
    """
    from jax._src import compiler

    compiled, programs = compiler.backend_compile_and_load, OrderedDict()

    def shared(backend, module, executable_devices, options, host_callbacks):
        if host_callbacks:
            return compiled(backend, module, executable_devices, options, host_callbacks)
        facts = str(id(backend)), str(module), str(executable_devices), options.SerializeAsString().hex()
        key = hashlib.sha256("\0".join(facts).encode()).digest()
        if key not in programs:
            programs[key] = compiled(backend, module, executable_devices, options, host_callbacks)
            if len(programs) > kept:
                programs.popitem(last=False)
        programs.move_to_end(key)
        return programs[key]

    compiler.backend_compile_and_load = shared
