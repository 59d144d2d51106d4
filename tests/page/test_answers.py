"""The answers of the page, without Gradio: limits, pictures, words at a pixel, similarity, downloads."""

import contextlib
import dataclasses
import io
import itertools
import json
import re
import sys
import types
import zipfile

import jax
import numpy as np
import pytest
from fake_method import CLASSES, ColourMethod, blocks, config
from PIL import Image
from pycocotools import mask as coco

from ovseg_jax import demo
from ovseg_jax.errors import UserError
from ovseg_jax.inference.segmenter import Segmenter
from ovseg_jax.page import answers, app
from ovseg_jax.page.app import Model, Page
from ovseg_jax.viz.segments import palette
from ovseg_jax.vocab.classes import parse_labels

IMAGE = blocks(24, 40, ["red", "green"], ["blue", "yellow"])


def colours(masks=True, stride=2):
    method = ColourMethod(stride, masks)
    return Segmenter(method, method.init(jax.random.key(0)), config(32), CLASSES)


@pytest.fixture(scope="module")
def model():
    return colours()


def page(model, count=1):
    lists = [parse_labels("red; green; tree; zebra,horse in stripes")]
    return Page([Model(f"run {i}", model) for i in range(count)], lists, lists[0].flat()[0], [IMAGE])


def png(path, image):
    Image.fromarray(image).save(path)
    return path


def test_an_upload_is_read_shrunk_or_refused(tmp_path, monkeypatch):
    image, sentence = answers.read_picture(png(tmp_path / "a.png", IMAGE))
    assert (image == IMAGE).all() and sentence == "a.png, 40 x 24 pixels."
    monkeypatch.setattr(answers, "SIDE", 20)
    image, sentence = answers.read_picture(tmp_path / "a.png")
    assert image.shape == (12, 20, 3) and "shrunk to 20 x 12" in sentence
    monkeypatch.setattr(answers, "MAX_PIXELS", 900)
    with pytest.raises(UserError, match=r"^a.png has 40 x 24 pixels, more than the limit"):
        answers.read_picture(tmp_path / "a.png")
    monkeypatch.setattr(answers, "MAX_BYTES", 20)
    with pytest.raises(UserError, match=r"^a.png has 0.0 MB, more than the limit"):
        answers.read_picture(tmp_path / "a.png")


def test_a_bad_upload_is_named_without_its_folder_and_deleted(tmp_path, model):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"bad.png cannot be read") as caught:
        page(model).upload(str(bad))
    assert str(tmp_path) not in str(caught.value) and not bad.exists()


def test_typed_words_open_no_file(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("1:password")
    assert answers.read_words(str(secret)).names == ((str(secret),),)
    assert answers.read_words("  ") is None
    assert len(answers.read_words("coco_things")) == 80
    known = dataclasses.replace(parse_labels("sky; dog"), isthing=(False, True))
    assert answers.read_words("cat; sky; dog", [known]).isthing == (True, False, True)
    for text, match in ((";".join("a" * 3000), "3000 names"), ("a" * 70_000, "70000 letters"), (";;", "no")):
        with pytest.raises(UserError, match=match):
            answers.read_words(text)


@pytest.mark.parametrize("masks", [True, False])
def test_words_at_a_pixel_and_similarity_are_those_that_segmentation_compares(masks):
    segmenter = colours(masks)
    prediction = answers.PicturePrediction(segmenter, IMAGE)
    classes = answers.embeddable(segmenter, ["tree", "red"])
    assert [classes.display(k) for k in range(len(classes))] == list(dict.fromkeys(CLASSES.flat()[0]))
    result = segmenter.segment(IMAGE, classes, decision="argmax")
    for y, x in ((0, 0), (23, 39), (10, 21), (13, 5)):
        (word, score), *others = answers.words_at(prediction, classes, ((x + 0.5) / 40, (y + 0.5) / 24), 3)
        assert word == classes.display(result.label_map[y, x])
        np.testing.assert_allclose(score, result.confidence[y, x], atol=1e-5)
        assert len(others) == 2 and score >= others[0][1] >= others[1][1]
    alone = segmenter.segment(IMAGE, "green", decision="argmax")
    np.testing.assert_allclose(answers.similarity(prediction, "green"), alone.confidence, atol=1e-5)


def test_words_are_tried_by_kept_features_where_the_text_tower_is_not_read(monkeypatch):
    segmenter = colours(False)
    segmenter.classes = None

    def unread(variables, names):
        raise KeyError("text")

    monkeypatch.setattr(segmenter.method, "embed_text", unread)

    def kept(names):
        if "tree" in names:
            raise UserError("the word 'tree' is unknown")
        return {"a": np.ones((len(names), 3), np.float32)}

    segmenter._embed_text = kept
    assert answers.embeddable(segmenter, ["red", "tree", "green"]).flat()[0] == ["red", "green"]


def test_a_threshold_hides_pixels_or_segments(model):
    result = answers.segment(model, IMAGE, None, "semantic")
    assert answers.above(result, 0, "semantic") is result and result.features is not None
    at = float(np.median(result.confidence))
    expected = model.segment(IMAGE, threshold=at).label_map
    assert (answers.above(result, at, "semantic").label_map == expected).all() and (expected < 0).any()
    result = answers.segment(model, IMAGE, None, "panoptic")
    scores = [0.2, 0.4, 0.6, 0.8]
    own = [dataclasses.replace(s, score=v) for s, v in zip(result.segments, scores, strict=True)]
    result, cut = dataclasses.replace(result, segments=tuple(own)), 0.5
    kept = answers.above(result, cut, "panoptic")
    assert list(kept.scores) == [0.6, 0.8]
    assert ((kept.label_map >= 0) == kept.masks.any(0)).all()


def test_what_the_browser_reads_of_a_pixel(model):
    result = answers.segment(model, IMAGE, None, "semantic")
    red, green, blue = np.moveaxis(np.asarray(answers.hover_map(result, "semantic"), np.int32), -1, 0)
    words = np.array(["unknown", *answers.words_of(result)])[256 * red + green]
    for y, x in np.ndindex(24, 40):
        assert words[y, x] == result.classes.display(result.label_map[y, x])
    np.testing.assert_allclose(blue / 255, np.clip(result.confidence, 0, 1), atol=0.003)


def test_words_in_html_are_escaped(model):
    assert "<img" not in answers.words_table("<img>", [("<img src=x>", 0.5)], 1)
    assert "<b>" not in answers.heat_figure(IMAGE, np.zeros((2, 3), np.float32), "<b>", "run")
    result = answers.segment(model, IMAGE, None, "semantic")
    classes = dataclasses.replace(result.classes, names=(("<script>\"'",), *result.classes.names[1:]))
    result = dataclasses.replace(result, classes=classes)
    text = answers.figure(result, "<run>", answers.colours_of([result]))
    assert "<script" not in text and "<run>" not in text and "&lt;script&gt;" in text


def test_a_legend_is_short_and_has_the_best_instances_first(model, monkeypatch):
    monkeypatch.setattr(answers, "LISTED", 3)
    result = answers.segment(model, IMAGE, None, "instance")
    text = answers.figure(result, "run", answers.colours_of([result]), "instance")
    scores = [float(score) for score in re.findall(r"<td>(\d\.\d+)</td></tr>", text)]
    best = sorted(result.scores, reverse=True)[:3]
    np.testing.assert_allclose(scores, best, atol=0.005)
    assert f"and {len(result.segments) - 3} more" in text and len(result.segments) > 3
    result = dataclasses.replace(result, segments=result.segments[:3])
    assert " more" not in answers.figure(result, "run", answers.colours_of([result]), "instance")


def test_where_a_rule_finds_nothing_the_threshold_is_not_to_blame(model):
    handlers = page(model)
    visit, _, _ = handlers.segment(handlers.pick(0)[0], "red", "panoptic", 0.0)
    empty = dataclasses.replace(visit.results[0], segments=())
    _, said = handlers.draw(dataclasses.replace(visit, results=(empty,)), 0.0)
    assert said.startswith("No segment was found") and "threshold" not in said


def test_a_click_chooses_from_thousands_of_words(model):
    colours = [name for (name,) in CLASSES.names]
    many = [" ".join(names) for names in itertools.product(colours, repeat=5) if len({*names}) > 1]
    words = answers.embeddable(model, many)
    found = answers.words_at(answers.PicturePrediction(model, IMAGE), words, (0.01, 0.01))
    assert len(words) > 7000 and found[0][0] == "red" and len(found) == 10


def lab(rgb):
    """CIE L*a*b* of linear sRGB, D65 (IEC 61966-2-1, CIE 15:2004)."""
    matrix = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x = np.clip(rgb, 0, 1) @ np.transpose(matrix) / [0.9505, 1, 1.089]
    f = np.where(x > (6 / 29) ** 3, np.cbrt(x), x * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


# Machado, Oliveira and Fernandes 2009, severity 1.0: what people without one kind of cones see.
BLIND = {
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}


def nearest(rgb, matrix):
    linear = np.where(rgb <= 10, rgb / 255 / 12.92, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    seen = lab(linear @ np.transpose(matrix))
    apart = np.linalg.norm(seen[:, None] - seen, axis=-1)
    return apart[~np.eye(len(rgb), dtype=bool)].min()


@pytest.mark.parametrize("kind", BLIND)
def test_the_first_colours_differ_for_colour_blind_people(kind):
    safe = np.array([[c >> 16, c >> 8 & 255, c & 255] for c in answers.SAFE], float)
    # A difference of 2.3 is just noticeable (Mahy and others 1994).
    assert nearest(safe, BLIND[kind]) > 16 > 13 > nearest(palette(len(safe)).astype(float), BLIND[kind])


def test_the_largest_categories_have_the_safe_colours(model):
    results = [answers.segment(model, IMAGE, None, task) for task in ("semantic", "panoptic")]
    found = answers.colours_of(results)
    assert set(found) == {name for result in results for name in result.labels}
    first = [int(f"{r:02x}{g:02x}{b:02x}", 16) for r, g, b in found.values()]
    assert first == list(answers.SAFE[: len(first)])


def test_downloads_are_those_of_predict(model):
    result = answers.segment(model, IMAGE, None, "semantic")
    name, content = answers.download([result], ["run"], "json")
    segments = json.loads(content)["segments"]
    assert name == "segments.json" and len(segments) == len(result.segments)
    assert (coco.decode(segments[0]["segmentation"]).astype(bool) == result.segments[0].mask).all()
    name, content = answers.download([result], ["run"], "features")
    with np.load(io.BytesIO(content)) as arrays:
        assert name == "features.npz" and arrays["pixels"].shape == result.features.pixels.shape
    name, content = answers.download([result, result], ["a", "b"], "png")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert name == "png.zip" and archive.namelist() == ["1.overlay.png", "2.overlay.png"]
        assert Image.open(archive.open("1.overlay.png")).width >= 512
    with pytest.raises(UserError, match="b has no text-aligned features"):
        answers.download([dataclasses.replace(result, features=None)], ["b"], "features")


def test_the_handlers_of_one_visit(model):
    handlers = page(model, 2)
    for call in (
        lambda: handlers.segment(None, "red", "semantic", 0),
        lambda: handlers.ask(None, (0.0, 0.0)),
        lambda: handlers.similar(None, "red"),
        lambda: handlers.draw(None, 0.5),
        lambda: handlers.upload(None),
    ):
        with pytest.raises(UserError, match="choose a picture first"):
            call()
    visit, shown, _ = handlers.pick(0)
    assert shown.count("<figure") == 2 and "data-map" not in shown
    with pytest.raises(UserError, match="segment the picture first"):
        handlers.download(visit, 0, "png")
    visit, shown, said = handlers.segment(visit, "red; green,yellow", "semantic", 0.04)
    assert shown.count("data-map") == 2 and said.startswith("2 segments; 2 segments.")
    assert re.findall(r"</i>(\w+)</td>", shown)[:2] == ["green", "red"]
    _, said = handlers.draw(visit, 1.0)
    assert said.startswith("No segment scores that much")
    visit, tables, said = handlers.ask(visit, (0.9, 0.1))
    assert said == "Asked at 36, 2." and tables.count("<td>green</td>") == 2 and "zebra" not in tables
    visit, heat, _ = handlers.similar(visit, "red")
    assert heat.count("<img") == 2
    with pytest.raises(UserError, match="type a word"):
        handlers.similar(visit, " ")
    file, said = handlers.download(visit, 0.04, "json")
    assert file["name"] == "json.zip" and said == "Saved json.zip."


def test_the_command_builds_the_page(monkeypatch, tmp_path, capsys, model):
    pages = []

    @contextlib.contextmanager
    def serving(page, port):
        pages.append((page, port))
        yield types.SimpleNamespace(local_url="http://there", block_thread=lambda: None)

    monkeypatch.setattr(app, "serving", serving)
    monkeypatch.setattr(Segmenter, "from_checkpoint", classmethod(lambda cls, run, texts: model))
    monkeypatch.setattr(Segmenter, "from_pretrained", classmethod(lambda cls, name, weights, texts: model))
    (tmp_path / "in").mkdir()
    png(tmp_path / "in" / "a.png", IMAGE)
    (tmp_path / "words.txt").write_text("1:ox,cow\n2:bee\n")
    flags = [f"--words={tmp_path / 'words.txt'}", f"--images={tmp_path / 'in'}", "--port=7999"]
    assert demo.main(["--checkpoint=runs/a", "--model=tipsv2_l14", *flags]) == 0
    (shown, port), out = pages[0], capsys.readouterr().out
    assert shown.names == ["a", "tipsv2_l14"] and shown.words == ("ox", "cow", "bee") and port == 7999
    assert [image.shape for image in shown.examples] == [IMAGE.shape] and "http://there" in out
    assert demo.main(["--checkpoint=runs/a"]) == 0
    assert len(pages[1][0].words) == 240 and len(pages[1][0].examples) == 8
    for flags, text in (
        ([], "one or two models"),
        (["--checkpoint=a"] * 3, "one or two models"),
        (["--checkpoint=a", "--weights=b"], "--weights needs --model"),
        (["--checkpoint=a", "--port=0"], "--port=0 is not a port"),
    ):
        assert demo.main(flags) == 1 and text in capsys.readouterr().err
    assert len(pages) == 2


def test_without_gradio_the_extra_is_named(monkeypatch, model):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[demo\]'"):
        app.build(page(model))
