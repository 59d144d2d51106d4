"""Packages that only some tests need: absent, they skip a test on a laptop and fail it in CI."""

import importlib
import os
import sys
from types import ModuleType

import pytest


def require(module: str) -> ModuleType:
    """Imports `module`; where it is missing, skips the test, or fails it where the variable CI is set."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI must have {module} (the extra `torch` or `test` of setup.py): {error}")
        pytest.skip(f"{module} is not installed")


def require_timm(module: str = "timm") -> ModuleType:
    """timm, or open_clip, which both import torchvision; on a CPU build of PyTorch its operators are missing."""
    require("torch")
    name = "torchvision._meta_registrations"  # Registers shapes for these operators; nobody here needs them.
    sys.modules.setdefault(name, ModuleType(name))
    return require(module)
