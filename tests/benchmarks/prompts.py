"""A step of prompt tuning: ours against the original's way of computing.

  python tests/benchmarks/prompts.py [--classes=64,256] [--length=16] [--batch=32] [--rounds=3] [--names=10450]
      [--exact=0] [--remat=dots]

CLIP ViT-B/16's text tower with random weights in float32, image features given, M = 16, ImageNet-21K's class names as
timm lists them (10,450; --names=21841, or a file of others, one a line). The original (PyTorch,
amazon-science/prompt-pretraining) sends all 77 tokens of each of K sampled classes through the tower, a stack of
nn.MultiheadAttention, and back. Both sides get the same K classes, images and prompt; each is a process of its own, and
they take turns. Printed are the median time of a step and its ratio to ours, the peak of memory beyond what the process
held before its first step (ours with XLA's compiler in it, up to 400 MiB, unless JAX_COMPILATION_CACHE_DIR holds the
program from an earlier call), what XLA has planned for the program, the time of the first step (compilation), and the
relative errors of loss and gradient.
--exact=CHUNK adds our softmax over all classes, CHUNK of them at a time; --sides=ours,image what the image tower takes
for the same images, which a step is spared where their features are kept (data.cache_features). PyTorch needs
`pip install -e '.[torch]'`. --remat is what our backward pass computes again (`models.remat`).
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from tests.extras import require  # noqa: E402

SCALE = 100.0


LISTS = {"10450": "imagenet21k_miil_w21_synsets.txt", "21841": "imagenet22k_synsets.txt"}


def class_names(which: str) -> list[str]:
    """Names, one a class: timm's of ImageNet-21K (a key of LISTS), or a file of them, one a line."""
    if which not in LISTS:
        return [line.strip() for line in Path(which).read_text("utf-8").splitlines() if line.strip()]
    folder = Path(require("timm.data").__file__).parent / "_info"
    lines = (folder / "imagenet_synset_to_lemma.txt").read_text("utf-8").splitlines()
    names = dict(line.split("\t") for line in lines)
    return [names[wnid].split(",")[0] for wnid in (folder / LISTS[which]).read_text("utf-8").split()]


def problem(count: int, classes: int, batch: int, length: int, seed: int = 1):
    """Which classes, each image's own among them, features, the prompt."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(count)[:classes]
    image = rng.standard_normal((batch, 512)).astype(np.float32)
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    context = 0.02 * rng.standard_normal((length, 512)).astype(np.float32)
    return chosen, rng.integers(0, classes, batch).astype(np.int32), image, context


def memory(field: str) -> int:
    """Bytes of this process: "VmRSS", what it holds, or "VmHWM", the most that it has held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def original(names: list[str], folder: Path, length: int, batch: int):
    """PyTorch: (chosen classes) -> loss and gradient."""
    import torch

    open_clip = require("open_clip")
    model = open_clip.create_model("ViT-B-16-quickgelu", pretrained=None)
    model.load_state_dict(torch.load(folder / "clip.pt"))
    model.requires_grad_(False)
    tokenizer = open_clip.get_tokenizer("ViT-B-16")
    tokens = tokenizer([" ".join(["X"] * length) + " " + name + "." for name in names])

    def step(classes: int):
        chosen, labels, image, start = problem(len(names), classes, batch, length)
        ids, labels, image = tokens[chosen], torch.from_numpy(labels).long(), torch.from_numpy(image)
        context = torch.nn.Parameter(torch.from_numpy(start.copy()))
        embedded = model.token_embedding(ids)
        x = torch.cat([embedded[:, :1], context.expand(len(ids), -1, -1), embedded[:, 1 + length :]], 1)
        x = model.transformer(x + model.positional_embedding, attn_mask=model.attn_mask)
        x = model.ln_final(x)
        text = x[torch.arange(len(ids)), ids.argmax(-1)] @ model.text_projection
        logits = SCALE * image @ torch.nn.functional.normalize(text, dim=-1).T
        margin = np.log10((len(names) - 1) / (classes - 1))
        logits = logits + margin * (1 - torch.nn.functional.one_hot(labels, classes))
        loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        return loss.item(), context.grad.numpy(), 0

    return step


def ours(names: list[str], folder: Path, length: int, batch: int, remat: str):
    """This library: (classes, and how many at once if all take part) -> loss, gradient, bytes that XLA plans."""
    import jax
    import jax.numpy as jnp
    from ml_collections import ConfigDict

    from ovseg_jax.kernels.sampled_softmax import full_softmax
    from ovseg_jax.towers.clip import Clip
    from ovseg_jax.towers.prompt import Layout, NameTokens, even_order, likely_size, window_size
    from ovseg_jax.vocab.words import WordList

    text = dict(name="clip_vitb16", remat=remat)
    towers = dict(image=dict(name="clip_vitb16"), text=text, init=str(folder / "clip.pt"))
    clip = Clip(ConfigDict(dict(towers, tokenizer=str(folder))), WordList([]))
    weights = jax.device_put({"text": clip.pretrained()["text"]})
    layout = Layout(length)
    tokens = layout.tokens(clip.tokenizer, names)
    order = even_order(tokens.length)
    even = NameTokens(*(x[order] for x in tokens))

    def loss(context, weights, tokens, labels, image, size, margin):
        text = clip.encode(weights, context[None], layout, tokens, size, may_exceed=True)
        text = text / jnp.linalg.norm(text, axis=-1, keepdims=True)
        logits = SCALE * image @ text.T
        own = labels[:, None] == jnp.arange(text.shape[0])
        logits = logits + margin * (1 - own)
        return (jax.nn.logsumexp(logits, -1) - jnp.where(own, logits, 0).sum(-1)).mean()

    def exact(context, weights, labels, image, size, chunk):
        encode = lambda p, tokens: clip.encode(p[1], p[0][None], layout, tokens, size)
        valid = jnp.ones(len(labels), bool)
        out = full_softmax(encode, (context, weights), even, image, labels, valid, SCALE, chunk=chunk)
        return out.loss / len(labels)

    sampled = jax.jit(jax.value_and_grad(loss), static_argnames=("size", "margin"))
    full = jax.jit(jax.value_and_grad(exact), static_argnames=("size", "chunk"))
    programs = {}

    def run(program, *arguments, **static):
        key = tuple(static.items())
        if key not in programs:
            programs[key] = program.lower(*arguments, **static).compile()
        value, grad = programs[key](*arguments)
        return float(value), np.asarray(grad), programs[key].memory_analysis().temp_size_in_bytes

    def step(classes: int, chunk: int = 0):
        if chunk:
            _, labels, image, context = problem(len(names), classes, batch, length)
            labels = np.argsort(order)[labels].astype(np.int32)
            size = window_size(even.length, chunk)
            return run(full, context, weights, labels, image, size=size, chunk=chunk)
        chosen, labels, image, context = problem(len(names), classes, batch, length)
        picked = NameTokens(*(x[chosen] for x in tokens))
        size = likely_size(tokens.length, classes)
        margin = float(np.log10((len(names) - 1) / (classes - 1)))
        return run(sampled, context, weights, picked, labels, image, size=size, margin=margin)

    return step


def image_tower(names: list[str], folder: Path, length: int, batch: int):
    """What a step costs beside the text where image features are not kept; it has no loss."""
    import jax
    from ml_collections import ConfigDict

    from ovseg_jax.towers.clip import Clip
    from ovseg_jax.vocab.words import WordList

    towers = dict(image=dict(name="clip_vitb16"), text=dict(name="clip_vitb16"), init=str(folder / "clip.pt"))
    clip = Clip(ConfigDict(dict(towers, tokenizer=str(folder))), WordList([]))
    weights = jax.device_put({"image": clip.pretrained()["image"]})
    embed = jax.jit(clip.embed_image)
    images = np.random.default_rng(0).integers(0, 256, (batch, 224, 224, 3), np.uint8)

    def step(classes: int):
        np.asarray(embed(weights, images))
        return 1.0, np.ones((length, 512), np.float32), 0

    return step


def work(side: str, names: list[str], folder: Path, length: int, batch: int, remat: str, pipe) -> None:
    """Answers each step's arguments with (seconds, loss, gradient, peak of memory and of it planned, in bytes)."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    how = {"original": original, "ours": partial(ours, remat=remat), "image": image_tower}[side]
    step = how(names, folder, length, batch)
    held = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # The most from here on.
    while (asked := pipe.recv()) is not None:
        began = time.perf_counter()
        value, grad, planned = step(*asked)
        pipe.send((time.perf_counter() - began, value, grad, memory("VmHWM") - held, planned))


def prepare(folder: Path, bpe: str) -> None:
    """Random weights as OpenAI's file holds them, with the spread of trained ones, and the tokeniser."""
    import torch

    open_clip = require("open_clip")
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-16-quickgelu", pretrained=None)
    for name, p in model.named_parameters():
        if "ln_" in name or "bias" in name:
            p.data += 0.1 * torch.randn_like(p)
        elif "token_embedding" in name or name == "positional_embedding":
            p.data *= 5
    torch.save(model.state_dict(), folder / "clip.pt")
    source = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    (folder / source.name).write_bytes(source.read_bytes())


def main() -> None:
    """Runs the sides in turns and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", default="64,256")
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--exact", type=int, default=0)
    parser.add_argument("--sides", default="ours,original")
    parser.add_argument("--names", default="10450")
    parser.add_argument("--remat", default="dots")
    args = parser.parse_args()
    names = class_names(args.names)
    context = multiprocessing.get_context("spawn")
    print(f"{len(names)} names; batch {args.batch}, M = {args.length}")
    print(
        "| side | K | s a step | time | memory, MiB | planned | first step, s | loss off by | gradient off by |"
    )
    print("|---" * 9 + "|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        making = context.Process(target=prepare, args=(folder, ""))
        making.start()
        making.join()
        if making.exitcode:
            sys.exit("the model could not be made")
        asked = [((int(k),), args.rounds) for k in args.classes.split(",") if k]
        if args.exact:
            asked.append(((len(names), args.exact), min(args.rounds, 1)))
        for steps, rounds in asked:
            # A process for each K: its peak of memory is this K's.
            sides = {}
            for side in args.sides.split(",") if len(steps) == 1 else ["ours"]:
                sides[side], theirs = context.Pipe()
                args_ = (side, names, folder, args.length, args.batch, args.remat, theirs)
                context.Process(target=work, args=args_, daemon=True).start()
                theirs.close()
            answers = {side: [] for side in sides}
            for _ in range(rounds + 1):
                for side, pipe in sides.items():
                    pipe.send(steps)
                    answers[side].append(pipe.recv())
            reference = answers["original" if "original" in sides else "ours"][0]
            first = None
            for side, answer in answers.items():
                seconds = statistics.median(a[0] for a in answer[1:] or answer)
                first = first or seconds
                _, value, grad, held, planned = answer[-1]
                if side == "image":
                    print(
                        f"| image tower | | {seconds:.2f} | | {held / 2**20:.0f} | | {answer[0][0]:.1f} | | |",
                        flush=True,
                    )
                    continue
                off = abs(value - reference[1]) / abs(reference[1])
                grad_off = np.linalg.norm(grad - reference[2]) / np.linalg.norm(reference[2])
                print(
                    f"| {side} | {steps[0]} | {seconds:.2f} | {seconds / first:.1f} | {held / 2**20:.0f} "
                    f"| {planned / 2**20:.0f} | {answer[0][0]:.1f} | {off:.1e} | {grad_off:.1e} |",
                    flush=True,
                )
            for pipe in sides.values():
                pipe.send(None)


if __name__ == "__main__":
    main()
