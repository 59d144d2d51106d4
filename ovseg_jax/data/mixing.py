"""The order in which a mixture of sources draws from its parts."""

import fractions
import math
import sys
from collections.abc import Sequence

import grain
import numpy as np


class MixingOrder(grain.transforms.DatasetSelectionMap):
    """A random order that draws from several endless parts by weight, in shuffled blocks.

    Each block holds the parts in exact proportion. It is shuffled, because in a fixed order a group of examples, or a
    process, might only see some of the parts.
    """

    def __init__(self, weights: Sequence[float], seed: int, block: int = 32):
        """Computes the counts of a block: exact if 1000 draws suffice, else rounded to 1/1000."""
        shares = [fractions.Fraction(w / sum(weights)).limit_denominator(1000) for w in weights]
        shortest = math.lcm(*(share.denominator for share in shares))
        if shortest <= 1000 and all(shares):
            counts = [int(share * shortest) for share in shares]
        else:
            counts = [max(1, round(1000 * share)) for share in shares]
        times = max(1, block // sum(counts))
        self._counts = [times * count for count in counts]
        self._turns = np.repeat(np.arange(len(weights)), self._counts)
        self._seed = seed

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        number, place = divmod(index, len(self._turns))
        turns = np.random.default_rng([self._seed, number, 2]).permutation(self._turns)
        part = int(turns[place])
        return part, number * self._counts[part] + int((turns[:place] == part).sum())
