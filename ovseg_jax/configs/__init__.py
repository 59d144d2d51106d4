"""The configs in a checkout, where their files lie in the folder configs/ beside the package.

An installation holds the files of configs/ here instead (package_dir in setup.py).
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "configs")]
