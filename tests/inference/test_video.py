"""Videos and frames: what is written, what smoothing does, and files that are none."""

import json

import jax
import numpy as np
import pytest
from extras import require
from fake_method import CLASSES, ColourMethod, blocks, config
from PIL import Image

from ovseg_jax import predict
from ovseg_jax.cli.console import guarded
from ovseg_jax.data.videos import VideoReader, VideoWriter
from ovseg_jax.errors import UserError
from ovseg_jax.files import locked
from ovseg_jax.inference.folder import image_files
from ovseg_jax.inference.segmenter import Segmenter
from ovseg_jax.inference.video import segment_video


def segmenter(texts=None, **kwargs):
    method = ColourMethod()
    return Segmenter(method, method.init(None), config(32), CLASSES, **kwargs)


def frames(*colours, size=(24, 40)):
    return [blocks(*size, [colour]) for colour in colours]


@pytest.fixture
def clip(tmp_path):
    require("av")
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, 10) as writer:
        for frame in frames(*["red"] * 3, *["blue"] * 2, size=(32, 48)):
            writer.add(Image.fromarray(frame))
    return path


def test_a_video_and_its_frames_again(clip):
    reader = VideoReader(clip)
    for _ in range(2):
        read = list(reader)
        assert len(read) == 5 and read[0].shape == (32, 48, 3) and reader.fps == 10
        assert np.abs(read[0].mean((0, 1)) - [220, 30, 30]).max() < 12
        assert np.abs(read[4].mean((0, 1)) - [40, 60, 220]).max() < 12


def test_predict_writes_overlays_and_records(clip, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        Segmenter, "from_checkpoint", classmethod(lambda cls, *_, **kwargs: segmenter(**kwargs))
    )
    out = tmp_path / "out"
    flags = ["--checkpoint=run", "--labels=green; red; blue", f"--out={out}"]
    assert predict.main([*flags, f"--images={clip}"]) == 0
    assert sorted(p.name for p in out.iterdir() if p.name[0] != ".") == ["clip.jsonl", "clip.mp4"]
    records = [json.loads(line) for line in (out / "clip.jsonl").read_text().splitlines()]
    assert [r["frame"] for r in records] == [0, 1, 2, 3, 4] and records[4]["time"] == 0.4
    assert [r["segments"][0]["category"] for r in records] == ["red"] * 3 + ["blue"] * 2
    assert len(list(VideoReader(out / "clip.mp4"))) == 5
    assert predict.main([*flags, f"--images={clip}"]) == 1 and "exists already" in capsys.readouterr().err
    # The same frames as pictures, with the past four times as heavy as the present.
    for i, frame in enumerate(frames("red", "red", "blue", "blue", "blue", "blue")):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(frame).save(tmp_path / "in" / f"f{i + 8}.png")  # by letters f10 precedes f8
    assert predict.main([*flags, f"--images={tmp_path / 'in'}", "--fps=5", "--smooth=0.8"]) == 0
    records = [json.loads(line) for line in (out / "in.jsonl").read_text().splitlines()]
    assert [r["segments"][0]["category"] for r in records] == ["red"] * 5 + ["blue"]
    for where in (tmp_path / "in", f"{tmp_path}/in/*.png"):
        assert [file.stem for file in image_files(where, frames=True)] == [f"f{i}" for i in range(8, 14)]
    with locked(out):
        assert predict.main([*flags, f"--images={clip}", "--overwrite"]) == 1
    assert "out is in use by process" in capsys.readouterr().err


def test_a_stopped_video_says_that_it_begins_again(clip, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        Segmenter, "from_checkpoint", classmethod(lambda cls, *_, **kwargs: segmenter(**kwargs))
    )

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Segmenter, "stream", stopped)
    flags = ["--checkpoint=run", "--labels=red", f"--images={clip}", f"--out={tmp_path / 'out'}"]
    assert guarded(lambda: predict.main(flags)) == 130
    assert "begins the video again" in capsys.readouterr().err
    assert not (tmp_path / "out" / "clip.mp4").exists()


@pytest.mark.parametrize("masks", [True, False])
def test_smoothing_averages_the_confidence_of_each_name(masks):
    method = ColourMethod(1, masks)
    one = Segmenter(method, method.init(None), config(32), CLASSES)
    images = frames("red", "blue", "blue", size=(32, 32))
    alone = [one.segment(image, "red; blue", decision="argmax") for image in images]
    high = float(alone[0].confidence.mean())
    found = list(one.stream(iter(images), "red; blue", smooth=0.75, threshold=0.0))
    np.testing.assert_allclose(found[0].confidence, alone[0].confidence, rtol=1e-5)
    assert [r.labels for r in found] == [["red"]] * 3
    np.testing.assert_allclose(found[2].confidence.mean(), 0.75**2 * high, rtol=0.01)
    many = Segmenter(method, method.init(None), config(32), CLASSES, devices=jax.devices()[:2])
    for a, b in zip(found, many.stream(images, "red; blue", smooth=0.75, threshold=0.0), strict=True):
        np.testing.assert_allclose(a.confidence, b.confidence, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(smooth=1.0), "not a number from 0"),
        (dict(smooth=0.5, tile=(8, 2)), "leave out tile"),
        (dict(smooth=0.5, decision="panoptic"), "smooth averages the confidence"),
        (dict(smooth=0.5, labels=["red"] * 1001), "up to 1,000 names, not 1,001"),
        (dict(smooth=0.5), "a frame of 24 x 40 pixels follows one of 30 x 40"),
    ],
)
def test_smoothing_that_cannot_be(settings, message):
    images = [*frames("red", size=(30, 40)), *frames("red")]
    with pytest.raises(UserError, match=message):
        list(segmenter().stream(images, **settings))


def test_files_that_are_no_videos(clip, tmp_path):
    av = require("av")
    whole = clip.read_bytes()
    with pytest.raises(UserError, match="no such file"):
        VideoReader(tmp_path / "missing.mp4")
    for name, content in {
        "text.mp4": b"not a video" * 50,
        "cut.mp4": whole[: len(whole) // 2],
        "empty.mp4": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            UserError, match=f"{name}(: the file has no video stream| cannot be read as a video)"
        ):
            VideoReader(tmp_path / name)
    start = whole.index(b"mdat")
    (tmp_path / "spoilt.mp4").write_bytes(
        whole[: start + 40] + bytes(len(whole) - start - 500) + whole[-460:]
    )
    with pytest.raises(UserError, match=r"spoilt\.mp4"):
        list(VideoReader(tmp_path / "spoilt.mp4"))
    with av.open(str(tmp_path / "sound.mp4"), "w") as sound:
        stream = sound.add_stream("aac", rate=8000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        samples.sample_rate = 8000
        for packet in (*stream.encode(samples), *stream.encode(None)):
            sound.mux(packet)
    with pytest.raises(UserError, match="no video stream"):
        VideoReader(tmp_path / "sound.mp4")
    with pytest.raises(UserError, match="cannot follow"):
        segment_video(
            segmenter(),
            [*frames("red", size=(64, 600)), *frames("red", size=(64, 700))],
            tmp_path,
            "x",
            fps=5,
        )
    assert not (tmp_path / "x.mp4").exists()
