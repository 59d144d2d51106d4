"""A frozen text tower in OpenSeg, from a folder as it is published, against transformers and open_clip's tokeniser."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from ovseg_jax.errors import UserError
from ovseg_jax.models import text_towers
from ovseg_jax.parallel.sharding import make_mesh
from ovseg_jax.pretrained.files import read_arrays
from ovseg_jax.protocols import only
from ovseg_jax.towers.frozen_text import FrozenText
from ovseg_jax.towers.prompt_file import Prompt, save_prompt
from ovseg_jax.towers.prompt_layout import Layout
from ovseg_jax.train.checkpoints import read_run, write_config
from tests.bucket import bucket  # noqa: F401
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


def frozen(path, prompt="", **changes):
    text = dict(tower="tiny_clip", init=str(path), prompt=prompt)
    return make(text=text, embed_dim=EMBED, **changes)


def test_texts_and_the_table_of_words(folder):
    path, reference = folder
    method = frozen(path)
    variables = method.init(jax.random.key(0))
    texts = ["red ball", "a photo of two Polar Bears!", "grass"]
    np.testing.assert_allclose(only(method.embed_text(variables, texts)), reference(texts), atol=2e-6)
    table = method.pretrained()["params"]["text"]["table"]
    assert table.shape == variables["params"]["text"]["table"].shape
    np.testing.assert_allclose(table[1:], reference(WORDS.words[1:]), atol=2e-6)
    assert not table[0].any()


def test_more_texts_than_go_through_at_once(folder):
    path, reference = folder
    texts = [f"thing number {i}" for i in range(130)]
    np.testing.assert_allclose(
        only(frozen(path).embed_text({"params": {"text": {}}}, texts)), reference(texts), atol=2e-6
    )


def test_under_a_mesh_and_within_a_trace(folder):
    path, reference = folder
    method = frozen(path)
    with jax.set_mesh(make_mesh()):
        traced = jax.jit(lambda x: only(method.embed_text({"params": {"text": {}}}, ["red ball"])) * x)
        np.testing.assert_allclose(traced(jnp.float32(2)), 2 * reference(["red ball"]), atol=4e-6)
        assert traced.lower(jnp.float32(2)).as_text().count("dot_general") == 0  # The tower is no part of it.


def test_templates_are_averaged_as_unit_vectors(folder, tmp_path):
    path, reference = folder
    method, texts = frozen(path, ("a photo of a {}.", "{}, drawn")), ["red ball", "grass"]
    found = only(method.embed_text({"params": {"text": {}}}, texts))
    parts = [reference([template.format(text) for text in texts]) for template in method.text.templates]
    expected = np.float64(parts).sum(0)
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    method.text.save(tmp_path / "saved")
    import ovseg_jax.torch.segmenter as torch_segmenter

    theirs = torch_segmenter.Text(tmp_path / "saved", "cpu")(texts)
    np.testing.assert_allclose(theirs, expected, atol=2e-6)
    with pytest.raises(UserError, match=r"the template 'a photo' has no {}"):
        frozen(path, "a photo")
    for name in ("model.safetensors", "config.json"):  # of a run, where no flipped bit may load
        file = tmp_path / "saved" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1, whole[-1]]))
        with pytest.raises(UserError, match=rf"{name} does not match its checksum"):
            only(frozen(tmp_path / "saved").embed_text({"params": {"text": {}}}, ["red ball"]))
        file.write_bytes(whole)


def test_a_run_in_a_bucket_keeps_its_tower_and_prompt(folder, tmp_path, bucket):  # noqa: F811
    path, _ = folder
    context = np.random.default_rng(0).normal(0, 0.2, (1, 2, WIDTH)).astype(np.float32)
    save_prompt(tmp_path / "prompt.safetensors", Prompt(context, Layout(2, "end")))
    method = frozen(path, str(tmp_path / "prompt.safetensors"))
    expected = only(method.embed_text({"params": {"text": {}}}, ["red ball"]))
    method.save_assets(bucket)
    write_config(bucket, method.config)
    for file in tmp_path.iterdir():
        if file.is_file():
            file.unlink()
    text = read_run(bucket).text
    assert text.init == "gs://bucket/run/text_tower"
    again = make(text=text.to_dict(), embed_dim=EMBED)
    np.testing.assert_array_equal(only(again.embed_text({"params": {"text": {}}}, ["red ball"])), expected)


@pytest.mark.parametrize("name", ["openseg", "lseg"])
def test_a_loss_with_it(folder, name):
    method = frozen(folder[0], method=name)
    variables = method.init(jax.random.key(0))
    variables["params"]["text"] = method.pretrained()["params"]["text"]
    loss, _ = jax.jit(method.loss)(variables, batch(), jax.random.key(1))
    assert np.isfinite(loss)


def test_what_is_wrong_is_said(folder):
    path, _ = folder
    with pytest.raises(UserError, match=r"embeddings of 24 numbers: set model.embed_dim=24"):
        make(text=dict(tower="tiny_clip", init=str(path)), embed_dim=10)
    with pytest.raises(UserError, match=r"text.tower=tiny_clip needs text.init"):
        make(text=dict(tower="tiny_clip"), embed_dim=EMBED)
    with pytest.raises(UserError, match=r"the text tower 'gpt' is not one of"):
        make(text=dict(tower="gpt", init="x"))
    method = frozen(path)
    for texts in ([], ["dog", " "]):
        with pytest.raises(UserError, match=r"no labels were given|an empty label"):
            method.embed_text({"params": {"text": {}}}, texts)
    (path / "bpe_simple_vocab_16e6.txt.gz").unlink()
    with pytest.raises(UserError, match=r"holds none of"):
        frozen(path).embed_text({"params": {"text": {}}}, ["dog"])


def test_an_export_and_a_run_carry_the_tower(folder, tmp_path_factory):
    import ovseg_jax.torch
    from ovseg_jax.inference import export
    from ovseg_jax.inference.segmenter import Segmenter

    path, reference = folder
    method = frozen(path, mask_bias=0.2, mask_scale=8.0)
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


def in_words(path, position):
    """The prompt of the token vectors of "big red", and what a text in it then is."""
    method = frozen(path)
    table = method.text.weights()["Embed_0/embedding"]
    ids = method.text._all()[0](["big red"])[0][0, 1:3]
    return Prompt(table[ids][None], Layout(2, position)), {"end": "big red {}.", "middle": "big {} red."}[
        position
    ]


@pytest.mark.parametrize("position", ["end", "middle"])
def test_a_learned_prompt_around_every_text(folder, position):
    path, reference = folder
    prompt, written = in_words(path, position)
    save_prompt(path / "mine.safetensors", prompt)
    method = frozen(path, prompt=str(path / "mine.safetensors"))
    expected = reference([written.format(name) for name in ("polar bear", "cake")])
    np.testing.assert_allclose(method.text.encode({}, ["polar_bear", "cake"]), expected, atol=2e-6)
    table = method.pretrained()["params"]["text"]["table"]
    np.testing.assert_allclose(table[1:], reference([written.format(w) for w in WORDS.words[1:]]), atol=2e-6)


def test_an_export_and_a_run_carry_the_prompt(folder, tmp_path_factory):
    import ovseg_jax.torch
    from ovseg_jax.experiment.load import read_method
    from ovseg_jax.inference import export
    from ovseg_jax.inference.segmenter import Segmenter
    from ovseg_jax.train.checkpoints import Checkpoints, read_run, write_config
    from ovseg_jax.train.state import TrainState

    path, reference = folder
    prompt, written = in_words(path, "middle")
    save_prompt(path / "mine.safetensors", prompt)
    method = frozen(path, prompt=str(path / "mine.safetensors"))
    variables = jax.tree.map(np.asarray, method.init(jax.random.key(0)))
    out, workdir = tmp_path_factory.mktemp("export"), tmp_path_factory.mktemp("run")
    export.to_folder(Segmenter(method, variables, method.config, CLASSES), out, np.dtype("float32"))
    write_config(workdir, method.config)
    checkpoints = Checkpoints(workdir, every=0, keep=1)
    checkpoints.save(
        1, TrainState(jnp.int32(1), {"temperature": jnp.zeros(1)}, {}, {"none": jnp.zeros(1)}, None)
    )
    checkpoints.close()
    method.text.save(workdir / "text_tower")
    WORDS.save(workdir / "words.json")
    (workdir / "classes.json").write_text(CLASSES.to_json())
    shutil.rmtree(path)

    expected = reference([written.format(name) for name in ("polar bear", "cake")])
    loaded = ovseg_jax.torch.load(out)
    np.testing.assert_allclose(loaded.embed(["polar_bear", "cake"]).numpy(), expected, atol=2e-6)
    # A run that goes on needs the folder of its tower no more than one that is read.
    going_on = read_method(read_run(workdir), epath.Path(workdir))[0].text
    np.testing.assert_allclose(going_on.encode({}, ["polar_bear", "cake"]), expected, atol=2e-6)
    again = FrozenText(read_run(workdir).text, WORDS, EMBED)
    np.testing.assert_allclose(again.encode({}, ["polar_bear", "cake"]), expected, atol=2e-6)
    # A tower without a prompt that is saved over it leaves none behind.
    frozen(workdir / "text_tower").text.save(out / "text_tower")
    assert not (out / "text_tower" / "prompt.safetensors").exists()


def test_a_prompt_that_is_not_the_tower_s(folder):
    path, _ = folder
    file = path / "prompt.safetensors"

    def build(prompt, **text):
        save_prompt(file, prompt)
        make(text=dict(init=str(path), prompt=str(file)) | text, embed_dim=EMBED)

    context = np.ones((2, 3, WIDTH), np.float32)
    with pytest.raises(UserError, match=f"has vectors of 8 numbers; those of the text tower have {WIDTH}"):
        build(Prompt(context[:1, :, :8], Layout(3)), tower="tiny_clip")
    with pytest.raises(UserError, match="a context for each of its classes"):
        build(Prompt(context, Layout(3, specific=True), (("a",), ("b",))), tower="tiny_clip")
    with pytest.raises(UserError, match="bert_base cannot use a prompt"):
        make(text=dict(tower="bert_base", init="x", prompt=str(file)), embed_dim=768)
    with pytest.raises(UserError, match="needs a text tower, such as"):
        make(text=dict(prompt=str(file)))
    method = make(text=dict(tower="tiny_clip", init=str(path)), embed_dim=EMBED)
    assert method.text.prompt is None
    for anchor, known in ((method.text.weights()["pos_embedding"][0, 0, :8], True), (np.ones(8), False)):
        save_prompt(file, Prompt(context[:1], Layout(3), anchor=tuple(anchor.tolist())))
        other = frozen(path, prompt=str(file))
        if known:
            other.text.encode({}, ["zebra"])
        else:
            with pytest.raises(UserError, match="learned for another text tower of the same width"):
                other.text.encode({}, ["zebra"])


def test_a_clip_is_exported_for_transformers_and_for_big_vision(folder, tmp_path_factory):
    transformers = require("transformers")
    from ovseg_jax.inference import export
    from ovseg_jax.inference.segmenter import Segmenter
    from ovseg_jax.pretrained.load import load

    path, _ = folder
    tower = dict(width=32, depth=1, heads=2, mlp_dim=48, grid=(2, 2), embed_dim=EMBED, head_bias=False)
    method = frozen(
        path, backbone=dict(name="vit", pre_norm=True, activation="quick_gelu", epsilon=1e-5, **tower)
    )
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
