"""Time, memory and FLOPs of the train step of `scenes`, beside the same model in PyTorch on the same cores.

    python tests/benchmarks/step.py [--sides=jax,eager,compiled] [--steps=20] [--rounds=5]
    python tests/benchmarks/step.py --sides=jax:1,jax:2,jax:4,jax:8
    python tests/benchmarks/step.py --config=tests/benchmarks/maskformer_config.py --sides=jax,eager --steps=2
    python tests/benchmarks/step.py --config=tests/benchmarks/maskformer_config.py:method=mask2former --sides=jax,eager
    python tests/benchmarks/step.py --config=... --sides=jax,eager --predict

The last three are MaskFormer's and Mask2Former's, beside transformers' (maskformer_side.py); with `--predict` a "step"
is inference on the batch, the network alone, and the "loss" is the mean of the absolute mask logits.
A side is ours (`jax`, with as many virtual devices as `main` makes, or `jax:N`), PyTorch as it is (`eager`) or behind
`torch.compile` (`compiled`). Each is a process of its own. All start from the same parameters and make the same
steps on the same batches, in turns of `steps`, so that whatever slows the machine slows all of them. Printed are the
median time of a step, that of the processor (of all cores together; other work on the machine changes it less),
images per second, the ratio to the first side, the share of the matrix rate that this
machine reaches in a large product (MFU; FLOPs counted in the program, those of PyTorch taken to be the same), the
time until the first step was done (compilation), how far resident memory rose above what it was after the imports,
and the loss after the first step and after the turn that warms up, which shows that all compute the same thing. On a
GPU: `--device=cuda`; memory is then the allocator's peak. PyTorch needs `pip install -e '.[torch]'`.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]


def prepare(config, count: int, folder: Path) -> None:
    """Writes parameters and batches that all sides start from."""
    import jax

    from ovseg_jax.data.pipeline import train_iterator
    from ovseg_jax.data.sources.build import make_source
    from ovseg_jax.methods import build, method_type, training_rows
    from ovseg_jax.parallel.sharding import path_name
    from ovseg_jax.pretrained.to_torch import describe
    from ovseg_jax.vocab.words import WordList

    source = make_source(config.data.train)
    words = WordList(method_type(config.method).vocabulary(config, source))
    words.save(folder / "words.json")
    (folder / "classes.json").write_text(source.classes.to_json())
    method = build(config, words, source.classes)
    iterator = train_iterator(config, training_rows(config, method, words), source=source)
    for i, batch in enumerate(itertools.islice(iterator, count)):
        np.savez(folder / f"batch{i}.npz", **batch)
    iterator.close()
    variables = method.init(jax.random.key(config.seed))
    if config.method in ("maskformer", "mask2former"):
        params = variables  # with batch statistics
    else:
        (folder / "net.json").write_text(json.dumps(describe(method.net)))
        params = variables["params"]
    flat = {path_name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(params)}
    np.savez(folder / "params.npz", **flat)


def jax_side(config, folder: Path, batches, device: str, count: int, predict: bool):
    """`step(i) -> loss`, as `main` runs it, on so many virtual devices (0: as many as `main` would make)."""
    import jax
    import jax.numpy as jnp

    from ovseg_jax.costs.flops import count_flops
    from ovseg_jax.main import use_all_cores
    from ovseg_jax.methods import build
    from ovseg_jax.parallel.sharding import batch_sharding, make_mesh, put_batch
    from ovseg_jax.train.optimizer import make_optimizer
    from ovseg_jax.train.state import abstract_variables, create_state, state_shardings
    from ovseg_jax.train.step import make_step
    from ovseg_jax.vocab.classes import ClassList
    from ovseg_jax.vocab.words import WordList

    if count:
        jax.config.update("jax_num_cpu_devices", count)
    else:
        use_all_cores(config.batch_size)
    mesh = make_mesh(config.mesh)
    words, classes = WordList.load(folder / "words.json"), (folder / "classes.json").read_text()
    method = build(config, words, ClassList.from_json(classes))
    jax.set_mesh(mesh)
    variables = abstract_variables(method, config.seed)
    optimizer = make_optimizer(config.optimizer, variables["params"], config.steps, method.frozen)
    shardings = state_shardings(optimizer, variables, mesh)
    state = create_state(method, optimizer, config.seed, shardings)
    train_step = make_step(method, optimizer, config.seed, shardings)

    batch = put_batch(batches[0], mesh)
    flops = count_flops(train_step.trace(state, batch).jaxpr.jaxpr, mesh.size)

    if predict:
        from ovseg_jax.kernels.cpu_convs import fast_on_cpu

        predicted = jax.jit(fast_on_cpu(method.predict))
        flops = count_flops(
            predicted.trace(state.variables, batch["image"], batch["image_size"]).jaxpr.jaxpr, mesh.size
        )

    def step(i: int):
        nonlocal state
        if predict:
            put = put_batch(batches[i], mesh)
            return jnp.abs(predicted(state.variables, put["image"], put["image_size"]).mask_logits).mean()
        state, metrics = train_step(state, put_batch(batches[i], mesh))
        return metrics["loss"][0]

    def peak() -> int | None:
        stats = jax.local_devices()[0].memory_stats() if device != "cpu" else None
        return stats and stats["peak_bytes_in_use"]

    def rate() -> float:
        """FLOPs a second of all devices in a large product, in the model's type."""
        n = 1024 if device == "cpu" else 8192
        rows = jnp.ones((mesh.size, n, n), config.model.dtype, device=batch_sharding(mesh))
        right = jnp.ones((n, n), config.model.dtype)
        product = jax.jit(lambda a, b: a @ b)
        times = []
        for _ in range(10):
            began = time.perf_counter()
            product(rows, right).block_until_ready()
            times.append(time.perf_counter() - began)
        return 2 * mesh.size * n**3 / min(times)

    return step, peak, lambda: (flops, rate())


def torch_side(config, folder: Path, batches, device: str, compiled: bool, predict: bool):
    """The same, in PyTorch: OpenSeg's losses (papers/004, eq. 1-5) and AdamW behind a global clip."""
    if config.method in ("maskformer", "mask2former"):
        import maskformer_side

        return maskformer_side.torch_side(config, folder, batches, device, compiled, predict)
    import torch

    from ovseg_jax.pretrained.to_torch import to_torch
    from ovseg_jax.torch.layers import resize, unit
    from ovseg_jax.torch.openseg import OpenSegNet
    from ovseg_jax.train.optimizer import make_schedule

    loss_config, optimizer = config.loss, config.optimizer
    saved = dict(np.load(folder / "params.npz"))
    image = {k.removeprefix("image/"): v for k, v in saved.items() if k.startswith("image/")}
    net = OpenSegNet(json.loads((folder / "net.json").read_text()))
    net.load_state_dict({name: torch.from_numpy(x) for name, x in to_torch(image).items()})
    net = net.to(device, memory_format=torch.channels_last)
    table, region_raw, pair_raw = (
        torch.nn.Parameter(torch.from_numpy(saved[name]).to(device))
        for name in ("text/table", "temperature/region", "temperature/pair")
    )
    low, high = loss_config.temperature_bounds
    bounded = lambda raw: low * (high / low) ** torch.sigmoid(raw)

    def dice_loss(logits, batch):
        masks = batch["masks"].float() / 255
        pred = torch.sigmoid(resize(logits, masks.shape[2:])).flatten(2)
        target = masks.flatten(2)
        overlap = pred @ target.transpose(1, 2)
        size = pred.square().sum(-1)[:, :, None] + target.square().sum(-1)[:, None, :]
        dice = (2 * overlap + 1e-3) / (size + 1e-3)
        valid, weight = batch["mask_valid"].float(), batch["mask_weight"] * batch["example_mask"]
        per_image = ((1 - dice.amax(1)) * valid).sum(-1) / valid.sum(-1).clamp(min=1)
        counts = ((valid.sum(-1) > 0) & (weight > 0)).float()
        return (per_image * weight * counts).sum() / counts.sum().clamp(min=1)

    def ground_loss(regions, batch):
        words, valid = unit(table[batch["word_ids"]]), batch["word_valid"]
        g = loss_config.group
        regions, words, valid = (x.unflatten(0, (-1, g)) for x in (regions, words, valid))
        similarity = torch.einsum("gbnd,gckd->gbckn", regions, words)
        attention = torch.softmax(similarity / bounded(region_raw), -1)
        per_word = (attention * similarity).sum(-1) * valid[:, None]
        scores = per_word.sum(-1) / valid.sum(-1)[:, None].clamp(min=1) / bounded(pair_raw)
        there = valid.any(-1) & batch["example_mask"].unflatten(0, (-1, g))
        scores = scores.masked_fill(~(there[:, :, None] & there[:, None]), torch.finfo(torch.float32).min)
        positive = scores.diagonal(dim1=1, dim2=2)
        nll = scores.logsumexp(2) + scores.logsumexp(1) - 2 * positive
        return torch.where(there, nll, 0).sum() / there.sum().clamp(min=1)

    def loss_of(batch):
        out = net(batch["image"], batch["image_size"])
        grounding = ground_loss(unit(out.region_sum), batch)
        mask = dice_loss(out.mask_logits, batch)
        return loss_config.grounding_weight * grounding + loss_config.mask_weight * mask

    params = [*net.parameters(), table, region_raw, pair_raw]
    decayed, plain = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": optimizer.weight_decay},
        {"params": plain, "weight_decay": 0},
    ]
    rule = torch.optim.AdamW(groups, betas=(optimizer.b1, optimizer.b2), eps=1e-8, fused=True)
    schedule = make_schedule(optimizer, config.steps)
    rates = [float(schedule(t)) for t in range(len(batches) + 1)]
    forward = torch.compile(loss_of) if compiled else loss_of
    count = itertools.count()

    def step(i: int):
        batch = {
            name: torch.from_numpy(x).to(device) for name, x in batches[i].items() if name != "pixel_classes"
        }
        batch["image"] = batch["image"].permute(0, 3, 1, 2)
        batch["word_ids"] = batch["word_ids"].long()
        rate = rates[min(next(count), len(rates) - 1)]
        for group in rule.param_groups:
            group["lr"] = rate
        loss = forward(batch)
        rule.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, optimizer.clip_norm)
        rule.step()
        return loss

    return step, lambda: torch.cuda.max_memory_allocated() if device == "cuda" else None, lambda: None


def load_config(text: str):
    """The config of `FILE.py:ARG`."""
    import importlib.util

    path, _, arg = text.partition(":")
    spec = importlib.util.spec_from_file_location("config", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg or None)


def rss() -> int:
    """The most resident memory so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def work(side: str, config_text: str, folder: Path, count: int, device: str, predict: bool, pipe) -> None:
    """One side: answers each number of steps with seconds and losses."""
    if device == "cpu" or not side.startswith("jax"):
        os.environ["JAX_PLATFORMS"] = "cpu"
    config = load_config(config_text)
    batches = [dict(np.load(folder / f"batch{i}.npz")) for i in range(count)]
    kind, _, devices = side.partition(":")
    if kind == "jax":
        import ovseg_jax.train.loop  # noqa: F401
    else:
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
    before = rss()
    began = time.perf_counter()
    if kind == "jax":
        step, peak, flops = jax_side(config, folder, batches, device, int(devices or 0), predict)
    else:
        step, peak, flops = torch_side(config, folder, batches, device, kind == "compiled", predict)
    first = step(0).item()
    pipe.send((time.perf_counter() - began, first))
    at = 1
    while steps := pipe.recv():
        began, computed = time.perf_counter(), time.process_time()
        for _ in range(steps):
            loss = step(at)
            at += 1
        loss = loss.item()
        pipe.send((time.perf_counter() - began, time.process_time() - computed, loss))
    pipe.send((peak() or rss() - before, flops()))


def main() -> None:
    """Prints a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/openseg.py")
    parser.add_argument("--sides", default="jax,eager,compiled")
    parser.add_argument("--steps", type=int, default=20, help="steps of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--predict", action="store_true", help="inference in place of the train step")
    args = parser.parse_args()
    count = 1 + args.steps * (args.rounds + 1)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder, config = Path(name), load_config(args.config)
        if args.predict and config.method not in ("maskformer", "mask2former"):
            parser.error(f"--predict is for MaskFormer and Mask2Former; for {config.method}: inference.py")
        preparing = context.Process(target=prepare, args=(config, count, folder))
        preparing.start()
        preparing.join()
        if preparing.exitcode:
            sys.exit("the batches could not be made")
        rows = {}
        for side in args.sides.split(","):
            ours, theirs = context.Pipe()
            arguments = (side, args.config, folder, count, args.device, args.predict, theirs)
            context.Process(target=work, args=arguments, daemon=True).start()
            theirs.close()
            seconds, loss = ours.recv()
            rows[side] = dict(pipe=ours, first=seconds, first_loss=loss, times=[], computed=[])
        for turn in range(args.rounds + 1):
            for row in rows.values():
                row["pipe"].send(args.steps)
                seconds, computed, loss = row["pipe"].recv()
                if turn:
                    row["times"].append(seconds / args.steps)
                    row["computed"].append(computed / args.steps)
                else:  # This turn warms up.
                    row["warm_loss"] = loss
        for row in rows.values():
            row["pipe"].send(0)
            row["memory"], row["flops"] = row["pipe"].recv()
    medians = {side: statistics.median(row["times"]) for side, row in rows.items()}
    reference = next(iter(medians.values()))
    flops, rate = next((row["flops"] for row in rows.values() if row["flops"]), (float("nan"),) * 2)
    print(f"{flops / 1e9:.1f} GFLOP a step; a large product reaches {rate / 1e9:.0f} GFLOP/s")
    print(
        "| side | ms a step | processor, ms | images/s | time | MFU | first step, s | peak MiB "
        f"| loss, step 1 | loss, step {1 + args.steps} |"
    )
    print("|---" * 10 + "|")
    for side, row in rows.items():
        seconds = medians[side]
        print(
            f"| {side} | {1e3 * seconds:.1f} | {1e3 * statistics.median(row['computed']):.1f} "
            f"| {config.batch_size / seconds:.0f} | {seconds / reference:.2f} "
            f"| {flops / seconds / rate:.0%} | {row['first']:.1f} | {row['memory'] / 2**20:.0f} "
            f"| {row['first_loss']:.4f} | {row['warm_loss']:.4f} |"
        )


if __name__ == "__main__":
    main()
