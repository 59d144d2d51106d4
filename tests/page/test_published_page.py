"""The page of a published model, by `demo --model`: tiny, with random weights in the published files."""

import contextlib
import types

import numpy as np
from PIL import Image

from ovseg_jax import demo
from ovseg_jax.page import app
from tests.methods import test_published as towers


def test_a_published_model_on_the_page(monkeypatch, tmp_path, capsys):
    towers.shrink(monkeypatch)
    weights, pages = towers.saved("tipsv2_b14")[1], []

    @contextlib.contextmanager
    def serving(page, port):
        pages.append(page)
        yield types.SimpleNamespace(local_url="http://there", block_thread=lambda: None)

    monkeypatch.setattr(app, "serving", serving)
    (tmp_path / "in").mkdir()
    Image.fromarray(towers.photograph(60, 90)).save(tmp_path / "in" / "photo.png")
    (tmp_path / "words.txt").write_text("1:ox,cow\n2:bee\n")
    flags = [f"--weights={weights}", f"--images={tmp_path / 'in'}", f"--words={tmp_path / 'words.txt'}"]
    assert demo.main(["--model=tipsv2_b14", *flags]) == 0, capsys.readouterr().err
    (page,) = pages
    assert page.names == ["tipsv2_b14"] and page.start == app.EVERYDAY
    visit, _, _ = page.pick(0)
    visit, shown, said = page.segment(visit, page.start, "semantic", 0)
    assert "segments. Point at one" in said and shown.count("data-map") == 1
    (result,) = visit.results
    names = [name.strip() for name in app.EVERYDAY.split(";")]
    assert [result.classes.display(k) for k in range(len(result.classes))] == names
    isthing = dict(zip(names, result.classes.isthing, strict=True))
    assert isthing["person"] and not isthing["sky"]
    visit, tables, _ = page.ask(visit, (0.5, 0.5))
    assert "best of 3 words" in tables and "<td>ox</td>" in tables
    visit, heat, _ = page.similar(visit, "a red ball")
    assert heat.count("<img") == 1
    alone = page.models[0].segmenter.segment(towers.photograph(60, 90), "a red ball", threshold=-1.0)
    assert np.ptp(alone.confidence) > 0
