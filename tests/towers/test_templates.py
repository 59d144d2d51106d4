import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.protocols import Classifier
from ovseg_jax.towers import features
from ovseg_jax.towers.templates import fill, read_templates
from ovseg_jax.vocab.templates import CLIP_SIMPLE, HARD, IMAGENET, TEMPLATES, VILD

CLIP = Path(__file__).parents[2] / "../shared/data/clip/clip_imagenet_templates.json"


@pytest.mark.skipif(not CLIP.exists(), reason="no copy of CLIP's templates beside the repository")
def test_the_lists_are_clips():
    lists = json.loads(CLIP.read_text())["data"]
    assert [t.replace("{}", "{c}") for t in IMAGENET] == lists["openai_80"]
    assert [t.replace("{}", "{c}") for t in CLIP_SIMPLE] == lists["simple_7"]


def test_every_template_has_one_place():
    templates = [*IMAGENET, *CLIP_SIMPLE, *VILD, *HARD.values()]
    assert all(template.count("{}") == 1 for template in templates)
    assert len(set(IMAGENET)) == 80 and len(set(VILD)) == 14 and set(CLIP_SIMPLE) < set(IMAGENET)


def test_a_prompt_is_a_template_a_list_a_name_or_a_file(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('["my {}.", "your {}."]')
    assert read_templates("a {}.") == ("a {}.",)
    assert read_templates(["a {}.", "the {}."]) == ("a {}.", "the {}.")
    assert read_templates("vild") is TEMPLATES["vild"]
    assert read_templates(str(file)) == ("my {}.", "your {}.")
    assert fill("a photo of a {}.", "red_fox") == "a photo of a red fox."


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a photo", r"'a photo' has no \{\}"),
        (["a {}.", 3], "3 has no"),
        ([], "not a list"),
        (None, "not a list"),
        ("gone.json", "gone.json cannot be read"),
    ],
)
def test_a_wrong_prompt_is_said(prompt, message):
    with pytest.raises(UserError, match=message):
        read_templates(prompt)


@pytest.mark.parametrize("chunk", [2, 5, 8, 100])
def test_names_are_averaged_over_templates_of_one_call_or_of_several(monkeypatch, chunk):
    templates, names = ("a {}", "the {}", "no {}", "{}", "one {}"), ["cat", "dog", "owl"]
    rng, asked = np.random.default_rng(0), []
    table = {fill(t, n): rng.normal(size=4) for t in templates for n in names}

    class Method(features.TowerText):
        def __init__(self):
            pass

        def embed_phrases(self, variables, texts):
            asked.append(len(texts))
            return {"s": jnp.stack([jnp.asarray(table[text], jnp.float32) for text in texts])}

    monkeypatch.setattr(features, "TEXT_CHUNK", chunk)
    found = features.class_features(Method(), {}, names, templates)["s"]
    want = np.stack([sum(table[fill(t, n)] for t in templates) for n in names])
    np.testing.assert_allclose(found, want / np.linalg.norm(want, axis=1, keepdims=True), rtol=1e-5)
    assert set(asked) == {{2: 2, 5: 3, 8: 6, 100: 15}[chunk]}


@pytest.mark.parametrize("count", [1, 3, 13, 20])
def test_each_name_is_embedded_once_in_each_template(count, monkeypatch):
    """The mean of unit vectors, in float64; calls are padded to equal sizes by less than a call."""
    monkeypatch.setattr(features, "TEXT_CHUNK", 256)
    templates, names = [f"{i} {{}}" for i in range(80)], [f"name {k}" for k in range(count)]
    vector = lambda text: np.random.default_rng([*text.encode()]).normal(size=3).astype(np.float32)
    asked = []

    class Texts(Classifier):
        def embed_phrases(self, variables, texts):
            asked.extend(texts)
            return {"a": jnp.stack([vector(text) for text in texts])}

    found = features.class_features(Texts(), {}, names, templates)["a"]
    want = np.stack([sum(vector(t.format(n)).astype(np.float64) for t in templates) for n in names])
    np.testing.assert_allclose(found, want / np.linalg.norm(want, axis=1, keepdims=True), atol=1e-6)
    assert set(asked) == {t.format(n) for t in templates for n in names}
    assert len(asked) < 1.1 * len(set(asked))
