"""Image files: images, masks (whose pixel values are labels), and the listing of image folders.

Images are read as u8 [H W 3], upright and on white where they are transparent.
"""

import contextlib
import functools
import io
import logging
import os
import re
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Int32, Integer, UInt8, UInt16, UInt32
from PIL import Image, ImageFile, ImageOps

from ovseg_jax.errors import UserError
from ovseg_jax.reading import reading

_LOG = logging.getLogger(__name__)
# Formats that Pillow only identifies, or reads with another program.
_STUBS = ("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF")
_ORIENTATION = 0x0112  # EXIF's tag
# Pillow's lossless decoders; those of JPEG, WebP, AVIF and JPEG 2000 may change values.
_EXACT = ("zip", "raw", "libtiff", "packbits", "tiff_lzw", "bmp_rle")
_LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp")
_MASK_FORMATS = ("PNG", "TIFF", "BMP", "PPM")
_PNG = b"\x89PNG\r\n\x1a\n"
_END = b"\0\0\0\0IEND" + zlib.crc32(b"IEND").to_bytes(4, "big")
_GREY, _RGB, _PALETTE = 0, 2, 3  # types of colour in a PNG's header
_SOME = range(1 << 16)
# Chunks that change no stored value, with the lengths that Pillow accepts. An RGB picture may not have those that could
# turn it or make a colour transparent (eXIf, tEXt, tRNS).
_BESIDE_RGB = {
    **dict.fromkeys((b"bKGD", b"hIST", b"sBIT", b"tIME"), _SOME),
    **{b"PLTE": range(769), b"cHRM": _SOME[32:], b"gAMA": _SOME[4:], b"pHYs": _SOME[9:], b"sRGB": _SOME[1:]},
}
_BESIDE_GREY = _BESIDE_RGB | {b"eXIf": _SOME, b"tEXt": _SOME, b"tRNS": _SOME[2:]}
_BESIDE = {_GREY: _BESIDE_GREY, _RGB: _BESIDE_RGB, _PALETTE: _BESIDE_GREY | {b"tRNS": _SOME}}


class Encoded(NamedTuple):
    """The content of a file in memory, such as a member of an archive; the readers below take it in place of a path.

    Attributes:
      name: its name in errors.
      data: its bytes.
    """

    name: str
    data: bytes

    def __str__(self) -> str:
        return self.name


File = str | os.PathLike | Encoded
"""A file, by its path (local or of a bucket) or by its content."""


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Returns the lower-case suffixes of all files that Pillow can read by itself."""
    Image.init()
    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, kind in known if kind in Image.OPEN and kind not in _STUBS)


def list_images(folder: epath.PathLike) -> list[epath.Path]:
    """Lists the images of a folder by name: every suffix that Pillow reads, in any case, without hidden files.

    Other entries are counted, and the counts are logged.

    Raises:
      UserError: the folder cannot be read.
    """
    names, left_out = scan_images(folder)
    log_left_out(folder, left_out)
    return [epath.Path(folder) / name for name in names]


def scan_images(folder: epath.PathLike) -> tuple[list[str], Counter[str]]:
    """Returns the names of the images that `list_images` lists, and the number of other entries by kind.

    Raises:
      UserError: the folder cannot be read.
    """
    found: list[str] = []
    left_out: Counter[str] = Counter()
    with reading(folder, "the folder"):
        for name, is_file in _entries(epath.Path(folder)):
            if name.startswith("."):
                left_out["hidden"] += 1
            elif not is_file:
                left_out["folder"] += 1
            elif not _is_image(name):
                left_out[_suffix(name) or "no suffix"] += 1
            else:
                found.append(name)
    return sorted(found), left_out


def has_image(folder: epath.PathLike) -> bool:
    """Tells whether a folder holds an image that `list_images` would list.

    Raises:
      UserError: the folder cannot be read.
    """
    with reading(folder, "the folder"):
        return any(is_file and _is_image(name) for name, is_file in _entries(epath.Path(folder)))


def list_folders(folder: epath.PathLike) -> list[str]:
    """Lists the names of the folders in a folder, without hidden ones.

    Raises:
      UserError: the folder cannot be read.
    """
    with reading(folder, "the folder"):
        inside = epath.Path(folder).iterdir()
        return sorted(
            path.name for path in inside if not path.name.startswith((".", "__MACOSX")) and path.is_dir()
        )


def log_left_out(folder: epath.PathLike, left_out: Counter[str]) -> None:
    """Logs how many entries of a folder were left out, if any."""
    if left_out:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
        _LOG.warning("%s: ignored entries that are not readable images: %s", folder, kinds)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _is_image(name: str) -> bool:
    return not name.startswith(".") and _suffix(name) in image_suffixes()


def _entries(folder: epath.Path) -> Iterator[tuple[str, bool]]:
    """Yields the names in a folder, and whether each is a file; a broken link counts as a file."""
    if "://" in str(folder):
        # Each check in a bucket is a request, so only names without an image suffix are checked.
        for path in folder.iterdir():
            yield path.name, _is_image(path.name) or not path.is_dir()
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            linked = entry.is_symlink()
            real = os.path.isfile(entry.path) or not os.path.exists(entry.path) if linked else entry.is_file()
            yield entry.name, real


def read_image(image: Any) -> UInt8[np.ndarray, "h w 3"]:
    """Reads an image from a file, a PIL image or an array.

    Args:
      image: a path (local or of a bucket) or an `Encoded`; a PIL image of any mode; or an array [H W], [H W 1],
        [H W 3] or [H W 4] of uint8, of uint16 (divided by 257), or of floats in 0..1. EXIF rotation is applied.

    Raises:
      UserError: the file is missing, truncated or not an image, or the array is not of these forms.
    """
    if isinstance(image, str | os.PathLike | Encoded):
        return read_oriented(image)[0]
    if isinstance(image, Image.Image):
        with _decoding("the image"):
            return _from_pil(image, "the image")
    if hasattr(image, "__array__"):
        return _from_array(np.asarray(image))
    raise UserError(f"an image must be a path, a PIL image or an array, not a {type(image).__name__}")


def read_oriented(path: File) -> tuple[UInt8[np.ndarray, "h w 3"], int]:
    """Reads an image file, turned upright, and the EXIF orientation (1 to 8) of the stored image.

    Raises:
      UserError: the file is missing, damaged or not an image.
    """
    with _decoding(path, "the image"):
        data = _content(path)
        found = _decode_png(data, ((8, _RGB),))
        if found is not None:
            return found, 1
        image = _open(Encoded(str(path), data))
        orientation = _orientation(image)
        return _from_pil(image, str(path)), orientation


def read_header(path: File) -> tuple[tuple[int, int], int]:
    """Reads the height and width of an image after it is turned upright, and its EXIF orientation (1 to 8).

    Raises:
      UserError: the file is missing, damaged or not an image.
    """
    with _decoding(path, "the image"):
        image = _open(path)
        orientation, (width, height) = _orientation(image), image.size
        # Pillow already turns TIFFs.
        turned = orientation > 4 and image.format != "TIFF"
        return ((width, height) if turned else (height, width)), orientation


def check_image(path: File) -> tuple[int, int]:
    """Decodes an image, a JPEG at an eighth of its size, to find damage; returns the upright height and width.

    Raises:
      UserError: the file is missing, damaged or not an image.
    """
    size, _ = read_header(path)
    with _decoding(path, "the image"):
        image = _open(path, checksums=True)
        image.draft(None, (1, 1))
        image.load()
    return size


def read_mask(path: File) -> UInt8[np.ndarray, "h w"] | UInt16[np.ndarray, "h w"]:
    """Reads the stored values of a one-channel picture without loss (palette indices, or 1 to 16 bits).

    A picture of 32 bits is read too, if its values fit 16 bits.

    Args:
      path: a PNG, whose checksums are verified, or a TIFF, BMP or PGM.

    Returns:
      [H W] as uint8, or as uint16 if the file has 16 bits or more.

    Raises:
      UserError: the file is damaged, a colour picture, or in a lossy format.
    """
    with _decoding(path, "the mask"):
        pixels = _read_stored(path)
        if pixels.dtype != np.int32:
            return pixels
        if pixels.min(initial=0) < 0 or pixels.max(initial=0) > 65535:
            raise ValueError("it has values outside 0..65535")
        return pixels.astype(np.uint16)


def read_wide_mask(
    path: File,
) -> UInt8[np.ndarray, "h w"] | UInt16[np.ndarray, "h w"] | Int32[np.ndarray, "h w"]:
    """Reads a mask like `read_mask`, except that one of 32 bits keeps all its values, as int32.

    Raises:
      UserError: see `read_mask`.
    """
    with _decoding(path, "the mask"):
        return _read_stored(path)


def _read_stored(
    path: File,
) -> UInt8[np.ndarray, "h w"] | UInt16[np.ndarray, "h w"] | Int32[np.ndarray, "h w"]:
    data = _content(path)
    found = _decode_png(data, ((8, _GREY), (8, _PALETTE), (16, _GREY)))
    return _stored(_open(Encoded(str(path), data), checksums=True)) if found is None else found


def _decode_png(
    data: bytes, forms: Container[tuple[int, int]]
) -> UInt8[np.ndarray, "h w *c"] | UInt16[np.ndarray, "h w"] | None:
    """Decodes a PNG in a third of Pillow's time, to the same values.

    The Adler-32 checksum of the pixels is not compared, since the checksums of the chunks cover the same bytes.

    Args:
      data: a file of any kind.
      forms: the accepted pairs of bits and type of colour: of 8 bits, or grey of 16.

    Returns:
      The stored values, [H W] (the indices of a palette) or [H W 3]; None if Pillow has to read the file, or to find
      out why it cannot be read.
    """
    found = _pixels_of_png(data)
    if found is None or found[0] not in forms:
        return None
    (depth, kind), size, pixels = found
    import kornia_rs.io  # Here, since beside PyTorch it loads a part of CUDA.

    # Palette indices are stored like grey values.
    head = b"IHDR" + data[16:25] + bytes((_GREY if kind == _PALETTE else kind,)) + data[26:29]
    plain = b"".join((_PNG, data[8:12], head, zlib.crc32(head).to_bytes(4, "big"), pixels, _END))
    try:
        if kind == _RGB:
            return kornia_rs.io.decode_image_png_u8(plain, size, "rgb")
        decode = kornia_rs.io.decode_image_png_u16 if depth == 16 else kornia_rs.io.decode_image_png_u8
        return decode(plain, size, "mono")[..., 0]
    except BaseException as error:
        # The error of a panic in Rust is no Exception, and its class has no public name.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        return None


def _pixels_of_png(data: bytes) -> tuple[tuple[int, int], tuple[int, int], bytes] | None:
    """Finds the compressed pixels of a PNG that Pillow would read, unless the pixels themselves are damaged.

    Args:
      data: a file of any kind.

    Returns:
      Bits and type of colour, height and width, and the chunks of pixels as they are; None for any other file: with
      checksums that differ, other chunks or pixels in several places, interlaced, or of a size that Pillow may refuse.
    """
    if not data.startswith(_PNG):
        return None
    try:
        first, *chunks, _ = _png_chunks(data)
    except ValueError:
        return None
    width, height, depth, kind, *ways = struct.unpack(">IIBBBBB", data[16:29])
    if first != (b"IHDR", 8, 33) or any(ways) or not 0 < width * height <= (Image.MAX_IMAGE_PIXELS or 0):
        return None
    beside, pixels = _BESIDE.get(kind, {}), []
    for k, (name, start, end) in enumerate(chunks):
        if name == b"IDAT":
            pixels.append(k)
        elif end - start - 12 not in beside.get(name, ()):
            return None
    if not pixels or pixels[-1] - pixels[0] >= len(pixels):
        return None
    return (depth, kind), (height, width), data[chunks[pixels[0]][1] : chunks[pixels[-1]][2]]


def read_ids(path: File, what: str) -> UInt32[np.ndarray, "h w"]:
    """Reads the ids of COCO's panoptic PNGs, R + 256 G + 65536 B; the file has 8 bits a channel.

    Raises:
      UserError: the file is damaged, or not such a PNG.
    """
    flat = read_colours(path, what)
    found = np.empty(flat.shape[:2], np.uint32)
    # Reads four bytes at each pixel of three; the fourth, of the next pixel, is masked out.
    four = np.ndarray(found.size - 1, "<u4", np.ascontiguousarray(flat).data, 0, (3,))
    np.bitwise_and(four, 0xFFFFFF, out=found.reshape(-1)[:-1])
    found[-1, -1] = int.from_bytes(flat[-1, -1].tobytes(), "little")
    return found


def read_colours(path: File, what: str) -> UInt8[np.ndarray, "h w 3"]:
    """Reads the stored colours of a PNG with 8 bits a channel.

    Raises:
      UserError: the file is damaged, or not such a PNG.
    """
    with _decoding(path, what):
        data = _content(path)
        found = _decode_png(data, ((8, _RGB),))
        if found is not None:
            return found
        file = _open(Encoded(str(path), data), checksums=True)
        if file.format != "PNG" or _raw_mode(file) not in ("RGB", "RGBA", "P", "P;1", "P;2", "P;4"):
            raise ValueError(f"it is {file.format} of mode {_raw_mode(file)}, not a PNG of 8-bit colours")
        file.info.pop("transparency", None)  # colours count also where they are transparent
        image = file.convert("RGB") if file.mode == "P" else file
        return np.ascontiguousarray(np.asarray(image)[..., :3])


def encode_image(image: Image.Image | np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    """Encodes a picture or its pixels in a format that Pillow knows, with options of Pillow's `Image.save`."""
    content = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(content, form, **options)
    return content.getvalue()


def encode_mask(mask: Integer[np.ndarray, "h w"]) -> bytes:
    """Encodes a mask as a PNG, in 8 bits if no value exceeds 255, else in 16.

    Its EXIF orientation is 1, so that `turn_mask` knows that it is upright.
    """
    exif = Image.Exif()
    exif[_ORIENTATION] = 1
    return encode_image(mask.astype(np.uint16 if mask.max() > 255 else np.uint8), exif=exif)


def turn_mask(
    mask: np.ndarray,
    mask_path: File,
    image_path: File,
    upright: tuple[int, ...],
    orientation: int,
) -> np.ndarray:
    """Returns a mask turned upright, to match its image after that is turned upright.

    A mask may have been drawn on the image as stored, or on the upright image; only the sizes show which. A mask of the
    stored image's size is turned like the image, one of the upright size is not. A PNG with an EXIF orientation of its
    own is turned by that.

    Args:
      mask: the content of `mask_path`, [H W] or [H W C].
      mask_path: the file, for errors and for its own orientation.
      image_path: the image's file, for errors.
      upright: height and width of the upright image.
      orientation: the EXIF orientation of the image, 1 to 8.

    Raises:
      UserError: the mask has another size, or the size does not show how it is oriented.
    """
    stored, own = upright[::-1] if orientation > 4 else upright, 1
    if orientation != 1:
        with _decoding(mask_path, "the mask"):
            picture = _open(mask_path)
            own = picture.getexif().get(_ORIENTATION, 0) if picture.format == "PNG" else 0
        if own not in range(1, 9):
            if stored == upright == mask.shape[:2]:
                raise UserError(
                    f"the image {image_path} has the EXIF orientation {orientation}, but it is unclear whether its "
                    f"mask {mask_path} must be turned as well: save the image upright"
                )
            own = orientation if mask.shape[:2] == stored else 1
    flips = {2: "x", 3: "xy", 4: "y", 5: "t", 6: "tx", 7: "txy", 8: "ty"}.get(own, "")
    mask = mask.swapaxes(0, 1) if "t" in flips else mask
    mask = mask[:, ::-1] if "x" in flips else mask
    mask = mask[::-1] if "y" in flips else mask
    if mask.shape[:2] != upright:
        exif = f"; the image has the EXIF orientation {orientation}" if orientation != 1 else ""
        raise UserError(
            f"the mask {mask_path} is {mask.shape[0]} x {mask.shape[1]} (height x width) but its image is "
            f"{upright[0]} x {upright[1]}{exif}"
        )
    return mask


def _content(path: File) -> bytes:
    if isinstance(path, Encoded):
        return path.data
    # A local path needs no epath, which takes as long as reading a small file.
    if "://" in os.fspath(path):
        return epath.Path(path).read_bytes()
    with open(path, "rb") as file:
        return file.read()


def _open(path: File, checksums: bool = False) -> ImageFile.ImageFile:
    """Opens a picture and reads its header."""
    data = _content(path)
    if checksums and data.startswith(_PNG):
        for _ in _png_chunks(data):
            pass
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large photographs are allowed
        return Image.open(io.BytesIO(data))


@contextlib.contextmanager
def _decoding(path: Any, what: str = "") -> Iterator[None]:
    """Turns errors into UserErrors as `reading` does, including Pillow's own."""
    with reading(path, what):
        try:
            yield
        except Image.UnidentifiedImageError:
            raise ValueError("it is not an image that Pillow can read") from None
        except Image.DecompressionBombError as error:
            raise ValueError(f"it is too large ({error}): cut it into pieces") from None


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields kind, start and end of every chunk, and verifies its checksum; Pillow only verifies the header's."""
    at, kind = 8, b""
    while kind != b"IEND":
        length = int.from_bytes(data[at : at + 4], "big")
        kind, end = data[at + 4 : at + 8], at + 8 + length
        if end + 4 > len(data):
            raise ValueError("it is cut off")
        if zlib.crc32(memoryview(data)[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise ValueError(f"it is damaged: the checksum of its chunk {kind!r} differs")
        yield kind, at, end + 4
        at = end + 4


def _orientation(image: ImageFile.ImageFile) -> int:
    # Pillow would decode all pixels of a PNG to find out that it has no orientation.
    if image.format == "PNG" and isinstance(image.fp, io.BytesIO):
        data = image.fp.getvalue()
        if not any(mark in data for mark in (b"eXIf", b"exif", b"XML:com.adobe")):
            return 1
    found = image.getexif().get(_ORIENTATION, 1)
    return found if found in range(1, 9) else 1


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """Returns Pillow's name for the pixel format of the file."""
    args = image.tile[0][3] if image.tile else ""
    return str(args if isinstance(args, str) else next(iter(args or ()), ""))


def _stored(
    image: ImageFile.ImageFile,
) -> UInt8[np.ndarray, "h w"] | UInt16[np.ndarray, "h w"] | Int32[np.ndarray, "h w"]:
    """Decodes the stored values of a picture; Pillow would scale some to 0..255."""
    if getattr(image, "n_frames", 1) > 1:
        raise ValueError(f"it holds {image.n_frames} pictures, but a mask has one")  # type: ignore[attr-defined]
    codec, raw = (image.tile[0][0] if image.tile else ""), _raw_mode(image)
    lossy = codec not in _EXACT or image.info.get("compression") in _LOSSY_TIFF
    if image.format not in _MASK_FORMATS or lossy:
        raise ValueError(f"the format {image.format} may change a mask's values: save it as PNG")
    if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
        raise ValueError(f"it is a picture of mode {image.mode}: save it with one channel, 8 or 16 bits")
    pixels = np.asarray(image)
    if image.mode.startswith("I"):
        # Mode I holds 32 bits, or the 16 bits of a PGM.
        return pixels.astype(np.int32 if raw.startswith("I;32") else np.uint16)
    form = re.fullmatch(r"(?:1|L|P)(?:;([124]))?R?", raw)
    if form is None or pixels.ndim != 2:
        raise ValueError(f"it stores its pixels as {raw!r}: save it with one channel, 8 or 16 bits")
    # Pillow scales grey values of 2 and 4 bits to 0..255.
    step = {"2": 85, "4": 17}.get(form[1] or "", 1) if image.mode == "L" else 1
    pixels = pixels.astype(np.uint8, copy=False)
    return pixels // np.uint8(step) if step > 1 else pixels


def _from_pil(image: Image.Image, name: str) -> UInt8[np.ndarray, "h w 3"]:
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        highest = values.max(initial=0)
        if image.mode == "F" or highest > 65535 or values.min(initial=0) < 0:
            raise UserError(
                f"{name} has pixels of mode {image.mode!r}, outside the range of a picture: convert it to 8 or 16 bits"
            )
        if 0 < highest < 4096:
            _warn_dark(os.path.dirname(name), os.path.basename(name), int(highest))
        return _from_array(values.astype(np.uint16))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


def _warn_dark(folder: str, name: str, highest: int) -> None:
    """Logs, once for each folder, that images with 12 bits stored in 16 come out dark."""
    warned = _dark_folders()
    if folder not in warned:
        warned.add(folder)
        _LOG.warning(
            "%s has 16 bits a pixel but no value above %d of 65535, so it is read as nearly black: if it should be "
            "brighter, scale the values of all images in its folder",
            os.path.join(folder, name),
            highest,
        )


@functools.cache
def _dark_folders() -> set[str]:
    return set()


def _from_array(array: np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        raise UserError(
            f"an image array must have the shape [H W], [H W 1], [H W 3] or [H W 4], not {list(array.shape)}"
        )
    if array.dtype == np.uint16:
        # A lookup table, since floats would take gigabytes for a hundred megapixels.
        array = np.round(np.arange(1 << 16) / 257).astype(np.uint8)[array]
    elif np.issubdtype(array.dtype, np.floating):
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= 1):  # also false for NaN
            raise UserError(f"an image array of floats must have values in 0..1, not {low:g}..{high:g}")
        array = np.round(array * 255)
    elif array.dtype != np.uint8:
        raise UserError(f"an image array must hold uint8, uint16 or floats in 0..1, not {array.dtype}")
    array = array.astype(np.uint8)
    if array.shape[-1] == 4:
        return _from_pil(Image.fromarray(array), "the image")
    return np.array(np.broadcast_to(array, (*array.shape[:2], 3)))


def fit_canvas(
    image: UInt8[np.ndarray, "h w 3"], size: int
) -> tuple[UInt8[np.ndarray, "s s 3"], tuple[int, int]]:
    """Scales an image to fit an S x S canvas, at its top left; returns the canvas and (height, width) there.

    The aspect is kept: both sides are scaled by min(S/h, S/w), bilinearly. The rest is padding, which methods zero
    after normalisation (as OpenSeg's demo does).
    """
    height, width = image.shape[:2]
    scale = min(size / height, size / width)
    fitted = (max(1, round(height * scale)), max(1, round(width * scale)))
    if fitted != (height, width):
        image = np.asarray(Image.fromarray(image).resize(fitted[::-1], Image.Resampling.BILINEAR))
    canvas = np.zeros((size, size, 3), np.uint8)
    canvas[: fitted[0], : fitted[1]] = image
    return canvas, fitted


def centre_square(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "s s 3"]:
    """Resizes the shorter side to S, bicubically, and crops the centre to S x S, as CLIP's preprocessing does."""
    height, width = image.shape[:2]
    short = min(height, width)
    scaled = (size * height // short, size * width // short)
    if scaled != (height, width):
        image = np.asarray(Image.fromarray(image).resize(scaled[::-1], Image.Resampling.BICUBIC))
    # Halves are rounded to even, as in torchvision.
    top, left = (round((length - size) / 2) for length in scaled)
    return image[top : top + size, left : left + size]


def colour(name: str, fill: Sequence[float]) -> UInt8[np.ndarray, "3"]:
    """Checks the `fill` colour in the config of the source `name` and returns it as u8 [3].

    Raises:
      UserError: it is not three numbers from 0 to 255.
    """
    if len(fill) != 3 or not all(0 <= x <= 255 for x in fill):
        raise UserError(f"{name}: fill={tuple(fill)} is not three numbers from 0 to 255")
    return np.round(np.asarray(fill, np.float64)).astype(np.uint8)
