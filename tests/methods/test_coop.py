"""CoOp as its authors define it (KaiyangZhou/CoOp, trainers/coop.py), in PyTorch with CLIP's own tokeniser."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.kernels.unit import unit
from ovseg_jax.methods import build
from ovseg_jax.protocols import only
from ovseg_jax.towers.prompt import window_size
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList
from tests.extras import require
from tests.methods import torch_clip

NAMES = [
    "red_fox",
    "Boeing 737-200",
    "St. Bernard",
    "bus (vehicle)",
    "hawk",
    "washing machine",
    "Bœuf à la mode",
]
CLASSES = ClassList(tuple((name,) for name in NAMES), tuple(range(7)), (True,) * 7)
M = 4


def make(position, specific):
    prompt = dict(length=M, position=position, specific=specific, init="")
    # CLIP's vocabulary lies there.
    folder = str(Path(require("open_clip").__file__).parent)
    changes = {"towers.tokenizer": folder, "towers.text.vocab_size": 49408}
    return build(torch_clip.config("pomp", prompt, **changes), WordList([]), CLASSES)


@pytest.fixture(scope="module")
def shared():
    """Our tokeniser and theirs, and the towers: the same for all prompts."""
    method = make("end", False)
    theirs = require("open_clip").tokenizer.SimpleTokenizer(context_length=torch_clip.TEXT["length"])
    return method.clip.tokenizer, theirs, *torch_clip.make(method.clip)


@pytest.fixture
def case(shared, monkeypatch, position, specific):
    """A method, its variables, a batch of features, and the logits of the original as a function of its context."""
    ours, tokenizer, model, towers = shared
    monkeypatch.setattr("ovseg_jax.towers.clip.load_tokenizer", lambda *_, **__: ours)
    shape = (len(NAMES) if specific else 1, M, torch_clip.TEXT["width"])
    context = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    variables = {"params": {"prompt": {"context": jnp.asarray(context)}}, "towers": towers}
    batch = torch_clip.batch(len(NAMES))
    image = torch_clip.see(model, batch.pop("image"))
    batch["feature"] = jnp.asarray(image.numpy(), jnp.float32)
    own = torch_clip.tensor(context if specific else context[0])
    logits = torch_clip.SCALE * image @ original(model, tokenizer, own, position).T
    loss = torch_clip.cross_entropy(logits, batch)
    loss.backward()
    return make(position, specific), variables, batch, logits, loss, own.grad.reshape(shape)


def original(model, tokenizer, context, position):
    """Class features: the text with M words "X", whose vectors are replaced, and the name moved to its place."""
    torch = require("torch")
    names = [name.replace("_", " ") for name in NAMES]
    ids = tokenizer([" ".join(["X"] * M) + " " + name + "." for name in names])
    vectors = model.token_embedding(ids)
    if context.ndim == 2:
        context = context.expand(len(names), -1, -1)
    rows = []
    for x, own, name in zip(vectors, context, names, strict=True):
        start, behind = x[:1], x[1 + M :]
        half, n = {"end": (M, 0), "middle": (M // 2, None), "front": (0, None)}[position]
        n = len(tokenizer.encode(name)) if n is None else n
        rows.append(torch.cat([start, own[:half], behind[:n], own[half:], behind[n:]]))
    return torch_clip.read(model, torch.stack(rows), ids.argmax(-1))


@pytest.mark.parametrize("specific", [False, True])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_logits_and_gradients(case):
    method, variables, batch, expected_logits, _, expected_grad = case
    tokens = method.layout.tokens(method.clip.tokenizer, NAMES)
    size = window_size(tokens.length, len(NAMES))

    @jax.jit
    def run(context):
        text = unit(method.clip.encode(variables["towers"], context, method.layout, tokens, size))
        logits = torch_clip.SCALE * batch["feature"] @ text.T
        loss = -jax.nn.log_softmax(logits)[jnp.arange(8), batch["label"]]
        return loss.mean(where=batch["example_mask"]), logits

    grad, logits = jax.grad(run, has_aux=True)(variables["params"]["prompt"]["context"])
    torch_clip.close(logits, expected_logits)
    torch_clip.close(grad, expected_grad)


@pytest.mark.parametrize("position,specific", [("middle", False)])
def test_the_method_has_that_loss(case):
    method, variables, batch, expected_logits, expected, expected_grad = case
    loss, grad = torch_clip.value_and_grad(method, variables, batch)
    torch_clip.close(loss, expected)
    torch_clip.close(grad["prompt"]["context"], expected_grad)
    text = only(method.embed_text(variables, NAMES))
    torch_clip.close(torch_clip.SCALE * batch["feature"] @ text.T, expected_logits)
