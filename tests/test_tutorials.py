"""The Python of README and of "how to use a model" runs as it stands, on a model that knows six colours."""

import re
import sys
import types
from pathlib import Path
from types import SimpleNamespace as Message

import jax
import numpy as np
import pytest
from fake_method import CLASSES, COLOURS, ColourMethod, blocks, config
from PIL import Image

from ovseg_jax import Segmenter
from ovseg_jax.protocols import Prediction

ROOT = Path(__file__).parents[1]
IMAGE = blocks(24, 40, ["red", "green"], ["blue", "yellow"])


class AnyWord(ColourMethod):
    """Grass is green, and words that are no colours are left out; its space is called "text", as OpenSeg's."""

    def predict(self, variables, image, image_size):
        masks, regions, pixels = super().predict(variables, image, image_size)[:3]
        return Prediction(masks, {"text": regions["colour"]}, {"text": pixels["colour"]})

    def embed_text(self, variables, texts):
        texts = [text.replace("grass", "green").replace("lawn", "green") for text in texts]
        texts = [" ".join(COLOURS.keys() & text.split()) for text in texts]
        return {"text": super().embed_text(variables, texts)["colour"]}


def blocks_of(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.S)


@pytest.fixture(autouse=True)
def openseg(tmp_path, monkeypatch):
    method = AnyWord(2)
    model = Segmenter(method, method.init(jax.random.key(0)), config(32), CLASSES)

    def from_checkpoint(folder):
        assert folder == "runs/openseg"
        return model

    monkeypatch.setattr(Segmenter, "from_checkpoint", from_checkpoint)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(IMAGE).resize((400, 240), Image.Resampling.NEAREST).save("photo.jpg", quality=95)


def test_readme(tmp_path):
    (text,) = blocks_of("README.md")
    space = {}
    exec(compile(text, "README.md", "exec"), space)
    assert {*space["result"].labels} == {"red ball", "grass"}
    assert (tmp_path / "photo.png").exists()


def test_features():
    text = blocks_of("ovseg_jax/inference/README.md")[0]
    space = {}
    exec(compile(text, "inference/README.md", "exec"), space)
    similarity = np.asarray(space["similarity"])
    assert similarity.shape == (*space["pixels"].shape[:2], 2)
    assert (
        similarity[0, 0].argmax() == 0 and similarity[0, -1].argmax() == 1
    )  # red at the left, green at the right


def test_a_ros_node(monkeypatch):
    """By stand-ins with the names and calls of ROS 2 that the node takes."""
    published, subscribed = [], []

    class Node:
        def __init__(self, name):
            self.name = name

        def create_publisher(self, kind, topic, depth):
            return Message(publish=published.append)

        def create_subscription(self, kind, topic, callback, depth):
            subscribed.append(callback)

    packages = {
        "rclpy": dict(init=lambda: None, spin=lambda node: None),
        "rclpy.node": dict(Node=Node),
        "sensor_msgs": {},
        "sensor_msgs.msg": dict(Image=Message),
    }
    for name, content in packages.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    exec(compile(blocks_of("ovseg_jax/inference/README.md")[1], "inference/README.md", "exec"), {})
    padded = np.pad(IMAGE.reshape(24, 120), ((0, 0), (0, 8)))  # rows may be longer than their pixels
    message = Message(header="7", height=24, width=40, encoding="rgb8", step=128, data=padded.tobytes())
    subscribed[0](message)
    (labels,) = published
    found = np.frombuffer(labels.data, "<u2").reshape(labels.height, labels.step // 2)
    assert labels.header == "7" and found.shape == (24, 40)
    assert found[2, 2] == 1 and found[2, -2] == 2
