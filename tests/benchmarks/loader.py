"""Images per second of the training loader of a config, without any training. Prints one JSON line.

python tests/benchmarks/loader.py --config=configs/openseg.py --batches=200 [--workers=2] [--threads=0]
"""

import argparse
import importlib.util
import json
import time
from typing import Any

from ovseg_jax.data.pipeline import make_source, train_iterator, words_for


def measure(config: Any, batches: int = 100, warmup: int = 10) -> dict[str, float]:
    """Draws batches as fast as they come.

    Args:
      config: with `seed`, `steps`, `batch_size` and `data`.
      batches: number of batches timed.
      warmup: batches before that, which start the workers and fill the cache.

    Returns:
      `images_per_second`, `milliseconds_per_batch`, and `vocabulary_seconds`, the time to count the captions'
      words.
    """
    source = make_source(config["data"]["train"])
    start = time.perf_counter()
    words = words_for(config, source)
    counted = time.perf_counter() - start
    iterator = train_iterator(config, words, source=source)
    for _ in range(warmup):
        next(iterator)
    start = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    seconds = time.perf_counter() - start
    iterator.close()
    return {
        "images_per_second": round(batches * config["batch_size"] / seconds, 1),
        "milliseconds_per_batch": round(1000 * seconds / batches, 2),
        "vocabulary_seconds": round(counted, 2),
    }


def main() -> None:
    """Reads the config and prints the measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/openseg.py", help="FILE.py or FILE.py:key=value,...")
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--workers", type=int, help="in place of data.workers")
    parser.add_argument("--threads", type=int, help="in place of data.threads")
    args = parser.parse_args()
    path, _, arg = args.config.partition(":")
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(arg or None)
    with config.unlocked():
        for key in ("workers", "threads"):
            if getattr(args, key) is not None:
                config.data[key] = getattr(args, key)
    measured = measure(config, args.batches, args.warmup)
    print(json.dumps({"config": args.config, "batch_size": config.batch_size, **measured}))


if __name__ == "__main__":
    main()
