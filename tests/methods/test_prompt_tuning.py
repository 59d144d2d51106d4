"""Prompt tuning against the tower applied to every class in full, with float64 sums, on one and eight devices."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.methods import build, prompt_tuning
from ovseg_jax.parallel.sharding import make_mesh, put_batch
from ovseg_jax.protocols import only
from ovseg_jax.towers import prompt
from ovseg_jax.towers.packed_text import unstacked
from ovseg_jax.towers.prompt import encode_names
from ovseg_jax.train.checkpoints import read_run, write_config
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList
from tests.bucket import bucket  # noqa: F401
from tests.methods.test_groupvit_method import pieces

WORDS = WordList(
    "a photo of red blue green spotty plain striped old small kite ball house moon very big".split()
)
B, D, SIZE = 16, 12, 16


def class_list(count=40):
    rng = np.random.default_rng(0)
    names, words = set(), WORDS.words[4:]
    while len(names) < count:
        names.add(" ".join(rng.choice(words, rng.integers(1, 6), replace=False)))
    names = tuple((name,) for name in sorted(names))
    return ClassList(names, tuple(range(count)), (True,) * count, {"seen": tuple(range(count // 2))})


CLASSES = class_list()


def config(**changes):
    base = ConfigDict(
        dict(
            method="pomp",
            batch_size=B,
            accumulate=1,
            towers=dict(
                image=dict(name="small", width=16, levels=2, embed_dim=D),
                text=dict(name="clip", width=16, heads=2, layers=3, embed_dim=D, length=16),
                init="",
                tokenizer="words",
                image_size=SIZE,
                logit_scale=9.0,
            ),
            prompt=dict(length=4, position="end", specific=False, init=""),
            loss=dict(sample=12, correction="log10", proposal="uniform", per_device=False, chunk=8),
            data=dict(image_size=SIZE),
        )
    )
    base.update_from_flattened_dict(changes)
    return base


def random_batch(seed=0):
    rng = np.random.default_rng(seed)
    batch = {
        "image": rng.integers(0, 256, (B, SIZE, SIZE, 3), np.uint8),
        "label": rng.integers(0, len(CLASSES), B).astype(np.int32),
        "example_mask": np.arange(B) != 3,
    }
    return jax.tree.map(jnp.asarray, batch)


def variables_of(method):
    """Random, with more spread than the initial values have."""
    rng = np.random.default_rng(1)
    noisy = lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32)
    variables = jax.tree.map(noisy, jax.jit(method.init)(jax.random.key(0)))
    variables["towers"]["scale"] = jnp.log(jnp.float32(9.0))
    return variables


def full_features(method, variables, context):
    """[N D] features: for each class its whole text, token by token, through Flax's tower."""
    weights = {"params": unstacked(variables["towers"]["text"])}
    table = weights["params"]["Embed_0"]["embedding"]
    tokenizer, layout = method.clip.tokenizer, method.layout
    rows, ends = [], []
    for k in range(len(CLASSES)):
        (ids,), (valid,) = tokenizer([CLASSES.display(k)])
        name, end = table[ids[1 : valid.sum() - 1]], table[tokenizer.end][None]
        own = context[k if layout.specific else 0]
        m = {"end": 4, "middle": 2, "front": 0}[layout.position]
        x = jnp.concatenate([table[tokenizer.start[0]][None], own[:m], name, own[m:], end])
        ends.append(len(x))
        rows.append(jnp.pad(x, ((0, 16 - len(x)), (0, 0))))
    valid = np.arange(16) < np.array(ends)[:, None]
    f = method.clip.text.apply(weights, None, jnp.asarray(valid), jnp.stack(rows)).pooled
    return f / jnp.linalg.norm(f, axis=-1, keepdims=True)


def exact_loss(method, variables, batch, context):
    """Eq. 2 over all classes."""
    f = full_features(method, variables, context)
    logits = 9.0 * method.embed_image(variables, batch["image"]) @ f.T
    nll = -jax.nn.log_softmax(logits)[jnp.arange(B), batch["label"]]
    return nll[batch["example_mask"]].mean()


def value_and_grad(method, variables, batch, rng=None):
    rng = jax.random.key(7) if rng is None else rng

    def loss(params):
        return method.loss({**variables, "params": params}, batch, rng)[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(variables["params"])
    return value, grads["prompt"]["context"]


def close(a, b, rtol):
    np.testing.assert_allclose(a, b, atol=rtol * np.abs(b).max())


@pytest.mark.parametrize("specific", [False, True])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_all_classes_exactly(position, specific):
    method = build(
        config(**{"loss.sample": 0, "prompt.position": position, "prompt.specific": specific}), WORDS, CLASSES
    )
    variables, batch = variables_of(method), random_batch()
    value, grad = value_and_grad(method, variables, batch)
    context = variables["params"]["prompt"]["context"]
    expected, expected_grad = jax.jit(jax.value_and_grad(lambda c: exact_loss(method, variables, batch, c)))(
        context
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    close(grad, expected_grad, 2e-5)
    names = [CLASSES.display(k) for k in range(len(CLASSES))]
    close(only(method.embed_text(variables, names)), full_features(method, variables, context), 1e-5)


@pytest.mark.parametrize("changes", [{}, {"loss.proposal": "similarity"}, {"loss.sample": 40}])
def test_a_sample_of_the_classes(changes):
    method = build(config(**changes), WORDS, CLASSES)
    variables, batch = variables_of(method), random_batch()
    if "hard" in variables["towers"]:
        hard = np.random.default_rng(2).normal(size=(len(CLASSES), D)).astype(np.float32)
        variables["towers"]["hard"] = jnp.asarray(hard / np.linalg.norm(hard, axis=1, keepdims=True))
    value, grad = value_and_grad(method, variables, batch)
    context = variables["params"]["prompt"]["context"]

    from ovseg_jax.kernels.sampled_softmax import sampled_softmax

    image = method.embed_image(variables, batch["image"])
    valid = jnp.asarray(batch["example_mask"])
    log_weights = method._proposal(variables, image, valid)[0]

    def reference(context):
        # The kernel has a reference of its own; here only the encoder is another: it looks up full texts' features.
        f = full_features(method, variables, context)[method.table[1]]
        out = sampled_softmax(
            lambda f, ids: f[ids],
            f,
            jnp.arange(len(CLASSES)),
            image,
            jnp.asarray(method.place)[batch["label"]],
            valid,
            jax.random.key(7),
            9.0,
            sample=method.sample,
            log_weights=log_weights,
        )
        return out.loss / out.pairs

    expected, expected_grad = jax.jit(jax.value_and_grad(reference))(context)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    close(grad, expected_grad, 2e-5)


@pytest.mark.parametrize("changes", [{}, {"loss.sample": 0}, {"prompt.specific": True}])
def test_eight_devices_agree_with_one(changes):
    method = build(config(**changes), WORDS, CLASSES)
    variables, batch = variables_of(method), random_batch()
    value, grad = value_and_grad(method, variables, batch)
    mesh = make_mesh({"data": 4, "fsdp": 2})
    with jax.set_mesh(mesh):
        many, many_grad = value_and_grad(method, variables, put_batch(batch, mesh))
    np.testing.assert_allclose(many, value, rtol=1e-5)
    close(many_grad, grad, 2e-5)


def features_and_grad(method, variables, size):
    """A compiled step, and its arguments: the gradient of a loss of all classes' features, and these."""

    def loss(context, weights, tokens):
        start, layout = method.clip.tokenizer.start[0], method.layout
        out = encode_names(method.clip.text, weights, start, context, layout, tokens, size, may_exceed=True)
        return jnp.square(out).sum(), out

    # Tokens are arguments, or XLA would know whether they exceed the size.
    arguments = variables["params"]["prompt"]["context"], variables["towers"]["text"], method.table[0]
    return jax.jit(jax.grad(loss, has_aux=True)).lower(*arguments).compile(), arguments


@pytest.mark.parametrize("specific", [False, True])
def test_more_tokens_than_expected(specific):
    """A draw of long names that the stream has no room for is computed in parts; the results are the same."""
    method = build(config(**{"prompt.specific": specific}), WORDS, CLASSES)
    variables = variables_of(method)
    step, arguments = features_and_grad(method, variables, 10_000)
    grad, features = step(*arguments)
    assert np.abs(grad).max() > 1e-2
    total = int(method.table[0].length.sum())
    for size in (32, total):
        step, arguments = features_and_grad(method, variables, size)
        again, found = step(*arguments)
        close(found, features, 1e-5)
        close(again, grad, 1e-5)


def test_more_tokens_than_expected_on_some_devices(monkeypatch):
    """Each device looks at its own classes, and must not wait for the others where only it takes the longer way."""
    method = build(config(), WORDS, CLASSES)
    variables, batch = variables_of(method), random_batch()
    value, grad = value_and_grad(method, variables, batch)
    taken: list[int] = []
    monkeypatch.setattr(prompt_tuning, "likely_size", lambda *_: 18)
    way = prompt._in_parts

    def noted(once, size, inputs, tokens):
        jax.debug.callback(taken.append, tokens.length.sum())
        return way(once, size, inputs, tokens)

    monkeypatch.setattr(prompt, "_in_parts", noted)
    mesh = make_mesh({"data": 4, "fsdp": 2})
    with jax.set_mesh(mesh):
        many, many_grad = value_and_grad(method, variables, put_batch(batch, mesh))
    jax.effects_barrier()
    assert 0 < len(taken) < 16  # of 8 forward and 8 backward
    np.testing.assert_allclose(many, value, rtol=1e-5)
    close(many_grad, grad, 2e-5)


def test_room_for_a_seldom_draw_takes_no_copy_of_the_weights():
    method = build(config(), WORDS, CLASSES)
    variables = variables_of(method)
    table = variables["towers"]["text"]["Embed_0"]
    table["embedding"] = jnp.resize(table["embedding"], (100_000, 16))
    step, _ = features_and_grad(method, variables, 64)
    assert step.memory_analysis().temp_size_in_bytes < table["embedding"].nbytes / 2


def test_features_in_place_of_images():
    method = build(config(), WORDS, CLASSES)
    variables, batch = variables_of(method), random_batch()
    value, grad = value_and_grad(method, variables, batch)
    image = batch.pop("image")
    batch["feature"] = method.embed_image(variables, image)
    again, again_grad = value_and_grad(method, variables, batch)
    np.testing.assert_allclose(again, value, rtol=1e-5)
    close(again_grad, grad, 1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt.position": "left"}, "left"),
        ({"prompt.length": 0}, "is less than 1"),
        ({"loss.sample": 41}, "between 2 and 40"),
        ({"loss.proposal": "random"}, "uniform, frequency, similarity"),
        ({"towers.image.embed_dim": 8}, "8"),
        ({"towers.text.name": "bert_base"}, "bert_base"),
    ],
)
def test_what_cannot_be(changes, said):
    with pytest.raises(UserError, match=said):
        build(config(**changes), WORDS, CLASSES)


def test_names_that_cannot_be():
    method = build(config(), WORDS, CLASSES)
    variables = variables_of(method)
    with pytest.raises(UserError, match="zebra"):
        method.embed_text(variables, ["a zebra"])
    with pytest.raises(UserError, match="empty"):
        method.embed_text(variables, ["red ball", " "])
    with pytest.raises(UserError, match="no class names"):
        method.embed_text(variables, [])


@pytest.mark.parametrize("given", ["", "tokenizer", "init", "in a bucket"])
def test_a_run_keeps_the_tokeniser_that_is_elsewhere(given, tmp_path, request):
    away, run = epath.Path(tmp_path / "away"), epath.Path(tmp_path / "run")
    away.mkdir(), run.mkdir()
    if given == "in a bucket":
        given, run = "tokenizer", request.getfixturevalue("bucket")
    key = f"towers.{given or 'tokenizer'}"
    pieces(away) if given else WORDS.save(away / "words.json")  # those of another run
    own = config(**{key: str(away)} | ({"towers.tokenizer": ""} if given == "init" else {}))
    method = build(own, WordList([]), CLASSES)
    ids, _ = method.tokenizer(["a red ball", "very big kite"])
    write_config(run, own)
    assert read_run(run).towers.to_dict() == own.towers.to_dict()
    method.save_assets(run)
    assert [path.name for path in run.iterdir() if "tokenizer" in path.name] == ["tokenizer"]
    shutil.rmtree(away)
    for _ in range(2):
        again = build(read_run(run), WordList([]), CLASSES)
        np.testing.assert_array_equal(again.tokenizer(["a red ball", "very big kite"])[0], ids)
        again.save_assets(run)  # as at the start of a run that goes on
