"""Images per second of a config's training loader, without any training, beside torch's DataLoader.

    python tests/benchmarks/loader.py --config=configs/openseg.py [--batches=100] [--rounds=3] [--torch] \
        [--config.data.workers=2]

Both sides make the same rows, by the same code (reading, decoding, augmentation), with as many worker processes;
they take turns, and each turn first draws what had been prepared before it. Prints one JSON line; `ratio` is the
median of ours over theirs. `--torch` needs `pip install -e '.[torch]'`.
"""

import argparse
import ast
import importlib.util
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

from ovseg_jax.data.pipeline import train_iterator, train_rows
from ovseg_jax.data.rows import Rows
from ovseg_jax.data.sources.build import make_source
from ovseg_jax.towers.vocabulary import counted_words


def torch_batches(config: Any, make_row: Rows, source: Any) -> Iterator[Any]:
    """The rows of `train_iterator`, batched by torch's DataLoader."""
    import numpy as np
    from torch.utils.data import DataLoader, Dataset, Sampler

    rows = train_rows(config, make_row, source)

    class Examples(Dataset):
        def __getitem__(self, index):
            return rows[index]

    class InOrder(Sampler):
        def __iter__(self):
            return itertools.count()

    collate = lambda examples: {name: np.stack([e[name] for e in examples]) for name in examples[0]}
    workers = config.data.get("workers", 0)
    ahead = dict(prefetch_factor=config.data.get("prefetch", 4)) if workers else {}
    return iter(
        DataLoader(
            Examples(), config.batch_size, sampler=InOrder(), num_workers=workers, collate_fn=collate, **ahead
        )
    )


def measure(
    config: Any, batches: int = 100, warmup: int = 40, rounds: int = 1, torch: bool = False
) -> dict[str, float]:
    """Draws batches as fast as they come.

    Args:
      config: with `seed`, `steps`, `batch_size` and `data`.
      batches: number of batches timed in each round.
      warmup: batches before each round's.
      rounds: how often.
      torch: also torch's DataLoader, in turns.

    Returns:
      `images_per_second` (median over rounds), `vocabulary_seconds`, the time to count the captions' words, and with
      `torch` `torch_images_per_second` and `ratio`.
    """
    source = make_source(config["data"]["train"])
    start = time.perf_counter()
    words = counted_words(config["data"], source)
    counted = time.perf_counter() - start
    make_row = Rows.from_config(config, ("image", "masks", "words"), words)
    ours = train_iterator(config, make_row, source=source)
    sides = [ours, torch_batches(config, make_row, source)] if torch else [ours]
    rates: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, rate in zip(sides, rates, strict=True):
            for _ in range(warmup):
                next(side)
            start = time.perf_counter()
            for _ in range(batches):
                next(side)
            rate.append(batches * config["batch_size"] / (time.perf_counter() - start))
    ours.close()
    found = {
        "images_per_second": round(statistics.median(rates[0]), 1),
        "vocabulary_seconds": round(counted, 2),
    }
    if torch:
        found["torch_images_per_second"] = round(statistics.median(rates[1]), 1)
        found["ratio"] = round(statistics.median(a / b for a, b in zip(*rates, strict=True)), 2)
    return found


def main() -> None:
    """Reads the config and prints the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/openseg.py", help="FILE.py or FILE.py:key=value,...")
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--warmup", type=int, default=40, help="more than is prepared ahead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--torch", action="store_true", help="also torch's DataLoader")
    args, overrides = parser.parse_known_args()
    path, _, arg = args.config.partition(":")
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(arg or None)
    for override in overrides:
        key, _, value = override.removeprefix("--config.").partition("=")
        with config.unlocked():
            config.update_from_flattened_dict({key: ast.literal_eval(value)})
    measured = measure(config, args.batches, args.warmup, args.rounds, args.torch)
    print(json.dumps({"config": args.config, "batch_size": config.batch_size, **measured}))


if __name__ == "__main__":
    main()
