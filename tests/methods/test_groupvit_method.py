"""The method GroupViT: against transformers' own segmentation, and a run of it from its config."""

import importlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from ovseg_jax.configs import groupvit as configs
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.keys import check_config
from ovseg_jax.experiment.run import train
from ovseg_jax.inference.segmenter import Segmenter
from ovseg_jax.methods import build
from ovseg_jax.predict import main as predict
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList
from tests.extras import require
from tests.models.test_groupvit import IMAGE, LENGTH, TEXT, groupvit

VOCAB = 514
NAMES = ("dog", "cat", "red bird")
CLASSES = ClassList(tuple((name,) for name in NAMES), (1, 2, 3), (True,) * 3)


def pieces(folder):
    """CLIP's tokeniser with single bytes alone."""
    alphabet = sorted(require("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    vocab = [*alphabet, *(f"{c}</w>" for c in alphabet), "<|startoftext|>", "<|endoftext|>"]
    assert len(vocab) == VOCAB
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    torch, transformers = require("torch"), require("transformers")
    model, folder = groupvit(transformers, torch, VOCAB), tmp_path_factory.mktemp("published")
    model.save_pretrained(folder)
    pieces(folder)
    return model, folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A set VOC of two images with a class of background."""
    folder = tmp_path_factory.mktemp("sets")
    for name in ("images", "masks"):
        (folder / "VOC" / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for k, size in enumerate(((40, 60), (50, 34))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"VOC/images/{k}.png")
        Image.fromarray(rng.integers(0, 4, size, np.uint8)).save(folder / f"VOC/masks/{k}.png")
    lines = ["0:background", *(f"{k}:{name}" for k, name in enumerate(NAMES, 1))]
    (folder / "VOC/classes.txt").write_text("\n".join(lines) + "\n")
    return folder


def small(config, **own):
    """The config with a small GroupViT."""
    fields = {name: getattr(IMAGE, name) for name in ("patch", "width", "heads", "mlp_dim", "grid", "depths")}
    fields |= {name: getattr(IMAGE, name) for name in ("tokens", "groups", "embed_dim", "projection")}
    tower = {name: getattr(TEXT.tower, name) for name in ("length", "width", "layers", "heads")}
    config.groupvit.image, config.groupvit.text = (
        fields,
        dict(tower, mlp_dim=TEXT.tower.mlp_dim, vocab_size=VOCAB),
    )
    for key, value in own.items():
        with config.groupvit.ignore_type():
            config.groupvit[key] = value
    return config


def config_of(folder, sets, **own):
    config = configs.get_config(f"data=sets,eval_sets={sets},sets=VOC,sets_are=folders,weights={folder}")
    return small(config, **own)


def method_of(folder, sets, **own):
    method = build(config_of(folder, sets, **own), WordList([]), CLASSES)
    return method, jax.tree.map(jnp.asarray, {"params": {}, **method.pretrained()})


def test_masks_and_scores_are_transformers(published, sets):
    torch = require("torch")
    model, folder = published
    method, variables = method_of(folder, sets, prompt="{}")
    image = np.random.default_rng(1).integers(0, 256, (1, 32, 32, 3)).astype(np.uint8)
    mean, std = (np.array(x, np.float32) for x in (method.config.mean, method.config.std))
    pixels = torch.tensor(((image / 255 - mean) / std).transpose(0, 3, 1, 2), dtype=torch.float32)
    ids, _ = method.tokenizer(list(NAMES))
    assert ids.shape == (3, LENGTH)
    with torch.no_grad():
        want = model(input_ids=torch.tensor(ids).long(), pixel_values=pixels, output_segmentation=True)
    prediction = method.predict(variables, jnp.asarray(image), jnp.asarray([[32, 32]]))
    text = method.embed_text(variables, NAMES)
    np.testing.assert_allclose(text["groupvit"], want.text_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(prediction.image["groupvit"], want.image_embeds.numpy(), atol=1e-5)
    share = prediction.mask_logits / 20 + 0.5
    scores = jnp.einsum("bge,te->btg", prediction.regions["groupvit"], text["groupvit"])
    up = torch.nn.functional.interpolate(torch.tensor(np.asarray(share)), (32, 32), mode="bilinear")
    # transformers multiplies by the scale twice.
    got = float(prediction.scale[0]) ** 2 * np.einsum("btg,bghw->bthw", scores, up)
    want = want.segmentation_logits.numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_templates_are_averaged_before_they_are_normalised(published, sets):
    templates = ["a {}", "red {} dog", "{}"]
    raw, variables = method_of(published[1], sets, prompt=templates)
    units, _ = method_of(published[1], sets, prompt=templates, normalise=True)
    ids = [raw.tokenizer([t.replace("{}", name) for name in NAMES])[0] for t in templates]
    each = np.float64([raw.text.apply(variables["groupvit"]["text"], jnp.asarray(x)) for x in ids])
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    np.testing.assert_allclose(raw.embed_text(variables, NAMES)["groupvit"], unit(each.sum(0)), atol=1e-5)
    np.testing.assert_allclose(
        units.embed_text(variables, NAMES)["groupvit"], unit(unit(each).sum(0)), atol=1e-5
    )


@pytest.fixture(scope="module")
def run(published, sets, tmp_path_factory):
    weights = tmp_path_factory.mktemp("gone") / "weights"
    shutil.copytree(published[1], weights)
    config = config_of(weights, sets)
    rules = dict(image_size=32, windows=dict(stride=16, short=32, longest=64))
    config.final_evals.VOC.update(rules)
    config.data.image_size = 32
    check_config(config)
    folder = tmp_path_factory.mktemp("run")
    summary = train(config, folder)
    shutil.rmtree(weights)  # the run's folder has all that predictions need
    return folder, summary


def test_a_run_is_scored_and_segments(run, sets, tmp_path, monkeypatch):
    folder, summary = run
    assert summary["steps"] == 0 and 0 <= summary["VOC/miou"] <= 100 and "VOC/recall@0.5" not in summary
    module = importlib.import_module("ovseg_jax.decisions.published")
    monkeypatch.setattr(module, "SIZE", 32)
    monkeypatch.setattr(module, "WINDOWS", dict(stride=16, short=32, longest=64))
    arguments = [f"--checkpoint={folder}", f"--images={sets}/VOC/images", "--labels=dog; cat; red bird"]
    assert predict([*arguments, "--protocol=voc", f"--out={tmp_path}/a"]) == 0
    assert predict([*arguments, "--protocol=voc", "--crf", f"--out={tmp_path}/b"]) == 0
    # The same label maps as those of the evaluation, by its counts.
    hits, truth, guess = np.zeros(4), np.zeros(4), np.zeros(4)
    for k in range(2):
        got = np.asarray(Image.open(tmp_path / f"a/{k}.labels.png"))
        mask = np.asarray(Image.open(sets / f"VOC/masks/{k}.png"))
        assert got.shape == mask.shape
        for c in range(4):
            hits[c] += ((got == c) & (mask == c)).sum()
            truth[c] += (mask == c).sum()
            guess[c] += (got == c).sum()
    iou = 100 * hits / np.maximum(truth + guess - hits, 1)
    assert summary["VOC/miou"] == pytest.approx(iou[truth + guess > 0].mean(), abs=1e-3)
    assert predict([*arguments, "--protocol=nothing", f"--out={tmp_path}/c"]) != 0
    assert predict([*arguments, "--protocol=voc", "--tile=32", f"--out={tmp_path}/c"]) != 0
    with pytest.raises(UserError, match="crf works on label maps"):
        Segmenter.from_checkpoint(folder).segment(
            f"{sets}/VOC/images/0.png", "dog", decision="panoptic", crf=True
        )


def test_wrong_configs_are_sentences(published, sets):
    for own, message in (
        (dict(image=dict(widths=3)), "config.groupvit: .*widths"),
        (dict(prompt="none"), "has no {} for the class name"),
    ):
        with pytest.raises(UserError, match=message):
            method_of(published[1], sets, **own)
    config = ConfigDict({**config_of(published[1], sets).to_dict(), "steps": 2})
    with pytest.raises(UserError, match="steps=2: the method groupvit is not trained"):
        build(config, WordList([]), CLASSES)
    for arg, message in (
        ("data=sets,eval_sets=s,sets=VOC;ADE", "sets=ADE is not one of VOC, Context"),
        ("data=sets,eval_sets=s,sets=;", "sets is empty"),
    ):
        with pytest.raises(UserError, match=message):
            configs.get_config(arg)
    without = configs.get_config("data=sets,eval_sets=s,background=False").final_evals
    assert without.VOC.protocol == "voc_foreground" and without.VOC.ignore == "background"
    assert without.Context.protocol == "context_foreground" and "ignore" not in without.Context
