"""The command, on a run of random towers and on a published text tower."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ovseg_jax import prompts
from ovseg_jax.experiment.run import CLASSES_FILE, WORDS_FILE
from ovseg_jax.methods import build
from ovseg_jax.protocols import only
from ovseg_jax.towers.prompt_file import Prompt, load_prompt, save_prompt
from ovseg_jax.towers.prompt_layout import Layout
from ovseg_jax.towers.text_table import TextTable
from ovseg_jax.train.checkpoints import Checkpoints, write_config
from ovseg_jax.train.state import TrainState
from ovseg_jax.vocab.words import WordList
from tests.extras import require
from tests.methods.test_prompt_tuning import CLASSES, WORDS, config, variables_of
from tests.towers.test_frozen_text import folder, in_words  # noqa: F401

CATEGORIES = [
    {"id": 7, "name": "red_ball", "synonyms": ["red_ball", "kite"]},
    {"id": 2, "name": "house"},
    {"id": 5, "name": "old_moon", "synonyms": ["moon"]},
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of two methods, as training leaves them, and the variables of the first."""
    root = tmp_path_factory.mktemp("runs")
    for name in ("pomp", "clip"):
        workdir = root / name
        workdir.mkdir()
        method = build(config(method=name), WORDS, CLASSES)
        variables = variables_of(method) if name == "pomp" else method.init(jax.random.key(0))
        write_config(workdir, config(method=name))
        WORDS.save(workdir / WORDS_FILE)
        (workdir / CLASSES_FILE).write_text(CLASSES.to_json())
        rest = {key: tree for key, tree in variables.items() if key != "params"}
        checkpoints = Checkpoints(workdir, every=0, keep=1)
        checkpoints.save(3, TrainState(jnp.int32(3), variables["params"], rest, {"none": jnp.zeros(1)}, None))
        checkpoints.close()
    method = build(config(), WORDS, CLASSES)
    return root, method, variables_of(method)


@pytest.fixture
def run(runs, tmp_path, capsys):
    (tmp_path / "classes.json").write_text(json.dumps({"categories": CATEGORIES}))

    def call(*more, **flags):
        known = {
            "checkpoint": runs[0] / "pomp",
            "classes": tmp_path / "classes.json",
            "out": tmp_path / "out.npy",
        }
        flags = {name: value for name, value in (known | flags).items() if value is not None}
        code = prompts.main([*(f"--{name}={value}" for name, value in flags.items()), *more])
        return code, capsys.readouterr()

    return call


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_vectors_as_detic_reads_them(run, runs, tmp_path):
    _, method, variables = runs
    assert run()[0] == 0
    found = np.load(tmp_path / "out.npy")
    assert found.dtype == np.float32 and found.shape == (3, 12)
    expected = np.asarray(only(method.embed_text(variables, ["house", "old moon", "red ball"])))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)

    assert run(synonyms="average")[0] == 0
    averaged = np.load(tmp_path / "out.npy")
    np.testing.assert_allclose(averaged[0], expected[0], atol=1e-6)
    one, two = np.asarray(only(method.embed_text(variables, ["red ball", "kite"])))
    np.testing.assert_allclose(averaged[2], unit(one + two), atol=1e-6)


def test_hand_written_prompts(run, runs, tmp_path):
    _, method, variables = runs
    assert run(template="a photo of {}")[0] == 0
    expected = np.asarray(
        only(method.embed_phrases(variables, [f"a photo of {n}" for n in ("house", "old moon", "red ball")]))
    )
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-6)
    # The small tower has not all words of CLIP's templates.
    code, out = run("--ensemble")
    assert code == 1 and "'bad', which is not one of the 17 words" in out.err


def test_vectors_that_a_table_of_words_reads(run, tmp_path):
    assert run(out=tmp_path / "words.npz")[0] == 0
    words = WordList(["house", "old moon", "red ball"])
    table = TextTable(ConfigDict(dict(vectors=str(tmp_path / "words.npz"), learned=False)), words, 12)
    found = table.init(jax.random.key(0))["table"]
    assert run()[0] == 0
    np.testing.assert_array_equal(found[1:], np.load(tmp_path / "out.npy"))


def test_the_prompt_itself(run, runs, tmp_path):
    require("torch")
    _, _, variables = runs
    context = variables["params"]["prompt"]["context"]
    assert run(out=tmp_path / "p.pth.tar-3", classes=None)[0] == 0
    np.testing.assert_allclose(load_prompt(tmp_path / "p.pth.tar-3").context, context, atol=1e-3)
    assert run(out=tmp_path / "p.safetensors", classes=None)[0] == 0
    np.testing.assert_array_equal(load_prompt(tmp_path / "p.safetensors").context, context)
    # Of a file, and under it: the towers are those of the run.
    assert (
        run(out=tmp_path / "q.safetensors", prompt=tmp_path / "p.pth.tar-3", checkpoint=None, classes=None)[0]
        == 0
    )
    np.testing.assert_array_equal(
        load_prompt(tmp_path / "q.safetensors").context, load_prompt(tmp_path / "p.pth.tar-3").context
    )
    assert run()[0] == 0
    own = np.load(tmp_path / "out.npy")
    assert run(prompt=tmp_path / "p.safetensors", out=tmp_path / "again.npy")[0] == 0
    np.testing.assert_allclose(np.load(tmp_path / "again.npy"), own, atol=1e-6)
    code, out = run(out=tmp_path / "p.safetensors", checkpoint=runs[0] / "clip", classes=None)
    assert code == 1 and "method=clip learns no prompt that can be saved" in out.err


def test_a_published_text_tower(run, folder, tmp_path):  # noqa: F811
    """Against transformers: a prompt of words is these words."""
    path, reference = folder
    prompt, written = in_words(path, "middle")
    save_prompt(tmp_path / "p.safetensors", prompt)
    published = dict(checkpoint=None, towers=path, text_tower="tiny_clip")
    assert run(prompt=tmp_path / "p.safetensors", **published)[0] == 0
    names = ["house", "old moon", "red ball"]
    expected = reference([written.format(name) for name in names])
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=5e-6)
    templates = ["a photo of a {}.", "the {} in a video game."]
    (tmp_path / "two.json").write_text(json.dumps(templates))
    assert run(template=tmp_path / "two.json", **published)[0] == 0
    each = np.stack([reference([template.replace("{}", name) for name in names]) for template in templates])
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), unit(each.mean(0)), atol=5e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"out": "out.txt"}, "--out=out.txt must end in .npy"),
        ({"out": "nowhere/out.npy"}, "nowhere/out.npy cannot be written"),
        ({"classes": None}, "--classes=FILE is missing"),
        ({"classes": "empty.txt"}, "empty.txt lists no class"),
        ({"classes": "strange.txt"}, "holds 'zebra'"),
        ({"checkpoint": None}, "give either --checkpoint=WORKDIR, or --towers"),
        ({"checkpoint": None, "towers": "x"}, "with --text_tower"),
        ({"checkpoint": None, "towers": "x", "text_tower": "clip_vitb16"}, "needs a prompt"),
        (
            {"checkpoint": None, "towers": "x", "text_tower": "bert_base", "template": "{}"},
            "not a text tower of CLIP's kind",
        ),
        ({"checkpoint": None, "towers": "x", "text_tower": "gpt", "template": "{}"}, "'gpt'"),
        ({"checkpoint": "nowhere"}, "nowhere holds no run"),
        ({"prompt": "narrow.safetensors"}, "vectors of 8 numbers"),
        ({"prompt": "none.safetensors"}, "no prompt file none.safetensors"),
        ({"template": "a photo"}, "no {} for the class name"),
        ({"out": "p.pth.tar", "checkpoint": None}, "is a prompt file: give --checkpoint"),
        ({"out": "p.pth.tar", "template": "a {}"}, "is a prompt file: give --checkpoint"),
    ],
)
def test_a_wrong_request_is_one_sentence(run, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "strange.txt").write_text("zebra\n")
    save_prompt(tmp_path / "narrow.safetensors", Prompt(np.ones((1, 4, 8), np.float32), Layout(4)))
    code, out = run(**flags)
    assert code == 1 and not out.out and message in out.err and out.err.count("\n") == 1
