"""Locations of published weights: a local file or folder, or a repository on the Hugging Face hub.

    /local/folder             a folder of Hugging Face, timm or open_clip; or a file of any format of `files`
    hf:owner/name             that repository of the hub
    timm:name                 the hub's timm/name
    openai:/path/ViT-B-16.pt  a file, as OpenAI published CLIP
    open_clip:/path, open_clip:owner/name
    big_vision:/path.npz      see `big_vision`
    gs://bucket/folder        a folder or file in a bucket, such as a run's copies; a temporary copy of it is read

A prefix only gives the location; the format of the arrays is recognised from their names (`load`).
"""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from etils import epath

from ovseg_jax.errors import UserError
from ovseg_jax.pretrained.files import NAMES

_PREFIXES = ("hf", "timm", "openai", "open_clip", "big_vision")
# Further files to download: configs and tokenisers.
_COMPANIONS = (
    "config.json",
    "open_clip_config.json",
    "preprocessor_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "spiece*",
)


def find(init: str) -> Path:
    """Returns the local path of weights, after downloading them from the hub if needed.

    Raises:
      UserError: there is no such file or repository, the prefix is unknown, huggingface_hub is not installed, or the
        download fails.
    """
    if "://" in init:
        path = on_disk(init)
        if not path.exists():
            raise UserError(f"init={init}: no such file or folder")
        return path
    kind, colon, name = init.partition(":")
    if not colon:
        kind, name = "", init
    elif kind not in _PREFIXES:
        raise UserError(
            f"init={init} is neither a path nor of the form {', '.join(f'{p}:...' for p in _PREFIXES)}"
        )
    path = Path(name).expanduser()
    if path.exists():
        return path
    if (
        kind in ("", "openai", "big_vision")
        or name.startswith(("/", ".", "~"))
        or path.suffix in (".npz", ".pt")
    ):
        raise UserError(f"init={init}: no such file or folder: {path}")
    return _download(init, f"timm/{name}" if kind == "timm" else name)


def on_disk(path: epath.PathLike) -> Path:
    """Returns a local path: the path itself, or that of a temporary copy of one that exists in a bucket.

    The copy of a folder has its files, not its folders. It is removed when the process ends.
    """
    place = str(epath.Path(path))
    return Path(_copied(place)) if "://" in place and epath.Path(place).exists() else Path(place)


@functools.cache
def _copied(place: str) -> str:
    source, folder = epath.Path(place), Path(tempfile.mkdtemp(prefix="ovseg_jax-"))
    atexit.register(shutil.rmtree, folder, True)
    inside = source.is_dir()
    for file in source.iterdir() if inside else (source,):
        if not file.is_dir():
            (folder / file.name).write_bytes(file.read_bytes())
    return str(folder if inside else folder / source.name)


def _download(init: str, repository: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise UserError(
            f"init={init} is on the Hugging Face hub: pip install huggingface_hub, or give a local folder"
        ) from error
    try:
        # Other formats are only downloaded if there is no safetensors file.
        patterns = [*_COMPANIONS, "*.safetensors", "*.safetensors.index.json"]
        folder = Path(snapshot_download(repository, allow_patterns=patterns))
        if not any((folder / name).exists() for name in NAMES):
            folder = Path(
                snapshot_download(repository, allow_patterns=[*_COMPANIONS, "*.bin", "*.bin.index.json"])
            )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"init={init}: {repository} cannot be downloaded from the Hugging Face hub ({first}): download it on a "
            "machine with network access, and give the folder instead"
        ) from error
    return folder
