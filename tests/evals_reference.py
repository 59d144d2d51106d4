"""The evaluation written the slow way: NumPy, float64, every class at every pixel, one pixel at a time."""

import math

import numpy as np


def sample(maps, y, x, canvas, image, label):
    """Bilinear value of maps [c h w] under label pixel (y, x): half-pixel centres, clamped to the image."""
    index = []
    for axis, p in enumerate((y, x)):
        stride = canvas / maps.shape[1 + axis]
        position = (p + 0.5) * image[axis] / label[axis] / stride - 0.5
        last = math.ceil(image[axis] / stride) - 1
        low = math.floor(position)
        index.append((min(max(low, 0), last), min(max(low + 1, 0), last), position - low))
    (y0, y1, fy), (x0, x1, fx) = index
    top = (1 - fx) * maps[:, y0, x0] + fx * maps[:, y0, x1]
    bottom = (1 - fx) * maps[:, y1, x0] + fx * maps[:, y1, x1]
    return (1 - fy) * top + fy * bottom


def upsample(maps, canvas, image, label):
    maps = np.asarray(maps, np.float64)
    out = np.zeros((maps.shape[0], *label))
    for y in range(label[0]):
        for x in range(label[1]):
            out[:, y, x] = sample(maps, y, x, canvas, image, label)
    return out


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def logits(mode, mask_logits, region_embed, pixel_embed, text, canvas, image, label, segments=None):
    """Segmentation logits of every name at every pixel of one image: [T *label]; -inf where no mask lies."""
    text = np.asarray(text, np.float64)
    if mode == "predicted":
        masks = sigmoid(upsample(mask_logits, canvas, image, label))
        return np.einsum("td,nd,nhw->thw", text, np.asarray(region_embed, np.float64), masks)
    if mode == "none":
        return upsample(np.einsum("td,hwd->thw", text, unit(pixel_embed)), canvas, image, label)
    out = np.full((len(text), *label), -np.inf)
    h, w = pixel_embed.shape[:2]
    for segment in set(np.unique(segments[: label[0], : label[1]])) - {0}:
        pooled = np.zeros(pixel_embed.shape[2])
        for y, x in zip(*np.nonzero(segments[: label[0], : label[1]] == segment), strict=True):
            ys, xs = np.array([y, y + 1]) * image[0] / label[0], np.array([x, x + 1]) * image[1] / label[1]
            for i in range(h):
                for j in range(w):
                    dy = min(ys[1], (i + 1) * canvas / h) - max(ys[0], i * canvas / h)
                    dx = min(xs[1], (j + 1) * canvas / w) - max(xs[0], j * canvas / w)
                    if dy > 0 and dx > 0:
                        pooled += dy * dx * np.asarray(pixel_embed[i, j], np.float64)
        where = segments[: label[0], : label[1]] == segment
        out[:, where] = (text @ unit(pooled))[:, None]
    return out


def confusion_matrix(label, predicted, k):
    """[K K + 1]: rows are the truth, the last column is "nothing predicted"."""
    matrix = np.zeros((k, k + 1), np.int64)
    for t, p in zip(np.ravel(label), np.ravel(predicted), strict=True):
        if 0 <= t < k:
            matrix[t, p if 0 <= p < k else k] += 1
    return matrix
