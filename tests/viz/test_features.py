import numpy as np
from PIL import Image

from ovseg_jax.viz.features import (
    PromptPoint,
    _figure,
    _raise_covered,
    prompts_picture,
    sphere_coordinates,
    sphere_picture,
)
from ovseg_jax.viz.segments import palette


def clouds(seed=0, k=5, n=30, d=32):
    """Features as CLIP's are: classes near each other, and images far from texts."""
    rng = np.random.default_rng(seed)
    images, texts, centres = rng.normal(size=d), rng.normal(size=d), rng.normal(size=(k, d))
    label = np.repeat(np.arange(k), n)
    x = 3 * images + centres[label] + 0.5 * rng.normal(size=(k * n, d))
    near = 3 * texts + centres + 0.1 * rng.normal(size=(k, d))
    far = 3 * texts + 0.5 * centres + rng.normal(size=(k, d))
    unit = lambda x: (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
    return unit(x), label, {"learned": unit(near), "a photo of a {}.": unit(far)}


def test_coordinates_keep_what_lies_near_each_other():
    image, label, classes = clouds()
    points, rays = sphere_coordinates(image, label, classes)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, atol=1e-6)
    nearest = (points @ rays["learned"].T).argmax(1)
    assert (nearest == label).mean() > 0.9
    assert (points @ rays["a photo of a {}."].T).argmax(1).tolist() != nearest.tolist()
    two = sphere_coordinates(image[label < 2], label[label < 2], {"x": classes["learned"][:2]})
    assert all(np.isfinite(x).all() for x in (two[0], two[1]["x"]))


def test_pictures_show_every_class_and_prompt(tmp_path):
    names = ["cat", "dog", "emu", "sea", "red fox"]
    image, label, classes = clouds()
    picture = sphere_picture(image, label, classes, names, "test", tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == picture.size
    pixels = np.asarray(picture).reshape(-1, 3).astype(int)
    _, rays = sphere_coordinates(image, label, classes)
    near = rays["learned"][:, 2] > 0
    assert near.sum() >= 2
    for colour in palette(5)[near].astype(int):
        assert (np.abs(pixels - colour).max(1) < 12).sum() > 100
    alone = sphere_picture(image, label, {"learned": classes["learned"]}, names, "test")
    assert (np.asarray(alone) != np.asarray(picture)).any(-1).sum() > 500
    points = [PromptPoint("own", -1.2, 1.3, 70.0), PromptPoint("hard", -0.9, 1.35, 60.0)]
    one = prompts_picture(points[:1])
    both = prompts_picture(points, "test", tmp_path / "b.png")
    assert one.size == both.size and (np.asarray(one) != np.asarray(both)).any()


def test_words_do_not_cover_each_other():
    axes = _figure(4.0, 4.0)[1]
    axes.set(xlim=(-1, 1), ylim=(-1, 1))
    words = [axes.text(0, y, name, ha="center") for y, name in ((0.03, "a"), (0, "red ball"), (0.02, "kite"))]
    apart = axes.text(0.8, 0.01, "moon")
    _raise_covered(axes, [*words, apart])
    axes.figure.draw_without_rendering()
    boxes = [word.get_window_extent() for word in words]
    assert not any(boxes[i].overlaps(boxes[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert words[1].get_position() == (0, 0) and apart.get_position() == (0.8, 0.01)
    assert words[2].get_position()[1] < words[0].get_position()[1] < 0.5
