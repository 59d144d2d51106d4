"""The readers of published data sets by name; none is here yet."""

from ovseg_jax.config import import_class
from ovseg_jax.datasets.base import Dataset

DATASETS: dict[str, str] = {}
"""The class of each data set, imported when it is used."""


def find_dataset(name: str) -> type[Dataset]:
    """Returns the reader of a data set that is named as in `DATASETS`, or as "module:Class".

    Raises:
      UserError: there is no such data set.
    """
    return import_class(DATASETS.get(name, name), Dataset, "data set", DATASETS)
