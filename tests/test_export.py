"""Exported models beside the one that they come from."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from ovseg_jax import export as command
from ovseg_jax.errors import UserError
from ovseg_jax.inference import export
from ovseg_jax.inference.segmenter import Segmenter
from ovseg_jax.pretrained.files import read_arrays
from ovseg_jax.pretrained.to_torch import from_torch, to_torch
from ovseg_jax.protocols import only
from tests.extras import require
from tests.fake_method import ColourMethod
from tests.methods import test_mask2former_method as mask2former
from tests.methods import test_maskformer_method as maskformer
from tests.methods import test_pseg as pseg
from tests.methods.test_groupvit_method import VOCAB, pieces
from tests.methods.test_openseg import CLASSES, make
from tests.segments import assert_same_segments

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (53, 71, 3), np.uint8)
LABELS = "red ball,ball; grass; blue"
CLOSED = {"maskformer": maskformer, "mask2former": mask2former}


def make_segmenter(kind="openseg", text=None, **model):
    if kind == "pseg":  # statistics and several templates included
        own = dict(projection_norm=True, prompt=["{} ball", "{}"]) | (text or {})
        method = pseg.make(text=own, projection_norm=True, **model)
    elif kind in CLOSED:
        method = CLOSED[kind].method()
    else:
        method = make(kind, mask_bias=0.2, mask_scale=8.0, **model)
    variables = jax.tree.map(np.asarray, jax.jit(method.init)(jax.random.key(0)))
    # Everything that an initialiser leaves at 0 or 1 must matter.
    noise = 0.3 if kind == "pseg" else 0.05
    rng = np.random.default_rng(0) if kind == "pseg" else RNG
    variables = jax.tree.map(lambda x: (x + rng.normal(0, noise, x.shape)).astype(x.dtype), variables)
    return Segmenter(method, variables, method.config, maskformer.CLASSES if kind in CLOSED else CLASSES)


@pytest.mark.parametrize("method", ["openseg", "lseg", "pseg"])
def test_pytorch_gives_the_same_labels(tmp_path, method):
    require("torch")
    import ovseg_jax.torch

    segmenter = make_segmenter(method)
    export.to_folder(segmenter, tmp_path, np.dtype("float32"))
    loaded = ovseg_jax.torch.load(tmp_path)
    for labels in (LABELS, None):
        ours, theirs = segmenter.segment(IMAGE, labels), loaded.segment(IMAGE, labels)
        assert len(np.unique(ours.label_map)) > 1
        assert (ours.label_map == theirs.label_map).mean() > 0.999
        np.testing.assert_allclose(theirs.confidence, ours.confidence, atol=1e-4)
        assert theirs.classes.names == ours.classes.names
        if method == "openseg":
            decision = dict(type="panoptic", overlap_threshold=0.1)
            assert_same_segments(*(x.segment(IMAGE, labels, decision=decision) for x in (segmenter, loaded)))
    for asked, message in (
        (dict(decision="panoptic", threshold=0.1), "leave out threshold"),
        (dict(decision="argmax"), "the decision 'argmax' is not one of panoptic, instances"),
        (dict(decision="panoptic"), "needs masks, which this model does not have"),
    ):
        if method == "lseg" or "masks" not in message:
            with pytest.raises(UserError, match=message):
                loaded.segment(IMAGE, **asked)
    with pytest.raises(UserError, match=r"has never seen 'zebra'|holds 'zebra', which is not one of the 4"):
        loaded.segment(IMAGE, "zebra")
    vectors = np.asarray(only(segmenter.embed(LABELS)))
    given = loaded.segment(IMAGE, LABELS, vectors=vectors)
    assert (given.label_map == segmenter.segment(IMAGE, LABELS).label_map).mean() > 0.999


def test_pytorch_has_the_word_pieces_of_a_trained_text_side(tmp_path):
    require("torch")
    import ovseg_jax.torch

    pieces(tmp_path)
    segmenter = make_segmenter("pseg", dict(tokenizer=str(tmp_path), vocab_size=VOCAB + 2, length=77))
    text = export.export_model(lambda: segmenter, "torch", str(tmp_path / "out"), "float16")
    assert "text_tower" in text
    (tmp_path / "vocab.json").unlink()
    loaded = ovseg_jax.torch.load(tmp_path / "out")
    names = ["Zebra crossing", "a very " + "long " * 30 + "name"]
    ours, theirs = only(segmenter.embed(names)), loaded.embed(names).numpy()
    np.testing.assert_allclose(theirs, ours, atol=5e-3)
    assert np.abs(ours[0] - ours[1]).max() > 0.05
    config = tmp_path / "out/text_tower/config.json"
    config.write_text(config.read_text().replace('"templates": [', '"templates": [3, '))
    with pytest.raises(UserError, match="templates is not a list of texts"):
        ovseg_jax.torch.load(tmp_path / "out")


def test_pytorch_embeds_names_once_for_all_images(tmp_path, monkeypatch):
    """Names were embedded anew for each image: minutes an image for a long list of labels."""
    require("torch")
    import ovseg_jax.torch

    export.to_folder(make_segmenter(), tmp_path, np.dtype("float32"))
    loaded, embedded = ovseg_jax.torch.load(tmp_path), []
    embed = loaded.embed
    monkeypatch.setattr(loaded, "embed", lambda names: embedded.append(list(names)) or embed(names))
    first = loaded.segment(IMAGE, LABELS)
    for image in (IMAGE, IMAGE[:20], IMAGE[:, :30]):
        loaded.segment(image, LABELS)
    assert embedded == [["red ball", "ball", "grass", "blue"]]
    # Another list is not taken for it, not even one of the same names.
    apart = loaded.segment(IMAGE, "red ball; ball; grass; blue")
    assert len(apart.classes) == 4 and len(np.unique(apart.label_map)) > 1
    few = loaded.segment(IMAGE, "grass; blue")
    assert embedded[1:] == [embedded[0], ["grass", "blue"]]
    vectors = loaded.embed(["grass", "blue"]).numpy()
    np.testing.assert_array_equal(
        few.label_map, loaded.segment(IMAGE, "grass; blue", vectors=vectors).label_map
    )
    np.testing.assert_array_equal(first.label_map, loaded.segment(IMAGE, LABELS).label_map)


def test_the_way_to_pytorch_and_back_loses_no_bit(tmp_path):
    segmenter = make_segmenter(backbone=dict(name="efficientnet_b0"))
    flat = export.by_path(segmenter.variables)
    assert any(path.endswith("/var") for path in flat)  # Statistics too.
    export.to_folder(segmenter, tmp_path, np.dtype("float32"))
    back = from_torch(read_arrays(tmp_path), {path: x.shape for path, x in flat.items()})
    for path, x in flat.items():
        np.testing.assert_array_equal(back[path], x)
    assert len(to_torch(flat)) == len(flat)


def test_half_precision_and_what_it_changes(tmp_path):
    segmenter = make_segmenter()
    export.to_folder(segmenter, tmp_path, np.dtype("float16"))
    assert {x.dtype for x in read_arrays(tmp_path).values()} == {np.dtype("float16")}
    half, brain = (
        export.difference(segmenter, np.dtype(jax.numpy.dtype(d))) for d in ("float16", "bfloat16")
    )
    assert 0 < half < brain < 0.2


def test_stablehlo_takes_any_number_of_images_and_names(tmp_path):
    require("flatbuffers")
    segmenter = make_segmenter()
    export.to_stablehlo(segmenter, tmp_path, np.dtype("float32"))
    exported = jax.export.deserialize(bytearray((tmp_path / "model.stablehlo").read_bytes()))
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
    parameters = read_arrays(tmp_path)
    for b, t in ((1, 2), (3, 5)):
        images = RNG.integers(0, 256, (b, 32, 32, 3), np.uint8)
        sizes, names = np.full((b, 2), 32, np.int32), RNG.normal(size=(t, 24)).astype(np.float32)
        logits, scores, pixels = exported.call(parameters, images, sizes, names)
        expected = jax.jit(segmenter.method.predict)(
            segmenter.variables, *map(jax.numpy.asarray, (images, sizes))
        )
        np.testing.assert_allclose(logits, expected.mask_logits, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(pixels, only(expected.pixels), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(scores, names @ np.swapaxes(only(expected.regions), 1, 2), atol=1e-4)
    example = subprocess.run(
        [sys.executable, tmp_path / "example.py", tmp_path], capture_output=True, text=True, timeout=300
    )
    assert example.stdout.splitlines() == ["(2, 6, 8, 8)", "(2, 5, 6)", "(2, 8, 8, 24)"], example.stderr


@pytest.mark.parametrize("method", ["openseg", "lseg", "pseg", "maskformer", "mask2former"])
def test_onnx_takes_any_number_of_images(tmp_path, method):
    torch, runtime = require("torch"), require("onnxruntime")
    require("onnxscript")
    import ovseg_jax.torch

    export.to_onnx(make_segmenter(method), tmp_path, np.dtype("float32"))
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    images = RNG.integers(0, 256, (3, 3, 32, 32), np.uint8)
    sizes = np.array([[32, 32], [20, 28], [9, 32]], np.int32)
    found = session.run(None, {"image": images, "image_size": sizes})
    with torch.no_grad():
        expected = ovseg_jax.torch.load(tmp_path).net(*map(torch.from_numpy, (images, sizes)))
    expected = [x.numpy() for x in expected if x is not None]
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_what_cannot_be_exported_is_said(tmp_path, capsys):
    method = ColourMethod()  # which declares no network
    config = ConfigDict({"method": "colours", "data": {"image_size": 32}})
    ours = lambda: Segmenter(method, method.init(None), config, CLASSES)
    with pytest.raises(UserError, match="--to=torch cannot hold the method colours"):
        export.export_model(ours, "torch", str(tmp_path / "x"))
    assert command.main([f"--checkpoint={tmp_path}", "--to=torch", f"--out={tmp_path}/x"]) == 1
    assert "holds no run" in capsys.readouterr().err


def test_files_that_are_there_are_replaced_when_it_is_said(tmp_path, monkeypatch, capsys):
    """Such as config.json of a run, without which its checkpoints cannot be read."""
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    (run / "config.json").write_text("the run's")
    monkeypatch.setattr(Segmenter, "from_checkpoint", classmethod(lambda cls, *_, **__: make_segmenter()))
    call = lambda *flags: command.main([f"--checkpoint={run}", "--to=big_vision", *flags])
    assert call(f"--out={out}") == 0 and call(f"--out={out}") == 1
    assert "holds a file model.npz" in capsys.readouterr().err
    assert call(f"--out={out}", "--overwrite") == 0
    for flags in ([], ["--overwrite"]):
        assert command.main([f"--checkpoint={run}", "--to=torch", f"--out={run}/../run", *flags]) == 1
    assert (run / "config.json").read_text() == "the run's"


def test_a_folder_that_is_none_of_ours(tmp_path):
    require("torch")
    import ovseg_jax.torch

    with pytest.raises(UserError, match=r"exported model .* cannot be read"):
        ovseg_jax.torch.load(tmp_path)
    segmenter = make_segmenter()
    export.to_folder(segmenter, tmp_path, np.dtype("float32"))
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace('"width": 16', '"width": 32', 1)
    )
    with pytest.raises(UserError, match=r"but by its description"):
        ovseg_jax.torch.load(tmp_path)


def test_a_closed_set_keeps_its_classes(tmp_path):
    """UPerNet has no text side: the exported model knows the names of its classes, and others are refused."""
    require("torch")
    import ovseg_jax.torch
    from ovseg_jax.pretrained.files import read_arrays as read
    from tests.methods import test_upernet_method as upernet

    method = upernet.method()
    variables = jax.tree.map(np.asarray, jax.jit(method.init)(jax.random.key(0)))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: (x + rng.normal(0, 0.1, x.shape)).astype(x.dtype), variables)
    # No class may win everywhere.
    image = variables["params"]["image"]
    inputs = (jax.numpy.asarray(IMAGE[None, :32, :32]), jax.numpy.full((1, 2), 32))
    logits = jax.jit(method.net.apply)(
        jax.tree.map(jax.numpy.asarray, {**variables, "params": image}), *inputs
    ).logits
    image["classifier"]["bias"] -= np.asarray(logits).mean((0, 1, 2))
    segmenter = Segmenter(method, variables, method.config, upernet.CLASSES)
    export.to_folder(segmenter, tmp_path, np.dtype("float32"))
    loaded = ovseg_jax.torch.load(tmp_path)
    for labels in (None, "kitten; sky"):
        ours, theirs = segmenter.segment(IMAGE, labels), loaded.segment(IMAGE, labels)
        assert len(np.unique(ours.label_map)) > 1
        assert (ours.label_map == theirs.label_map).mean() > 0.999
        np.testing.assert_allclose(theirs.confidence, ours.confidence, atol=1e-4)
    with pytest.raises(UserError, match="has no text side and knows 3 classes, but none is called 'dog'"):
        loaded.segment(IMAGE, "dog; sky")

    require("flatbuffers")
    export.to_stablehlo(segmenter, tmp_path, np.dtype("float32"))
    run = jax.export.deserialize((tmp_path / "model.stablehlo").read_bytes()).call
    image = np.zeros((1, 32, 32, 3), np.uint8) + IMAGE[:32, :32]
    size = np.full((1, 2), 32, np.int32)
    scores, _ = run(read(tmp_path / "model.safetensors"), image, size, np.eye(3, dtype=np.float32)[1:])
    pixels = only(
        jax.jit(method.predict)(segmenter.variables, jax.numpy.asarray(image), jax.numpy.asarray(size)).pixels
    )
    np.testing.assert_allclose(scores, np.moveaxis(np.asarray(pixels)[..., 1:], -1, 1), atol=1e-4)
