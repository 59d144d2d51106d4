"""MaPLe against open_clip's towers with contexts put into both, one block at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.methods import build
from ovseg_jax.parallel.sharding import make_mesh, put_batch
from ovseg_jax.protocols import only
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList
from tests.extras import require
from tests.methods import torch_clip

WORDS = WordList("a photo of big cat dog red fox sky".split())
NAMES = ["cat", "big_dog", "red_fox", "sky", "big red fox"]
CLASSES = ClassList(tuple((name,) for name in NAMES), tuple(range(5)), (True,) * 5)
M = 2


def make(depth=3, **changes):
    prompt = dict(length=M, depth=depth, init="a photo of a")
    return build(torch_clip.config("maple", prompt, **changes), WORDS, CLASSES)


def original(method, model, params, images):
    """Logits: the words "of a" stay, the first two give their places to the context."""
    torch = require("torch")
    prompt, coupling = params["prompt"], params["coupling"]
    contexts = torch.cat([prompt["context"], prompt["deep"]])
    ids, _ = method.clip.tokenizer([f"a photo of a {name.replace('_', ' ')}." for name in NAMES])
    x = model.token_embedding(torch.tensor(ids).long())
    x = torch.cat([x[:, :1], contexts[0].expand(len(x), -1, -1), x[:, 1 + M :]], 1)
    text = torch_clip.read(model, x, torch.tensor(ids.argmax(-1)), contexts[1:])
    tokens = [c @ w + b for c, w, b in zip(contexts, coupling["kernel"], coupling["bias"], strict=True)]
    return torch_clip.SCALE * torch_clip.see(model, images, tokens) @ text.T


# A depth of 3 is all blocks, and a sample of 5, like 0, all classes.
@pytest.mark.parametrize("depth,sample", [(2, 0), (3, 5)])
def test_loss_and_gradients(depth, sample):
    method, batch = make(depth, **{"loss.sample": sample}), torch_clip.batch(len(NAMES))
    model, towers = torch_clip.make(method.clip)
    variables = {"params": torch_clip.draw(method)["params"], "towers": towers}
    loss, grad = torch_clip.value_and_grad(method, variables, batch)

    own = jax.tree.map(torch_clip.tensor, variables["params"])
    logits = original(method, model, own, batch["image"])
    expected = torch_clip.cross_entropy(logits, batch)
    expected.backward()
    torch_clip.close(loss, expected)
    jax.tree.map(lambda ours, theirs: torch_clip.close(ours, theirs.grad), grad, own)
    if depth == 3:
        ours = method.embed_image(variables, batch["image"]) @ only(method.embed_text(variables, NAMES)).T
        torch_clip.close(torch_clip.SCALE * ours, logits)


def test_a_sample_of_the_classes_on_one_and_on_eight_devices():
    method, batch = make(**{"loss.sample": 3}), torch_clip.batch(len(NAMES))
    variables = torch_clip.draw(method)
    one = torch_clip.value_and_grad(method, variables, batch)
    mesh = make_mesh({"data": 4, "fsdp": 2})
    with jax.set_mesh(mesh):
        many = torch_clip.value_and_grad(method, variables, put_batch(batch, mesh))
    jax.tree.map(lambda a, b: torch_clip.close(a, b, 1e-4), many, one)


def test_it_starts_from_words_and_learns(monkeypatch):
    method = make(1)
    variables = jax.jit(method.init)(jax.random.key(0))
    params = variables["params"]
    kernel, bound = params["coupling"]["kernel"], torch_clip.TEXT["width"] ** -0.5
    assert kernel.shape == (1, torch_clip.TEXT["width"], torch_clip.IMAGE["width"])
    assert 0.9 * bound < np.abs(kernel).max() <= bound
    monkeypatch.setattr(method.clip, "pretrained", lambda: jax.device_get(variables["towers"]))
    found = method.pretrained()["params"]["prompt"]["context"]
    ids, _ = method.clip.tokenizer(["a photo"])
    np.testing.assert_array_equal(found[0], variables["towers"]["text"]["Embed_0"]["embedding"][ids[0, 1:3]])
    losses = torch_clip.losses(method, variables)
    assert losses[-1] < 0.8 * losses[0]


def test_all_deep_maps_start_from_the_same_values():
    draw = lambda key: make(3).init(key)["params"]["coupling"]["kernel"][:, :2, :2]
    first, second, third = jax.jit(draw)(jax.random.key(0))
    np.testing.assert_array_equal(second, third)
    assert not jnp.allclose(first, second)


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"prompt.position": "middle"}, "prompt.position=end"),
        ({"prompt.specific": True}, "prompt.specific=False"),
        ({"towers.text.layers": 2}, "exceeds the 2 blocks of the text tower"),
        ({"prompt.depth": 0}, "1 to 3"),
    ],
)
def test_what_cannot_be(changes, said):
    config = torch_clip.config(
        "maple", dict(length=M, depth=3, init="", position="end", specific=False), **changes
    )
    with pytest.raises(UserError, match=said):
        build(config, WORDS, CLASSES)


def test_an_empty_name():
    method = make()
    with pytest.raises(UserError, match="class 1 is empty"):
        method.embed_text(torch_clip.draw(method), ["cat", "_ "])
