"""Prompts as files: ours, the original's as its trainer saves them, and what a run does with them."""

import dataclasses
from collections import OrderedDict

import jax
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.methods import build
from ovseg_jax.pretrained.files import write_safetensors
from ovseg_jax.protocols import only
from ovseg_jax.towers.features import class_features
from ovseg_jax.towers.prompt_file import Prompt, is_prompt_file, load_prompt, save_original, save_prompt
from ovseg_jax.towers.prompt_layout import Layout
from ovseg_jax.towers.templates import read_templates
from tests.extras import require
from tests.fake_method import ColourClassifier
from tests.methods.test_prompt_tuning import CLASSES, WORDS, close, config, variables_of

NAMES = ["red ball", "small kite"]


def random_prompt(rows=1, length=4, width=16, **layout):
    context = np.random.default_rng(rows).normal(size=(rows, length, width)).astype(np.float32)
    return Prompt(context, Layout(length, **layout))


def same(a, b):
    np.testing.assert_array_equal(a.context, b.context)
    assert (a.layout, a.names) == (b.layout, b.names)


def original(path, ctx, **more):
    """A checkpoint as Dassl writes it, with the object of a schedule in it and token vectors of class names."""
    torch = require("torch")
    parameter = torch.nn.Parameter(torch.from_numpy(ctx.copy()))
    optimizer = torch.optim.SGD([{"params": [parameter]}], lr=0.1, momentum=0.9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5.0)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = OrderedDict(ctx=torch.from_numpy(ctx.copy()), **more)
    rest = {
        "optimizer": optimizer.state_dict(),
        "scheduler": {"successor": cosine, "last_epoch": 5},
        "val_result": 24.9,
    }
    torch.save({"state_dict": state, "epoch": 5, **rest}, path)
    return path


def test_ours_and_back(tmp_path):
    shared = random_prompt(position="middle")
    specific = Prompt(
        random_prompt(2).context, Layout(4, specific=True), (("red ball", "ball"), ("Zürich",)), "clip_vitb16"
    )
    known = dataclasses.replace(shared, anchor=(0.25, -1.0, 1 / 3))
    for prompt in (shared, specific, known):
        save_prompt(tmp_path / "p.safetensors", prompt)
        again = load_prompt(tmp_path / "p.safetensors")
        same(again, prompt)
        assert (
            again.anchor == prompt.anchor
            and again.tower == prompt.tower
            and again.source == str(tmp_path / "p.safetensors")
        )


def test_the_original_s_and_back(tmp_path):
    torch = require("torch")
    context = random_prompt(3).context.astype(np.float16)
    suffix = {"train_token_suffix": torch.zeros(7, 3, 16), "token_prefix": torch.zeros(7, 1, 16)}
    folder = tmp_path / "nctx4_cscTrue_ctpmiddle"
    folder.mkdir()
    found = load_prompt(original(folder / "model.pth.tar-20", context, **suffix))
    same(found, Prompt(context.astype(np.float32), Layout(4, "middle", specific=True)))
    shared = load_prompt(original(tmp_path / "model-best.pth.tar", context[0]))
    same(shared, Prompt(context[:1].astype(np.float32), Layout(4)))
    for prompt, path in ((found, folder / "out.pth.tar-3"), (shared, tmp_path / "out.pth.tar-3")):
        save_original(path, prompt)
        read = torch.load(path, weights_only=True)
        expected = context if prompt.layout.specific else context[0]
        assert isinstance(read["epoch"], int) and list(read["state_dict"]) == ["ctx"]
        np.testing.assert_array_equal(read["state_dict"]["ctx"].numpy(), expected)
        same(load_prompt(path), prompt)
    for prompt, path in ((found, tmp_path / "out.pth.tar"), (shared, folder / "out.pth.tar")):
        with pytest.raises(UserError, match=f"this one has {prompt.layout.position}"):
            save_original(path, prompt)
    with pytest.raises(FileNotFoundError):
        save_original(tmp_path / "missing" / "out.pth.tar", shared)


def test_which_texts_are_prompt_files():
    assert all(map(is_prompt_file, ("a/prompt.safetensors", "model.pth.tar-20", "x/model-best.pth.tar")))
    assert not any(map(is_prompt_file, ("a photo of a", "list.json", "model.pth", ["a.safetensors"], None)))


def test_what_is_no_prompt(tmp_path):
    torch = require("torch")
    context = random_prompt().context[0]
    ours = {"format": "ovseg_jax.prompt", "position": "end"}

    def wrong(name, message, arrays=None, **metadata):
        if arrays is not None:
            write_safetensors(tmp_path / name, arrays, ours | metadata)
        with pytest.raises(UserError, match=message) as caught:
            load_prompt(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)

    wrong("none.safetensors", "there is no prompt")
    wrong("other.safetensors", "holds ctx instead of a single 'context'", {"ctx": context})
    wrong("format.safetensors", "is not a prompt", {"context": context}, format="pt")
    wrong("flat.safetensors", r"'context' must be floats of shape \[M d\].*\[16\]", {"context": context[0]})
    wrong("empty.safetensors", r"\[0, 16\]", {"context": context[:0]})
    wrong("nan.safetensors", "finite", {"context": context * np.nan})
    wrong("left.safetensors", "'position' is 'left'", {"context": context}, position="left")
    wrong("names.safetensors", "'names' has 1 classes", {"context": context}, names='[["a"]]')
    wrong("text.safetensors", "'names': expected a list, got 'a'", {"context": context}, names='["a"]')
    wrong(
        "numbers.safetensors",
        "'names': expected a text or a list of texts, got 1",
        {"context": context},
        names="[[1]]",
    )
    wrong("json.safetensors", "not valid JSON", {"context": context}, names="{")
    wrong(
        "anchor.safetensors",
        "'anchor': expected a finite number, got 'a'",
        {"context": context},
        anchor='["a"]',
    )
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    wrong("cut.safetensors", "cannot be read")

    (tmp_path / "text.pth.tar").write_text("hello")
    wrong("text.pth.tar", "cannot be read: it is not a checkpoint")
    (tmp_path / "empty.pth.tar").write_bytes(b"")
    wrong("empty.pth.tar", "cannot be read")
    torch.save({"model": {}}, tmp_path / "keys.pth.tar-1")
    wrong("keys.pth.tar-1", "it has no 'state_dict'")
    torch.save({"state_dict": {"token_prefix": torch.zeros(2)}}, tmp_path / "ctx.pth.tar-1")
    wrong("ctx.pth.tar-1", "it has no 'ctx'")
    torch.save({"state_dict": {"ctx": "words"}}, tmp_path / "words.pth.tar-1")
    wrong("words.pth.tar-1", "cannot be read")
    original(tmp_path / "cocoop.pth.tar-1", context, **{"meta_net.linear1.weight": torch.zeros(2)})
    wrong("cocoop.pth.tar-1", r"more than a prompt.*meta_net.linear1.weight")


def test_a_run_starts_from_a_prompt(tmp_path):
    path = str(tmp_path / "prompt.safetensors")

    def start(prompt, **changes):
        save_prompt(path, prompt)
        method = build(config(**{"prompt.init": path, **changes}), WORDS, CLASSES)
        return method, method.pretrained()["params"]["prompt"]["context"]

    prompt = random_prompt()
    method, context = start(prompt)
    np.testing.assert_array_equal(context, prompt.context)
    assert context.shape == method.init(jax.random.key(0))["params"]["prompt"]["context"].shape
    for context in start(prompt, **{"prompt.specific": True})[1]:
        np.testing.assert_array_equal(context, prompt.context[0])
    # Classes are found by their names, in whatever order the file has them.
    names = tuple(reversed(method.all_names))
    each = Prompt(random_prompt(len(names)).context, Layout(4, specific=True), names)
    np.testing.assert_array_equal(start(each, **{"prompt.specific": True})[1], each.context[::-1])

    for wrong, changes, message in (
        (random_prompt(width=12), {}, "12 numbers; those of the text tower have 16"),
        (random_prompt(length=5), {}, "set prompt.length=5 and prompt.position=end"),
        (random_prompt(position="front"), {}, "prompt.position=front"),
        (each, {}, "set prompt.specific=True"),
        (
            Prompt(each.context, each.layout, (("a",), *names[1:])),
            {"prompt.specific": True},
            "but none is called",
        ),
        (Prompt(each.context, each.layout), {"prompt.specific": True}, "but not their names"),
    ):
        with pytest.raises(UserError, match=message):
            start(wrong, **changes)


@pytest.mark.parametrize("specific", [False, True])
def test_a_run_leaves_its_prompt(tmp_path, specific):
    method = build(config(**{"prompt.specific": specific, "prompt.position": "middle"}), WORDS, CLASSES)
    variables = variables_of(method)
    (write,) = (method.artifacts(variables)[name] for name in ["prompt.safetensors"])
    write(tmp_path / "prompt.safetensors")
    found = load_prompt(tmp_path / "prompt.safetensors")
    np.testing.assert_array_equal(found.context, variables["params"]["prompt"]["context"])
    assert found.layout == method.layout and found.tower == "clip"
    assert found.names == (method.all_names if specific else ())


def test_an_evaluation_under_the_prompt_of_another_run(tmp_path):
    """The features are those of a run that has learned this prompt, also under a method that learns none."""
    path = str(tmp_path / "prompt.safetensors")
    other = build(config(**{"prompt.position": "middle"}), WORDS, CLASSES)
    learned = variables_of(other)
    other.artifacts(learned)["prompt.safetensors"](path)
    expected = only(other.embed_text(learned, NAMES))

    mine = build(config(**{"prompt.length": 2, "loss.sample": 0}), WORDS, CLASSES)
    variables = {**mine.init(jax.random.key(3)), "towers": learned["towers"]}
    close(only(class_features(mine, variables, NAMES, read_templates(path))), expected, 1e-6)

    from ovseg_jax.towers.packed_text import unstacked

    clip = build(config(method="clip"), WORDS, CLASSES)
    towers = learned["towers"]
    params = {"image": towers["image"]["params"], "text": unstacked(towers["text"]), "scale": towers["scale"]}
    close(only(class_features(clip, {"params": params}, NAMES, read_templates(path))), expected, 1e-6)

    # Towers of one width are told apart, in whatever precision they are.
    half = jax.tree.map(lambda x: x.astype(jax.numpy.bfloat16), towers)
    class_features(mine, {**variables, "towers": half}, NAMES, read_templates(path))
    with pytest.raises(UserError, match=r"learned for another text tower \('clip'\) of the same width"):
        class_features(
            mine,
            variables_of(mine) | {"towers": mine.init(jax.random.key(9))["towers"]},
            NAMES,
            read_templates(path),
        )

    with pytest.raises(UserError, match="ColourClassifier cannot use the prompt"):
        class_features(ColourClassifier(), {}, NAMES, read_templates(path))
    save_prompt(path, random_prompt(width=12))
    with pytest.raises(UserError, match=r"prompt.safetensors has vectors of 12 numbers"):
        class_features(mine, variables, NAMES, read_templates(path))
    specific = Prompt(random_prompt(2).context, Layout(4, specific=True), (("red ball",), ("house",)))
    assert specific.rows(["red ball", "house"]).tolist() == [0, 1]
    twins = dataclasses.replace(specific, names=(("crane", "bird"), ("crane",)))
    assert twins.rows(["crane", "bird", "crane"]).tolist() == [0, 0, 1]
    assert twins.rows(["crane", "crane"]).tolist() == [0, 1] and twins.rows(["bird"]).tolist() == [0]
    with pytest.raises(UserError, match="2 classes called 'crane'"):
        twins.rows(["crane"])
    save_prompt(path, specific)
    assert only(class_features(mine, variables, ["house"], read_templates(path))).shape == (1, 12)
    with pytest.raises(UserError, match="none is called 'small kite'"):
        class_features(mine, variables, NAMES, read_templates(path))
