"""Where published weights come from: a local file or folder, or a name on the Hugging Face hub.

    /local/folder             a folder of Hugging Face, timm or open_clip; or a file of any format of `files`
    hf:owner/name             that repository of the hub
    timm:name                 the hub's timm/name
    openai:/path/ViT-B-16.pt  a file, as OpenAI published CLIP
    open_clip:/path, open_clip:owner/name
    big_vision:/path.npz      see `big_vision`

What a prefix names is only the place; whose names and layouts the arrays have, is seen in them (`load`).
"""

from pathlib import Path

from ovseg_jax.errors import UserError
from ovseg_jax.pretrained.files import NAMES

_PREFIXES = ("hf", "timm", "openai", "open_clip", "big_vision")
# Beside the weights: what they are, and tokenisers.
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
    """Finds the local path of weights; what lies on the hub is downloaded into its cache once.

    Raises:
      UserError: no such file; an unknown prefix; no huggingface_hub, no network, no such repository.
    """
    kind, colon, name = init.partition(":")
    if not colon:
        kind, name = "", init
    elif kind not in _PREFIXES:
        raise UserError(f"init={init}: known are a path, {', '.join(f'{p}:...' for p in _PREFIXES)}")
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


def _download(init: str, repository: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise UserError(
            f"init={init} comes from the Hugging Face hub: pip install huggingface_hub, or give a local folder"
        ) from error
    try:
        # One format is enough: with safetensors there, nobody needs the rest.
        patterns = [*_COMPANIONS, "*.safetensors", "*.safetensors.index.json"]
        folder = Path(snapshot_download(repository, allow_patterns=patterns))
        if not any((folder / name).exists() for name in NAMES):
            folder = Path(
                snapshot_download(repository, allow_patterns=[*_COMPANIONS, "*.bin", "*.bin.index.json"])
            )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"init={init}: {repository} cannot be had from the Hugging Face hub ({first}); download it where there is "
            "a network, and give the folder instead"
        ) from error
    return folder
