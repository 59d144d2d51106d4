"""CoCoOp as its authors define it (KaiyangZhou/CoOp, trainers/cocoop.py), in PyTorch, one image after the other."""

import jax
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.evals.classification import ClassificationEvaluator
from ovseg_jax.methods import build, cocoop
from ovseg_jax.parallel.sharding import make_mesh, put_batch
from ovseg_jax.protocols import Classifier, only
from ovseg_jax.towers import prompt
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList
from tests.extras import require
from tests.methods import torch_clip

WORDS = WordList("a photo of big cat dog red fox sky".split())
NAMES = ["cat", "big_dog", "red_fox", "sky", "big red fox"]
CLASSES = ClassList(
    tuple((n,) for n in NAMES), tuple(range(5)), (True,) * 5, {"base": (0, 1, 4), "new": (2, 3)}
)
M = 3


def make(**changes):
    return build(
        torch_clip.config("cocoop", dict(length=M, init="", specific=False), **changes), WORDS, CLASSES
    )


def original(method, model, params, images):
    """Logits, and the class features of each image."""
    torch = require("torch")
    ids, _ = method.clip.tokenizer(["a " * M + name.replace("_", " ") for name in NAMES])
    vectors, ends = model.token_embedding(torch.tensor(ids).long()), torch.tensor(ids.argmax(-1))
    meta, texts, logits = params["meta"], [], []
    for image in torch_clip.see(model, images):
        hidden = torch.relu(image @ meta["hidden"]["kernel"] + meta["hidden"]["bias"])
        context = params["prompt"]["context"][0] + hidden @ meta["out"]["kernel"] + meta["out"]["bias"]
        x = torch.cat([vectors[:, :1], context.expand(len(NAMES), -1, -1), vectors[:, 1 + M :]], 1)
        texts.append(torch_clip.read(model, x, ends))
        logits.append(torch_clip.SCALE * image @ texts[-1].T)
    return torch.stack(logits), texts


def test_loss_gradients_and_evaluation():
    method, batch = make(), torch_clip.batch(len(NAMES))
    model, towers = torch_clip.make(method.clip)
    variables = {"params": torch_clip.draw(method)["params"], "towers": towers}
    loss, grad = torch_clip.value_and_grad(method, variables, batch)

    own = jax.tree.map(torch_clip.tensor, variables["params"])
    logits, texts = original(method, model, own, batch["image"])
    expected = torch_clip.cross_entropy(logits, batch)
    expected.backward()
    torch_clip.close(loss, expected)
    jax.tree.map(lambda ours, theirs: torch_clip.close(ours, theirs.grad), grad, own)

    image = method.embed_image(variables, batch["image"][:1])[0]
    torch_clip.close(only(method.embed_text_for(variables, NAMES, image)), texts[0])

    mesh = make_mesh(devices=jax.devices()[:4])
    batches = lambda: [jax.tree.map(np.asarray, dict(batch))]
    hard = {"hard": ["a photo of a {}."]}
    scores = ClassificationEvaluator("x", method, CLASSES, batches, mesh, prompts=hard).run(variables)
    mask, label = np.asarray(batch["example_mask"]), np.asarray(batch["label"])
    logits, texts = logits.detach().numpy()[mask], [text.detach() for text in texts]
    right = {"accuracy": logits.argmax(1) == label[mask]}
    for group in ("base", "new"):
        members = np.array(CLASSES.groups[group])
        rows = np.isin(label[mask], members)
        right[f"accuracy@{group}@own"] = members[logits[:, members].argmax(1)][rows] == label[mask][rows]
    distance = [
        ((texts[i][label[i]] - torch_clip.see(model, batch["image"])[i]) ** 2).sum()
        for i in range(8)
        if mask[i]
    ]
    for name, value in right.items():
        np.testing.assert_allclose(scores[name], 100 * value.mean(), rtol=1e-6)
    np.testing.assert_allclose(scores["alignment"], np.mean([float(d) for d in distance]), rtol=1e-5)
    assert "uniformity" not in scores and "uniformity[hard]" in scores


@pytest.mark.parametrize("room", [1_000, 8])
def test_a_sample_of_the_classes_on_one_and_on_eight_devices(room, monkeypatch):
    """With room for the tokens of every sample, and of some alone: no device may wait for the others there."""
    method, batch = make(**{"loss.sample": 3}), torch_clip.batch(len(NAMES))
    variables = torch_clip.draw(method)
    one = torch_clip.value_and_grad(method, variables, batch)
    exceeds: list[bool] = []
    way = prompt._overflow

    def noted(function, needed, inputs, tokens):
        jax.debug.callback(lambda x: exceeds.append(bool(x)), needed)
        return way(function, needed, inputs, tokens)

    monkeypatch.setattr(prompt, "_overflow", noted)
    monkeypatch.setattr(cocoop, "likely_size", lambda *_: room)
    mesh = make_mesh({"data": 4, "fsdp": 2})
    with jax.set_mesh(mesh):
        many = torch_clip.value_and_grad(method, variables, put_batch(batch, mesh))
    jax.effects_barrier()
    assert set(exceeds) == ({False, True} if room == 8 else set())
    jax.tree.map(lambda a, b: torch_clip.close(a, b, 1e-4), many, one)


def test_it_learns():
    method = make()
    start = jax.jit(lambda key: method.init(key)["params"])(jax.random.key(0))
    assert start["meta"]["hidden"]["kernel"].shape == (torch_clip.D, torch_clip.D // 16)
    losses = torch_clip.losses(method, {**torch_clip.draw(method), "params": start}, steps=40, rate=0.05)
    assert losses[-1] < 0.8 * losses[0]


def test_what_cannot_be():
    assert isinstance(make(), Classifier)
    with pytest.raises(UserError, match=r"prompt\.specific=False"):
        make(**{"prompt.specific": True})
    with pytest.raises(UserError, match="depend on the image"):
        make().embed_text({}, ["cat"])
