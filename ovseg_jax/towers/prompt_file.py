"""Files of learned prompts: a safetensors format of ours, and the checkpoints of POMP's authors.

    prompt.safetensors                ours: `context` [M d], or [N M d] with a context for each class; metadata
                                      `format`, `position`, `tower`, `anchor` (JSON, see `Prompt`) and, with a context
                                      for each class, `names` (JSON)
    prompt_learner/model.pth.tar-20   theirs (amazon-science/prompt-pretraining, trainers/pomp.py; CoOp's are alike),
                                      of PyTorch: {"state_dict": {"ctx": [M d] or [N M d], ...}, "epoch": 20, ...}

Their format does not hold the position of the context; by their convention the path does, as in
`nctx16_cscFalse_ctpend`.
"""

import dataclasses
import json
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from jaxtyping import Float

from ovseg_jax.errors import UserError, optional
from ovseg_jax.pretrained.files import read_arrays, read_metadata, write_safetensors
from ovseg_jax.pretrained.hub import on_disk
from ovseg_jax.reading import array, number, parse_json, reading, short, text, texts
from ovseg_jax.towers.prompt_layout import POSITIONS, Layout, NameTokens
from ovseg_jax.vocab.classes import rows_of_names
from ovseg_jax.vocab.tokenizers import PieceTokenizer

FILE = "prompt.safetensors"
ANCHOR = 8  # number of values of a text tower that are saved with a prompt
# The largest difference between two precisions of the same weights, as a share of the largest value.
_ROUNDING = 0.01
_FORMAT = "ovseg_jax.prompt"
_FLOATS = (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)
_ORIGINAL = re.compile(r"\.pth\.tar(-\d+)?$")
# Ignored, as by their `load_model`: token vectors of the class names of the training.
_IGNORED = re.compile(r"((train|test)_)?token_(prefix|suffix)")


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """A learned prompt.

    Attributes:
      context: token vectors, [1 M d] shared by all classes, or [N M d] for each of N classes.
      layout: the position of the context.
      names: the names of each of the N classes with contexts of their own; () for a shared context, or if the file does
        not list them.
      tower: the name of the text tower that it was learned for, if known.
      source: the file that it was read from.
      anchor: the first values of that tower's position table, which identify it, since towers of one width have equal
        shapes; () if the file does not state them.
    """

    context: Float[Any, "n m d"]
    layout: Layout
    names: tuple[tuple[str, ...], ...] = ()
    tower: str = ""
    source: str = ""
    anchor: tuple[float, ...] = ()

    def check_width(self, width: int) -> None:
        """Raises a UserError if the vectors do not fit a text tower of that width."""
        if self.context.shape[-1] != width:
            learned = f", learned for {self.tower!r}," if self.tower else ""
            raise UserError(
                f"the prompt {self.source}{learned} has vectors of {self.context.shape[-1]} numbers; those of the text "
                f"tower have {width}"
            )

    def check_tower(self, anchor: Sequence[float]) -> None:
        """Raises a UserError if the prompt was learned for another text tower than the one with this anchor."""
        if not self.anchor:
            return
        apart = max(abs(a - b) for a, b in zip(anchor, self.anchor, strict=False))
        if apart > _ROUNDING * max(map(abs, self.anchor)):
            learned, own = f" ({self.tower!r})" if self.tower else "", f"the prompt {self.source}".rstrip()
            raise UserError(
                f"{own} was learned for another text tower{learned} of the same width, and cannot be used "
                "with this one"
            )

    def tokens(self, tokenizer: PieceTokenizer, names: Sequence[str]) -> NameTokens:
        """Tokenises names under this prompt.

        Raises:
          UserError: a name is not one of the classes with contexts of their own; and see `Layout.tokens`.
        """
        tokens = self.layout.tokens(tokenizer, names)
        return tokens._replace(row=self.rows(names)) if self.layout.specific else tokens

    def rows(self, names: Sequence[str]) -> np.ndarray:
        """Returns the index of the context for each name.

        Raises:
          UserError: the file does not list the names; and see `rows_of_names`.
        """
        if not self.names:
            raise UserError(
                f"the prompt {self.source} has a context for each of {len(self.context)} classes, but not their names"
            )
        return rows_of_names(self.names, names, f"the prompt {self.source}".rstrip())


def is_prompt_file(value: Any) -> bool:
    """Tells whether a text is the path of a prompt file, by its suffix."""
    return isinstance(value, str) and (value.endswith(".safetensors") or bool(_ORIGINAL.search(value)))


def save_prompt(path: epath.PathLike, prompt: Prompt) -> None:
    """Writes a prompt in our format."""
    context = np.asarray(prompt.context, np.float32)
    metadata = {"format": _FORMAT, "position": prompt.layout.position, "tower": prompt.tower}
    if prompt.anchor:
        metadata["anchor"] = json.dumps(prompt.anchor)
    if prompt.layout.specific:
        metadata["names"] = json.dumps(prompt.names, ensure_ascii=False)
    write_safetensors(path, {"context": context if prompt.layout.specific else context[0]}, metadata)


def load_prompt(path: epath.PathLike) -> Prompt:
    """Reads a prompt in either format.

    Raises:
      UserError: there is no such file, or it is damaged or not a prompt.
    """
    path = on_disk(path)
    if not path.is_file():
        raise UserError(f"there is no prompt file {path}")
    if _ORIGINAL.search(path.name):
        metadata = {"position": _position(path)}
        context = _original(path)
    else:
        arrays = read_arrays(path)
        metadata = read_metadata(path)
        if metadata.get("format") != _FORMAT or arrays.keys() != {"context"}:
            raise UserError(
                f"{path} is not a prompt: it holds {_listed(arrays)} instead of a single 'context'"
            )
        context = arrays["context"]
    with reading(path, "the prompt"):
        if context.ndim not in (2, 3) or 0 in context.shape or context.dtype not in _FLOATS:
            raise ValueError(
                f"'context' must be floats of shape [M d] or [N M d], not {context.dtype} of {list(context.shape)}"
            )
        if not np.isfinite(context := np.array(context, np.float32)).all():
            raise ValueError("'context' holds numbers that are not finite")
        position = metadata.get("position")
        if position not in POSITIONS:
            raise ValueError(f"its 'position' is {short(position)}, not one of {', '.join(POSITIONS)}")
        names = tuple(tuple(texts(array(own, "'names'"), "'names'")) for own in _listing(metadata, "names"))
        anchor = tuple(number(x, "an entry of 'anchor'") for x in _listing(metadata, "anchor"))
        if not all(names):
            raise ValueError("'names' is not a list of the names of each class")
        if names and (context.ndim == 2 or len(names) != len(context)):
            raise ValueError(
                f"'names' has {len(names)} classes, but 'context' has the shape {list(context.shape)}"
            )
        tower = text(metadata.get("tower", ""), "'tower'")
    layout = Layout(context.shape[-2], position, specific=context.ndim == 3)
    rows = context.reshape(-1, *context.shape[-2:])
    return Prompt(rows, layout, names, tower, str(path), anchor)


def save_original(path: str | Path, prompt: Prompt) -> None:
    """Writes a prompt in the authors' format, for their `load_model` and their tool that writes Detic's vectors.

    It is in half precision, as their code trains it and that tool computes. Names are lost; the position is only kept
    in the path, as in their convention.

    Raises:
      UserError: PyTorch is missing, or the path states another position.
    """
    if (position := prompt.layout.position) != _position(path):
        raise UserError(
            f"{path} would be read as a prompt with position {_position(path)}, but this one has {position}: name the "
            f"folder after the position, as in nctx{prompt.layout.length}_ctp{position}/{Path(path).name}"
        )
    torch = _torch(path)
    context = np.asarray(prompt.context, np.float16)
    ctx = torch.from_numpy(context if prompt.layout.specific else context[0].copy())
    rest = dict.fromkeys(("optimizer", "scheduler", "val_result"))
    with Path(path).open("wb") as file:  # PyTorch's own error would not be an OSError.
        torch.save({"state_dict": OrderedDict(ctx=ctx), "epoch": 0, **rest}, file)


def _position(path: str | Path) -> str:
    """Returns the position of a prompt in the authors' format, from its path."""
    return ["end", *re.findall(r"ctp(end|middle|front)", str(path))][-1]


def _original(path: Path) -> Float[np.ndarray, "..."]:
    """Reads `ctx` of a checkpoint in the authors' format."""
    torch = _torch(path)
    schedules = torch.optim.lr_scheduler
    # Beside the tensors, the file holds a schedule object, and in it the optimizer with its defaultdict.
    known = [schedules.CosineAnnealingLR, schedules.MultiStepLR, schedules.StepLR, torch.optim.SGD, dict]
    known.append((lambda *_: {}, "collections.defaultdict"))
    with reading(path, "the checkpoint of a prompt"):
        try:
            with torch.serialization.safe_globals(known):
                found = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, KeyError) as error:
            raise ValueError("it is not a checkpoint of a prompt, or holds further objects") from error
        state = found["state_dict"]
        ctx = state["ctx"].float().numpy()
    if other := [name for name in state if name != "ctx" and not _IGNORED.fullmatch(str(name))]:
        raise UserError(
            f"{path} holds more than a prompt, and 'ctx' cannot be used without the rest: {_listed(other)}"
        )
    return ctx


def _torch(path: str | Path) -> Any:
    return optional("torch", f"{path} is a file of PyTorch: pip install torch")


def _listing(metadata: Mapping[str, str], key: str) -> list[Any]:
    """Parses the JSON list under a key of the metadata; [] if it is missing."""
    return array(parse_json(metadata.get(key, "[]")), f"its {key!r}")


def _listed(names: Iterable[str]) -> str:
    some = list(map(str, names))
    return ", ".join(some[:4]) + (", ..." if len(some) > 4 else "") or "nothing"
