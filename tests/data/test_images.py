"""Images and masks: stored values of labels, orientations, checksums, and one rule by which files are listed."""

import io
import os
import struct
import zlib

import kornia_rs.io
import numpy as np
import pytest
from PIL import Image

from ovseg_jax.data import images
from ovseg_jax.data.images import (
    Encoded,
    encode_mask,
    list_images,
    read_colours,
    read_header,
    read_ids,
    read_image,
    read_mask,
    read_oriented,
    read_wide_mask,
    turn_mask,
)
from ovseg_jax.data.sources.folder import Folder
from ovseg_jax.data.sources.image_folder import ImageFolder
from ovseg_jax.errors import UserError

both_readers = pytest.mark.parametrize("read", [read_mask, read_wide_mask])


def png(values, bits, palette=False, more=(), rows=()):
    """A PNG of one channel of 1 to 16 bits, grey or with a palette, made without an image library.

    `more` are further chunks, as (kind, content); `rows` replace the rows, which have no filter.
    """
    chunk = lambda kind, body: (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    )
    plain = ["".join(f"{value:0{bits}b}" for value in row) for row in values]
    plain = [row + "0" * (-len(row) % 8) for row in plain]
    raw = b"".join(
        rows or (b"\0" + bytes(int(row[i : i + 8], 2) for i in range(0, len(row), 8)) for row in plain)
    )
    head = struct.pack(">IIBBBBB", len(values[0]), len(values), bits, 3 if palette else 0, 0, 0, 0)
    colours = chunk(b"PLTE", bytes(k * 7 % 256 for k in range(3 << bits))) if palette else b""
    colours += b"".join(chunk(*each) for each in more)
    body = chunk(b"IHDR", head) + colours + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@both_readers
@pytest.mark.parametrize(
    ("bits", "palette"), [*((b, False) for b in (1, 2, 4, 8, 16)), *((b, True) for b in (1, 2, 4, 8))]
)
def test_a_mask_has_its_stored_values(tmp_path, read, bits, palette):
    values = (np.arange(15).reshape(3, 5) * 4099 if bits == 16 else np.arange(15).reshape(3, 5)) % (1 << bits)
    (tmp_path / "m.png").write_bytes(png(values.tolist(), bits, palette))
    mask = read(tmp_path / "m.png")
    np.testing.assert_array_equal(mask, values)
    assert mask.dtype == (np.uint16 if bits == 16 else np.uint8)


@both_readers
@pytest.mark.parametrize(("bits", "palette"), [(8, False), (16, False), (8, True)])
def test_what_a_png_says_of_its_colours_changes_no_value(tmp_path, read, bits, palette):
    """Gamma, significant bits, background and a transparent value."""
    values = np.random.default_rng(0).integers(0, 1 << bits, (20, 30))
    clear = b"\0\3" if not palette else bytes(range(256))
    more = [
        (b"gAMA", struct.pack(">I", 100000)),
        (b"sBIT", b"\x03" * (3 if palette else 1)),
        (b"tRNS", clear),
    ]
    (tmp_path / "m.png").write_bytes(png(values.tolist(), bits, palette, more))
    np.testing.assert_array_equal(read(tmp_path / "m.png"), values)


@both_readers
@pytest.mark.parametrize("bits", [8, 16])
def test_rows_of_every_filter(tmp_path, read, bits):
    """A PNG stores rows as differences in one of five ways (PNG 1.2, section 6)."""
    values = np.random.default_rng(0).integers(0, 1 << bits, (25, 30))
    step = bits // 8
    stored = np.stack([values >> 8, values & 255], -1)[..., 2 - step :].reshape(25, -1)
    padded = np.pad(stored, ((1, 0), (step, 0)))
    left, up, corner = padded[1:, :-step], padded[:-1, step:], padded[:-1, :-step]
    three = np.stack([left, up, corner])
    nearest = np.abs(left + up - corner - three).argmin(0)
    paeth = np.take_along_axis(three, nearest[None], 0)[0]
    guesses = [np.zeros_like(left), left, up, (left + up) // 2, paeth]
    rows = [bytes([k % 5, *((stored[k] - guesses[k % 5][k]) % 256)]) for k in range(25)]
    (tmp_path / "m.png").write_bytes(png(values.tolist(), bits, rows=rows))
    np.testing.assert_array_equal(read(tmp_path / "m.png"), values)


def test_a_mask_of_32_bits(tmp_path):
    values = np.array([[-1, 70000, 2**31 - 1], [0, 1, -(2**31)]], np.int32)
    Image.fromarray(values).save(tmp_path / "m.tif")
    np.testing.assert_array_equal(read_wide_mask(tmp_path / "m.tif"), values)
    with pytest.raises(UserError, match=r"m.tif cannot be read: it has values outside 0..65535"):
        read_mask(tmp_path / "m.tif")


def test_a_moving_picture_is_no_mask(tmp_path):
    first, second = (Image.fromarray(np.full((3, 4), k, np.uint8)) for k in (1, 2))
    first.save(tmp_path / "m.png", save_all=True, append_images=[second])
    with pytest.raises(UserError, match=r"m.png cannot be read: it holds 2 pictures"):
        read_wide_mask(tmp_path / "m.png")


@both_readers
@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("m.tif", "L", {}),
        ("m.TIFF", "L", {"compression": "tiff_lzw"}),
        ("m.tif", "I;16", {}),
        ("m.tif", "I", {}),
        ("m.bmp", "L", {}),
        ("m.bmp", "P", {}),
        ("m.pgm", "L", {}),
        ("m.tif", "1", {"compression": "group4"}),
    ],
)
def test_masks_of_other_formats(tmp_path, read, name, mode, options):
    values = np.arange(12, dtype=np.uint8).reshape(3, 4) % (2 if mode == "1" else 12)
    image = Image.fromarray(values * 255 if mode == "1" else values)
    if mode == "P":
        image.putpalette(list(range(36)))
    elif mode.startswith("I"):
        image = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.int32))
    else:
        image = image.convert(mode)
    image.save(tmp_path / name, **options)
    np.testing.assert_array_equal(read(tmp_path / name), values)


def test_what_is_no_mask(tmp_path):
    def wrong(name, image, message, **options):
        image.save(tmp_path / name, **options)
        with pytest.raises(UserError, match=message) as caught:
            read_mask(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)

    grey = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    wrong("a.jpg", grey, "JPEG may change a mask's values")
    wrong("a.webp", grey, "WEBP may change")
    wrong("a.tif", grey, "may change", compression="jpeg")
    wrong("b.tif", grey, "stores its pixels as 'L;I'", tiffinfo={262: 0})
    wrong("c.tif", Image.fromarray(np.zeros((2, 2), np.float32)), "mode F")
    wrong("d.tif", Image.fromarray(np.full((2, 2), -1, np.int32)), "outside 0..65535")
    wrong("e.tif", grey, "holds 2 pictures", save_all=True, append_images=[grey])
    wrong("a.png", grey.convert("RGBA"), "mode RGBA")
    wrong("b.png", grey.convert("LA"), "mode LA")


def slow(monkeypatch):
    """Leaves all PNGs to Pillow."""
    monkeypatch.setattr(images, "_decode_png", lambda data, forms: None)


def chunked(chunks):
    packed = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def random_png(rng, kind, depth, interlaced=False, more=()):
    """The chunks of a PNG of 13 x 9 pixels whose rows have any filter; the pixels are in two chunks."""
    width, height, channels = 13, 9, {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    passes = (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    )
    rows = []
    for left, top, right, down in passes if interlaced else ((0, 0, 1, 1),):
        length = (-(-(width - left) // right) * channels * depth + 7) // 8
        for _ in range(-(-(height - top) // down)):
            rows.append(bytes([rng.integers(5)]) + rng.integers(0, 256, length, np.uint8).tobytes())
    pixels = zlib.compress(b"".join(rows))
    palette = [(b"PLTE", rng.bytes(3 << depth))] if kind == 3 else []
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlaced)
    ends = [(b"IDAT", pixels[:50]), (b"IDAT", pixels[50:]), (b"IEND", b"")]
    return [(b"IHDR", head), *palette, *more, *ends]


FORMS = [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16)]
FORMS += [(3, 1), (3, 2), (3, 4), (3, 8), (4, 8), (4, 16), (6, 8), (6, 16)]
BESIDE = [
    (b"gAMA", bytes(4)),
    (b"cHRM", bytes(32)),
    (b"pHYs", bytes(9)),
    (b"sRGB", b"\0"),
    (b"tIME", bytes(7)),
]
NAMED = [
    ("mask", read_mask),
    ("wide mask", read_wide_mask),
    ("colours", lambda file: read_colours(file, "it")),
]
NAMED += [("image", read_oriented)]


def outcome(read, data):
    try:
        found = read(Encoded("a.png", data))
    except UserError as error:
        return str(error), None
    return found if isinstance(found, tuple) else (found, None)


def compare(data, monkeypatch):
    """Holds all readers to what they return or say where Pillow alone reads; returns those that did without it."""
    decode, decoded, without = images._decode_png, [], set()

    def spy(*arguments):
        decoded.append(decode(*arguments))
        return decoded[-1]

    for name, read in NAMED:
        with monkeypatch.context() as patch:
            patch.setattr(images, "_decode_png", spy)
            found, orientation = outcome(read, data)
            slow(patch)
            expected, by_pillow = outcome(read, data)
        assert orientation == by_pillow
        if isinstance(expected, str):
            assert isinstance(found, str) and found == expected
        else:
            np.testing.assert_array_equal(found, expected, strict=True)
        if decoded[-1] is not None:
            without.add(name)
    return without


@pytest.mark.parametrize(("kind", "depth"), FORMS)
def test_a_png_is_read_as_by_pillow(monkeypatch, kind, depth):
    rng = np.random.default_rng(kind * 16 + depth)
    masks = {"mask", "wide mask"} if (kind, depth) in ((0, 8), (0, 16), (3, 8)) else set()
    plain = {"colours", "image"} if (kind, depth) == (2, 8) else masks
    assert compare(chunked(random_png(rng, kind, depth)), monkeypatch) == plain
    assert compare(chunked(random_png(rng, kind, depth, more=BESIDE)), monkeypatch) == plain
    assert not compare(chunked(random_png(rng, kind, depth, interlaced=True)), monkeypatch)
    for more in ((b"tRNS", bytes(6)), (b"eXIf", b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0")):
        assert compare(chunked(random_png(rng, kind, depth, more=[more])), monkeypatch) == masks


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_a_png_of_pillow_is_read_as_by_it(monkeypatch, mode):
    pixels = np.random.default_rng(0).integers(0, 9, (9, 11, 3), dtype=np.uint8).repeat(8, 0).repeat(9, 1)
    image = Image.fromarray(pixels)
    image = Image.fromarray(pixels[..., 0] * np.uint16(6000)) if mode == "I;16" else image.convert(mode)
    masks = {"mask", "wide mask"} if mode in ("L", "P", "I;16") else set()
    for options in ({}, {"optimize": True}, {"compress_level": 0}, {"transparency": 3}):
        if options.get("transparency") and mode not in ("L", "P"):
            continue
        out = io.BytesIO()
        image.save(out, "PNG", **options)
        few = mode == "P" and out.getvalue()[24] < 8
        fast = {"colours", "image"} if mode == "RGB" else masks
        assert compare(out.getvalue(), monkeypatch) == (set() if few else fast)


@pytest.mark.filterwarnings("ignore:Invalid APNG")
def test_a_damaged_png_is_read_as_by_pillow(monkeypatch):
    """With the checksums of its chunks repaired."""
    rng, fast = np.random.default_rng(0), 0
    for k in range(210):
        kind, depth = ((0, 8), (0, 16), (2, 8), (3, 8))[k % 4]
        chunks = [list(each) for each in random_png(rng, kind, depth, more=BESIDE[: rng.integers(3)])]
        at, how = int(rng.integers(len(chunks))), k // 4 % 7
        if how == 0:
            del chunks[at]
        elif how == 1:
            chunks.insert(int(rng.integers(len(chunks))), chunks[at])
        elif how == 2:
            other = int(rng.integers(len(chunks)))
            chunks[at], chunks[other] = chunks[other], chunks[at]
        elif how == 3:
            head = bytearray(chunks[0][1])
            head[rng.choice([3, 7, 8, 9, 10, 11, 12])] = rng.choice([0, 1, 2, 3, 4, 8, 14, 16, 255])
            chunks[0][1] = bytes(head)
        elif how == 4:
            chunks[at][1] = chunks[at][1][: int(rng.integers(len(chunks[at][1]) + 1))]
        elif how == 5:
            name = (b"acTL", b"zTXt", b"iCCP", b"fdAT", b"PLTE", b"tRNS", b"cHRM")[rng.integers(7)]
            chunks.insert(int(rng.integers(1, len(chunks))), [name, rng.bytes(rng.integers(40))])
        else:
            rows = bytearray(zlib.decompress(chunks[-3][1] + chunks[-2][1]))
            rows[int(rng.integers(len(rows)))] = rng.integers(256)
            cut = len(rows) - int(rng.integers(60)) * int(rng.integers(2))
            chunks[-3:-1] = [[b"IDAT", zlib.compress(bytes(rows[:cut]) + bytes(rng.integers(9)))]]
        fast += bool(compare(chunked(chunks), monkeypatch))
    assert fast > 20


def test_a_png_that_lies_of_its_size_is_refused(tmp_path):
    chunks = random_png(np.random.default_rng(0), 0, 8)
    chunks[0] = (b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(chunked(chunks))
    for read in (read_mask, read_wide_mask, read_image):
        with pytest.raises(UserError, match=r"a.png cannot be read: it is too large"):
            read(tmp_path / "a.png")


def test_a_panic_of_the_decoder_leaves_the_file_to_pillow(tmp_path, monkeypatch):
    class PanicException(BaseException):  # pyo3's has no public name
        pass

    def fails(error):
        def decode(*_):
            raise error

        return decode

    Image.new("L", (3, 2), 5).save(tmp_path / "a.png")
    monkeypatch.setattr(kornia_rs.io, "decode_image_png_u8", fails(PanicException()))
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), np.full((2, 3), 5))
    monkeypatch.setattr(kornia_rs.io, "decode_image_png_u8", fails(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        read_mask(tmp_path / "a.png")


@pytest.mark.parametrize("fast", [False, True])
def test_pixels_that_are_missing_are_found(tmp_path, monkeypatch, fast):
    """Where the checksums of the chunks are right."""
    if not fast:
        slow(monkeypatch)
    for pixels, read in (
        (np.ones((64, 50, 3), np.uint8), read_ids),
        (np.ones((64, 50), np.uint8), read_wide_mask),
    ):
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        data = out.getvalue()
        at = data.index(b"IDAT")
        rows = zlib.decompress(data[at + 4 : -16])
        for wrong in (zlib.compress(rows)[:-8], b""):
            body = b"IDAT" + wrong
            chunk = len(wrong).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
            (tmp_path / "a.png").write_bytes(data[: at - 4] + chunk + data[-12:])
            with pytest.raises(UserError, match=r"a.png cannot be read"):
                read(tmp_path / "a.png", *(["the PNG"] if read is read_ids else []))


@pytest.mark.parametrize("fast", [False, True])
def test_ids_of_a_panoptic_png(tmp_path, monkeypatch, fast):
    if not fast:
        slow(monkeypatch)
    ids = np.random.default_rng(0).integers(0, 1 << 24, (5, 7))
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    clear = np.concatenate([colours, np.zeros((5, 7, 1), np.uint8)], -1)
    for name, pixels in (("rgb", colours), ("rgba", clear)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        found = read_ids(tmp_path / f"{name}.png", "the PNG")
        np.testing.assert_array_equal(found, ids)
        assert found.dtype == np.uint32
    few = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3), "P")
    few.putpalette([0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 9, 9, 9, 255, 255, 255])
    few.save(tmp_path / "p.png", transparency=1)
    values = [[0, 1, 256], [65536, 9 * 65793, (1 << 24) - 1]]
    np.testing.assert_array_equal(read_ids(tmp_path / "p.png", "the PNG"), values)


@pytest.mark.parametrize(
    ("name", "mode"), [("a.jpg", "RGB"), ("a.png", "L"), ("a.png", "I;16"), ("a.tif", "RGB")]
)
def test_what_is_no_panoptic_png(tmp_path, name, mode):
    Image.new(mode, (3, 2)).save(tmp_path / name)
    with pytest.raises(
        UserError, match=rf"the PNG .*{name} cannot be read: it is .*, not a PNG of 8-bit colours"
    ):
        read_ids(tmp_path / name, "the PNG")


@pytest.mark.parametrize(("read", "bits"), [(read_mask, 4), (read_wide_mask, 8)])
def test_every_altered_bit_of_a_mask_is_found(tmp_path, read, bits):
    expected = np.random.default_rng(0).integers(0, 16, (16, 16))
    whole = png(expected.tolist(), bits)
    for bit in range(0, 8 * len(whole), 5):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        (tmp_path / "m.png").write_bytes(data)
        try:
            np.testing.assert_array_equal(read(tmp_path / "m.png"), expected)
        except UserError:
            continue


def oriented(path, pixels, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(4, 6), (5, 5)])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_mask_lies_on_its_image_or_is_refused(tmp_path, orientation, size, suffix):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    stored = np.zeros((*size, 3), np.uint8)
    stored[0, :2] = 255  # nothing maps this corner onto itself
    oriented(tmp_path / f"images/a.{suffix}", stored, orientation)
    upright = read_image(tmp_path / f"images/a.{suffix}")
    wanted = (upright[..., 0] > 0).astype(np.uint8)

    def found():
        example = Folder(tmp_path)[0]
        assert example["segments"].shape == example["image"].shape[:2]
        source = Folder(tmp_path)
        assert source.extent()[:2] == example["image"].shape[:2]
        return example["segments"]

    for mask in ((stored[..., 0] > 0).astype(np.uint8), wanted):
        Image.fromarray(mask).save(tmp_path / "masks/a.png")
        if orientation == 1 or (orientation > 4 and size[0] != size[1]):
            np.testing.assert_array_equal(found(), wanted)
        else:
            with pytest.raises(UserError, match=f"EXIF orientation {orientation}"):
                found()
    # A mask that says how it lies is believed.
    oriented(tmp_path / "masks/a.png", (stored[..., 0] > 0).astype(np.uint8), orientation)
    np.testing.assert_array_equal(found(), wanted)
    (tmp_path / "masks/a.png").write_bytes(encode_mask(wanted))
    np.testing.assert_array_equal(found(), wanted)
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "masks/a.png")
    with pytest.raises(UserError, match="9 x 9"):
        found()


@pytest.mark.parametrize(
    "highest, kind", [(0, np.uint8), (255, np.uint8), (256, np.uint16), (65535, np.uint16)]
)
def test_a_mask_is_encoded_in_as_few_bytes_as_it_needs(highest, kind):
    mask = np.array([[0, highest], [highest // 2, 0]], np.int32)
    stored = np.asarray(Image.open(io.BytesIO(encode_mask(mask))))
    assert stored.dtype == kind
    np.testing.assert_array_equal(stored, mask)


def test_a_mask_of_colours_is_turned_or_refused(tmp_path):
    colours = np.zeros((4, 6, 3), np.uint8)
    colours[0, :2, 0] = 7
    with pytest.raises(UserError, match="EXIF orientation 3"):
        Image.fromarray(colours).save(tmp_path / "m.png")
        turn_mask(colours, tmp_path / "m.png", tmp_path / "i.jpg", (4, 6), 3)
    turned = turn_mask(colours, tmp_path / "m.png", tmp_path / "i.jpg", (6, 4), 6)
    assert turned.shape == (6, 4, 3) and turned[:2, 3, 0].tolist() == [7, 7]


def test_images_are_listed_by_one_rule(tmp_path, caplog):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.PNG", "b.tif", "c.Jfif", "d.jp2", "e.gif", ".hidden.png", "._a.png"):
        kind = {"jfif": "JPEG"}.get(name.lower().split(".")[-1])
        Image.new("RGB", (8, 8)).save(images / name, kind)
    (images / "notes.txt").write_text("x")
    (images / "archive").write_text("x")
    (images / "g.heic").write_text("x")
    (images / "x.png").mkdir()
    (images / "y.png").symlink_to(images / "nowhere.png")
    (images / "z.png").symlink_to("z.png")
    os.mkfifo(images / "pipe.png")
    names = [path.name for path in list_images(images)]
    assert names == ["a.PNG", "b.tif", "c.Jfif", "d.jp2", "e.gif", "y.png", "z.png"]
    assert "1 .heic, 1 .txt, 2 folder, 2 hidden, 1 no suffix" in caplog.text
    for name in ("y.png", "z.png"):  # links that lead nowhere are complained of, not forgotten
        with pytest.raises(UserError, match=name):
            read_image(images / name)
    with pytest.raises(UserError, match="it is a folder"):
        read_image(images / "x.png")


def test_masks_are_listed_by_the_same_rule(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"images/{name}.png")
    mask = Image.fromarray(np.full((4, 4), 3, np.uint8))
    mask.save(tmp_path / "masks/a.PNG")
    mask.save(tmp_path / "masks/b.tif")
    assert [len(Folder(tmp_path)[k]["class_ids"]) for k in range(2)] == [1, 1]
    mask.save(tmp_path / "masks/a.bmp")
    with pytest.raises(UserError, match=r"both a\.PNG and a\.bmp"):
        Folder(tmp_path)
    for name in ("a.PNG", "a.bmp", "b.tif"):
        (tmp_path / "masks" / name).unlink()
    (tmp_path / "masks/a.npy").write_bytes(b"x")
    with pytest.raises(UserError, match="holds no readable mask"):
        Folder(tmp_path)


def test_hidden_folders_and_those_without_images_are_no_classes(tmp_path, caplog):
    for folder in ("train/red", "train/.ipynb_checkpoints", "val/red", "val/blue", "devkit/data", ".cache/x"):
        (tmp_path / folder).mkdir(parents=True)
        if folder.startswith(("train", "val")):
            Image.new("RGB", (4, 4)).save(tmp_path / folder / "1.TIFF")
    (tmp_path / "devkit/data/meta.mat").write_text("x")
    (tmp_path / "train/red/readme.md").write_text("x")
    source = ImageFolder(tmp_path, "train", num_classes=1)
    assert source.classes.names == (("blue",), ("red",)) and source.labels.tolist() == [1]
    assert "1 .md" in caplog.text
    (tmp_path / "names.txt").write_text("\ufeffred ball\nblue kite\ngreen frog\n")
    assert ImageFolder(tmp_path, "train", tmp_path / "names.txt").classes.names == (("ball",), ("kite",))


def test_twelve_bits_in_sixteen_are_said(tmp_path, caplog):
    Image.fromarray(np.full((4, 4), 4000, np.uint16)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").max() == 16
    assert "no value above 4000 of 65535" in caplog.text


def test_an_encoded_file_reads_as_the_file_does(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8)).save(path)
    encoded = Encoded("a.zip: a.png", path.read_bytes())
    assert np.array_equal(read_image(encoded), read_image(path))
    assert np.array_equal(read_mask(encoded), read_mask(path))
    assert read_header(encoded) == read_header(path) == ((6, 8), 1)
    with pytest.raises(UserError, match=r"the mask a\.zip: a\.png cannot be read: it is cut off"):
        read_mask(encoded._replace(data=encoded.data[:-20]))
