"""Packages that only some tests need: absent, they skip a test on a laptop and fail it in CI."""

import importlib
import os
import sys
from types import ModuleType

import pytest


def require(module: str) -> ModuleType:
    """Imports `module`; where it is missing, skips the test, or fails it where the variable CI is set."""
    if module.split(".")[0] in ("open_clip", "timm", "torchmetrics", "torchvision", "transformers"):
        # Their torchvision has operators that a CPU build of PyTorch lacks; nobody here needs their shapes.
        name = "torchvision._meta_registrations"
        sys.modules.setdefault(name, ModuleType(name))
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI must have {module} (an extra of setup.py): {error}")
        pytest.skip(f"{module} is not installed")
