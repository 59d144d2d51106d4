"""A frozen text tower in OpenSeg, from a folder as it is published, against transformers and open_clip's tokeniser."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.models import text_towers
from ovseg_jax.pretrained.files import read_arrays
from ovseg_jax.train.sharding import make_mesh
from tests.extras import require
from tests.methods.test_openseg import CLASSES, WORDS, batch, make

WIDTH, EMBED = 32, 24


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A small CLIP text tower with CLIP's real vocabulary; `tiny_clip` names its shape."""
    torch, transformers = require("torch"), require("transformers")
    open_clip = require("open_clip")
    fields = dict(width=WIDTH, layers=2, heads=2, embed_dim=EMBED)
    monkeypatch.setitem(text_towers.PRESETS, "tiny_clip", (text_towers.CLIPText, fields))
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=EMBED,
    )
    model = transformers.CLIPTextModelWithProjection(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    model.save_pretrained(tmp_path)
    shutil.copy(Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz", tmp_path)

    def reference(texts):
        with torch.no_grad():
            out = model(input_ids=open_clip.SimpleTokenizer()(list(texts))).text_embeds
        return (out / out.norm(dim=-1, keepdim=True)).numpy()

    return tmp_path, reference


def frozen(path, **changes):
    return make(text=dict(tower="tiny_clip", init=str(path)), frozen=("^text/",), embed_dim=EMBED, **changes)


def test_texts_and_the_table_of_words(folder):
    path, reference = folder
    method = frozen(path)
    variables = method.init(jax.random.key(0))
    texts = ["red ball", "a photo of two Polar Bears!", "grass"]
    np.testing.assert_allclose(method.embed_text(variables, texts), reference(texts), atol=2e-6)
    table = method.pretrained()["params"]["text"]["table"]
    assert table.shape == variables["params"]["text"]["table"].shape
    np.testing.assert_allclose(table[1:], reference(WORDS.words[1:]), atol=2e-6)
    assert not table[0].any()


def test_more_texts_than_go_through_at_once(folder):
    path, reference = folder
    texts = [f"thing number {i}" for i in range(130)]
    np.testing.assert_allclose(
        frozen(path).embed_text({"params": {"text": {}}}, texts), reference(texts), atol=2e-6
    )


def test_under_a_mesh_and_within_a_trace(folder):
    path, reference = folder
    method = frozen(path)
    with jax.set_mesh(make_mesh()):
        traced = jax.jit(lambda x: method.embed_text({"params": {"text": {}}}, ["red ball"]) * x)
        np.testing.assert_allclose(traced(jnp.float32(2)), 2 * reference(["red ball"]), atol=4e-6)
        assert traced.lower(jnp.float32(2)).as_text().count("dot_general") == 0  # The tower is no part of it.


@pytest.mark.parametrize("name", ["openseg", "lseg"])
def test_a_loss_with_it(folder, name):
    method = frozen(folder[0], method=name)
    variables = method.init(jax.random.key(0))
    variables["params"]["text"] = method.pretrained()["params"]["text"]
    loss, _ = jax.jit(method.loss)(variables, batch(), jax.random.key(1))
    assert np.isfinite(loss)


def test_what_is_wrong_is_said(folder):
    path, _ = folder
    with pytest.raises(UserError, match=r"gives 24 numbers: set model.embed_dim=24"):
        make(text=dict(tower="tiny_clip", init=str(path)), frozen=("^text/",), embed_dim=10)
    with pytest.raises(UserError, match=r"text.tower=tiny_clip needs text.init"):
        make(text=dict(tower="tiny_clip"), frozen=("^text/",), embed_dim=EMBED)
    with pytest.raises(UserError, match=r"no text tower is called 'gpt'"):
        make(text=dict(tower="gpt", init="x"), frozen=("^text/",))
    with pytest.raises(UserError, match=r"would be trained"):
        make(text=dict(tower="tiny_clip", init=str(path)), embed_dim=EMBED)
    method = frozen(path)
    for texts in ([], ["dog", " "]):
        with pytest.raises(UserError, match=r"no labels were given|an empty label"):
            method.embed_text({"params": {"text": {}}}, texts)
    (path / "bpe_simple_vocab_16e6.txt.gz").unlink()
    with pytest.raises(UserError, match=r"holds none of"):
        frozen(path).embed_text({"params": {"text": {}}}, ["dog"])


def test_an_export_and_a_run_carry_the_tower(folder, tmp_path_factory):
    import ovseg_jax.torch
    from ovseg_jax import export
    from ovseg_jax.segmenter import Segmenter

    path, reference = folder
    method = frozen(path, mask_bias=0.2, mask_scale=30.0)
    variables = jax.tree.map(np.asarray, method.init(jax.random.key(0)))
    out = tmp_path_factory.mktemp("export")
    segmenter = Segmenter(method, variables, method.config, CLASSES)
    export.to_folder(segmenter, out, np.dtype("float32"))
    half = tmp_path_factory.mktemp("half")
    export.to_folder(segmenter, half, np.dtype("float16"))
    assert {x.dtype for x in read_arrays(half / "text_tower").values()} == {np.dtype("float16")}
    shutil.rmtree(path)

    loaded = ovseg_jax.torch.load(out)
    labels = "polar bear,bear; grass; a photo of a Wedding Cake"
    np.testing.assert_allclose(loaded.embed(["polar bear"]).numpy(), reference(["polar bear"]), atol=2e-6)
    image = np.random.default_rng(0).integers(0, 256, (40, 32, 3), np.uint8)
    ours, theirs = segmenter.segment(image, labels), loaded.segment(image, labels)
    assert len(np.unique(ours.label_map)) > 1 and (ours.label_map == theirs.label_map).mean() > 0.999

    again = frozen(out / "text_tower")
    np.testing.assert_array_equal(again.text.encode({}, ["zebra"]), method.text.encode({}, ["zebra"]))


def test_a_clip_is_exported_for_transformers_and_for_big_vision(folder, tmp_path_factory):
    transformers = require("transformers")
    from ovseg_jax import export
    from ovseg_jax.pretrained.load import load
    from ovseg_jax.segmenter import Segmenter

    path, _ = folder
    tower = dict(width=32, depth=1, heads=2, mlp_dim=48, grid=(2, 2), embed_dim=EMBED, head_bias=False)
    method = frozen(path, backbone=dict(name="vit", pre_norm=True, gelu="quick", epsilon=1e-5, **tower))
    variables = jax.tree.map(np.asarray, method.init(jax.random.key(0)))
    segmenter = Segmenter(method, variables, method.config, CLASSES)
    out = tmp_path_factory.mktemp("export")
    export.to_folder(segmenter, out, np.dtype("float32"))
    transformers.CLIPModel.from_pretrained(out / "clip")
    export.to_big_vision(segmenter, out, np.dtype("float32"))
    own = variables["params"]["image"]["backbone"]
    for source in (out / "clip", f"big_vision:{out / 'towers.npz'}"):
        found = load(str(source), method.net.backbone, {"params": own})
        jax.tree.map(np.testing.assert_array_equal, found["params"]["tower"], own["tower"])
    whole = np.load(out / "model.npz")
    np.testing.assert_array_equal(whole["params/text/table"], variables["params"]["text"]["table"])
