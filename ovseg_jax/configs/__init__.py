"""The example configs, which lie in the folder configs/ beside the package in a checkout.

An installation holds the files of configs/ here instead (package_dir in setup.py).
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "configs")]
