"""Tokenisers of published text towers, read from their files.

  clip       byte-level BPE of CLIP: bpe_simple_vocab_16e6.txt.gz, vocab.json with merges.txt, or tokenizer.json
  wordpiece  lower-case BERT: vocab.txt or tokenizer.json
  siglip     SentencePiece of SigLIP: *.model or tokenizer.json; lower case, punctuation removed
  siglip2    SentencePiece of SigLIP 2 (Gemma's vocabulary): the same files; lower case
  tips       SentencePiece of TIPS: the same files; lower case, without an end

Special tokens inside a text have no meaning: "<|endoftext|>" or "[SEP]" in a caption are split like any other letters.
"""

import gzip
import html
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from etils import epath
from jaxtyping import Bool, Int

from ovseg_jax.errors import UserError, optional
from ovseg_jax.files import record, verify
from ovseg_jax.reading import read_json, read_text, reading, reason, short, texts, whole

# Upper limit of a file's unpacked bytes (CLIP's has 3 MB) and of ids (Gemma has 256,000).
_LARGEST = 1 << 26
_LONGEST = 1000  # letters of a piece
# BERT takes up to 512 tokens; 64 suffice for names and captions.
LENGTHS = {"clip": 77, "wordpiece": 64, "siglip": 64, "siglip2": 64, "tips": 64}
BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
# The folder in a run for a copy of a published tokeniser, or of another run's words.
TOKENIZER = "tokenizer"

_CLIP_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
_CLIP_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
# CLIP uses the first 48,894 merges of the file; with 2 x 256 bytes and 2 special tokens that makes 49,408 ids.
_CLIP_MERGES = 49152 - 256 - 2


class Tokenizer(Protocol):
    """The interface of a tokeniser: texts to token ids of one length.

    Attributes:
      length: tokens in each row.
      vocab_size: the number of ids; all ids are smaller.
    """

    length: int
    vocab_size: int

    def __call__(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "n l"], Bool[np.ndarray, "n l"]]:
        """Returns the token ids i32 [n L] and a mask, False at padding."""
        ...


@dataclass(eq=False)
class PieceTokenizer:
    """A tokeniser whose rows are start, pieces, end and padding; long texts lose their last pieces.

    Attributes:
      clean: normalises a text before it is split.
      encode: returns the ids of the pieces of a normalised text.
      start: ids at the start of each row.
      end: id after the pieces; None for none.
      pad: id that fills a row.
      length: tokens in each row.
      vocab_size: the number of ids; all ids are smaller.
      files: the files that it was read from.
    """

    clean: Callable[[str], str]
    encode: Callable[[str], list[int]]
    start: tuple[int, ...]
    end: int | None
    pad: int
    length: int
    vocab_size: int
    files: tuple[Path, ...] = ()

    def save(self, folder: epath.PathLike) -> None:
        """Copies its files, with their checksums, into a folder, which is created if missing."""
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.files:
            (folder / file.name).write_bytes(file.read_bytes())
            record(folder / file.name)

    def __call__(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "n l"], Bool[np.ndarray, "n l"]]:
        """Returns the token ids i32 [n L] and a mask, False at padding.

        Raises:
          UserError: a single text was given in place of a list.
        """
        if isinstance(texts, str):
            raise UserError(f"a tokenizer takes a list of texts, not one text: {texts!r}")
        ids = np.full((len(texts), self.length), self.pad, np.int32)
        valid = np.zeros(ids.shape, bool)
        for i, text in enumerate(texts):
            # The libraries refuse lone surrogates, which damaged JSON may hold.
            whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            end = () if self.end is None else (self.end,)
            pieces = self.encode(self.clean(whole))[: self.length - len(self.start) - len(end)]
            row = [*self.start, *pieces, *end]
            ids[i, : len(row)], valid[i, : len(row)] = row, True
        return ids, valid


def load_tokenizer(source: str | Path, kind: str | None = None, length: int | None = None) -> PieceTokenizer:
    """Loads a published tokeniser.

    Args:
      source: a file, or a folder that holds one; `pretrained.hub.find` downloads folders from the hub.
      kind: clip, wordpiece, siglip, siglip2 or tips; None recognises it from the files, except a tokeniser of TIPS
        whose file has an end token, which is read as SigLIP's.
      length: tokens in each row; None takes the published model's, see LENGTHS.

    Raises:
      UserError: there is no such file, it is of another kind, or a package is not installed.
    """
    if kind not in (None, *LENGTHS):
        raise UserError(f"the tokenizer kind={kind} is not one of {', '.join(LENGTHS)}")
    if length is not None and length < 3:
        raise UserError(f"the tokenizer length={length} is less than 3: start, one piece and end")
    path = Path(source)
    if not path.exists():
        raise UserError(f"no such file or folder: {path}")
    file = _find(path, kind) if path.is_dir() else path
    both = ("vocab.json", "merges.txt")
    files = tuple(map(file.with_name, both)) if file.name in both else (file,)
    with reading(file, "the tokenizer"):
        for each in files:
            verify(each)
        if (found := _load(file, kind, length)) is not None:
            _made(found, ["a red ball \U0001f388"])  # Some faults of a file only show when a text is split.
            found.files = files
            return found
    raise UserError(
        f"{file} is not a tokenizer file: those are *.model, {BPE_FILE}, vocab.json, vocab.txt, tokenizer.json"
    )


def _load(file: Path, kind: str | None, length: int | None) -> PieceTokenizer | None:
    """Loads the tokeniser of a file; returns None if its name is not that of a tokeniser."""
    if file.suffix == ".model":
        return _sentencepiece(file, kind, length)
    if file.name.endswith(".gz") or file.name in ("vocab.json", "merges.txt"):
        _agree(file, kind, "clip")
        return _clip(*_read_bpe(file), file, length)
    if file.suffix == ".txt":
        _agree(file, kind, "wordpiece")
        words = read_text(file).split("\n")
        return _wordpiece({word: i for i, word in enumerate(words) if word}, file, length)
    return _tokenizer_json(file, kind, length) if file.suffix == ".json" else None


def keep_tokenizer(tokenizer: PieceTokenizer, workdir: epath.Path) -> None:
    """Saves a tokeniser as `TOKENIZER` in a run's folder, whole or not at all, unless there is one."""
    folder, part = workdir / TOKENIZER, workdir / f"{TOKENIZER}.part"
    if folder.exists():
        return
    if part.exists():
        part.rmtree()
    tokenizer.save(part)
    part.rename(folder)


def clean_clip(text: str) -> str:
    """Normalises a text as CLIP's tokeniser does before splitting it.

    OpenAI's code runs ftfy, whose result depends on its version. This function always does the same part of it: curly
    quotes are straightened, ligatures and full-width forms resolved, control characters dropped, and NFC applied. Text
    in a wrong encoding ("â€™") is not repaired.
    """
    text = html.unescape(html.unescape(text)).translate(_MENDED)
    return " ".join(unicodedata.normalize("NFC", text).split()).lower()


def clean_siglip(text: str) -> str:
    """Normalises a text as big_vision does: lower case, `_` to a space, no other ASCII punctuation."""
    return " ".join(text.translate(_NO_PUNCTUATION).lower().split())


_NO_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))
_LIGATURES = (0x132, 0x133, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB05), 0xFB06)
_CONTROLS = (*range(9), 0xB, *range(0xE, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD))
_QUOTES: dict[str, str | None] = {**dict.fromkeys("ʼ‘’‚‛", "'"), **dict.fromkeys("“”„‟", '"')}
_MENDED: dict[int, str | None] = {
    **{c: unicodedata.normalize("NFKC", chr(c)) for c in (*_LIGATURES, *range(0xFF01, 0xFFF0), 0x3000)},
    **str.maketrans({**_QUOTES, "ŉ": "'n", "ﬅ": "ſt"}),
    **dict.fromkeys(_CONTROLS),
}


def _encode(model: Any, text: str) -> list[int]:
    return model.encode(text, add_special_tokens=False).ids


_SIGLIP_CLEAN: dict[str, Callable[[str], str]] = {
    "siglip": clean_siglip,
    "siglip2": str.lower,
    "tips": str.lower,
}


def _clip(
    vocab: dict[str, int], merges: list[tuple[str, str]], file: Path, length: int | None
) -> PieceTokenizer:
    library, vocab = _require("tokenizers"), _checked(vocab)
    missing = [piece for piece in (*_CLIP_SPECIALS, *_alphabet(library)) if piece not in vocab]
    if missing:
        raise UserError(f"{file} is not CLIP's vocabulary: it lacks {', '.join(missing[:4])}")
    model = library.Tokenizer(_made(library.models.BPE, vocab, merges, end_of_word_suffix="</w>"))
    split = library.pre_tokenizers.Split(library.Regex(_CLIP_WORDS), "removed", invert=True)
    bytes_ = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = library.pre_tokenizers.Sequence([split, bytes_])
    start, end = (vocab[piece] for piece in _CLIP_SPECIALS)
    encode, size = partial(_encode, model), max(vocab.values()) + 1
    return PieceTokenizer(clean_clip, encode, (start,), end, 0, length or LENGTHS["clip"], size)


def _alphabet(library: Any) -> list[str]:
    """Returns a printable character for each byte, in the order of CLIP's ids."""
    return sorted(library.pre_tokenizers.ByteLevel.alphabet())


def _read_bpe(file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    if file.suffix == ".gz":
        with gzip.open(file) as packed:
            content = packed.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise ValueError(f"it unpacks to more than {_LARGEST} bytes")
        lines = content.decode("utf-8").split("\n")
        merges = _pairs(lines[1 : _CLIP_MERGES + 1])
        letters = _alphabet(_require("tokenizers"))
        pieces = [*letters, *(c + "</w>" for c in letters), *(a + b for a, b in merges), *_CLIP_SPECIALS]
        return {piece: i for i, piece in enumerate(pieces)}, merges
    lines = read_text(file.with_name("merges.txt")).split("\n")
    vocab = read_json(file.with_name("vocab.json"))
    return vocab, _pairs(line for line in lines if not line.startswith("#version"))


def _pairs(lines: Iterable[Any]) -> list[tuple[str, str]]:
    """Parses merges, each "a b" or [a, b]."""
    pairs = [
        line.split(" ", 2) if isinstance(line, str) else texts(line, "a merge") for line in lines if line
    ]
    if wrong := [pair for pair in pairs if len(pair) != 2]:
        raise ValueError(f"the merge {short(wrong[0])} does not have two pieces")
    return [(first, second) for first, second in pairs]


def _checked(vocab: Any) -> dict[str, int]:
    """Checks that a vocabulary maps pieces to different ids."""
    if not isinstance(vocab, dict) or not vocab:
        raise ValueError(f"the vocabulary is {short(vocab)}, not an object of pieces")
    ids = [whole(k, f"the id of {short(piece)}", 0, _LARGEST) for piece, k in vocab.items()]
    _check_lengths(vocab)
    if len(set(ids)) < len(ids):
        raise ValueError(f"two pieces have the id {next(k for k, n in Counter(ids).items() if n > 1)}")
    return vocab


def _check_lengths(pieces: Iterable[str]) -> None:
    """Raises a ValueError for a piece so long that `tokenizers` may overflow the stack, which ends the process."""
    for piece in pieces:
        if len(piece) > _LONGEST:
            raise ValueError(f"the piece {short(piece)} has {len(piece)} letters, more than {_LONGEST}")


def _made(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a library and turns its exceptions, a panic of its Rust code included, into ValueErrors."""
    try:
        return make(*args, **kwargs)
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(reason(error)) from error
        raise


def _wordpiece(vocab: dict[str, int], file: Path, length: int | None) -> PieceTokenizer:
    library, vocab = _require("tokenizers"), _checked(vocab)
    missing = [piece for piece in ("[CLS]", "[SEP]", "[PAD]", "[UNK]") if piece not in vocab]
    if missing:
        raise UserError(f"{file} is not BERT's vocabulary: it lacks {', '.join(missing)}")
    model = library.Tokenizer(_made(library.models.WordPiece, vocab, unk_token="[UNK]"))
    model.normalizer = library.normalizers.BertNormalizer(lowercase=True)
    model.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    start, end, pad = vocab["[CLS]"], vocab["[SEP]"], vocab["[PAD]"]
    encode, size = partial(_encode, model), max(vocab.values()) + 1
    return PieceTokenizer(str, encode, (start,), end, pad, length or LENGTHS["wordpiece"], size)


def _sentencepiece(file: Path, kind: str | None, length: int | None) -> PieceTokenizer:
    model = _made(_require("sentencepiece").SentencePieceProcessor, model_proto=file.read_bytes())
    last, end = int(model.eos_id()), None
    if kind == "tips" or (kind is None and last < 0):
        kind, pad = "tips", max(model.pad_id(), 0)
    elif last < 0:
        raise UserError(f"{file} has no end-of-text piece: it is not a SigLIP vocabulary")
    else:
        kind = _agree(file, kind, "siglip2" if model.id_to_piece(last) == "<eos>" else "siglip")
        # SigLIP pads with its end token, as big_vision does (pad_value=1, eos="sticky").
        end, pad = last, model.pad_id() if kind == "siglip2" else last
    clean, size = _SIGLIP_CLEAN[kind], model.get_piece_size()
    return PieceTokenizer(clean, model.encode, (), end, pad, length or LENGTHS[kind], size)


def _tokenizer_json(file: Path, kind: str | None, length: int | None) -> PieceTokenizer:
    data = read_json(file)
    model = data["model"]
    if model.get("end_of_word_suffix") == "</w>":
        _agree(file, kind, "clip")
        return _clip(model["vocab"], _pairs(model["merges"]), file, length)
    if "max_input_chars_per_word" in model:
        _agree(file, kind, "wordpiece")
        if not (data.get("normalizer") or {}).get("lowercase", True):
            raise UserError(f"{file} is a cased BERT's; only lower-case ones are supported")
        return _wordpiece(model["vocab"], file, length)
    kind = _agree(file, kind, "siglip2" if model.get("byte_fallback") and "merges" in model else "siglip")
    vocab = model["vocab"]
    _check_lengths(vocab if isinstance(vocab, dict) else [piece for piece, _ in vocab])
    whole = _made(_require("tokenizers").Tokenizer.from_str, read_text(file))
    whole.no_padding(), whole.no_truncation()
    whole.encode_special_tokens = True
    end = whole.token_to_id("<eos>" if kind == "siglip2" else "</s>")
    pad = end if kind == "siglip" else whole.token_to_id("<pad>")
    if kind == "tips":
        end = None
    if pad is None or (end is None and kind != "tips"):
        raise UserError(f"{file} has no end-of-text or padding piece: it is not a SigLIP vocabulary")
    encode, size = partial(_encode, whole), whole.get_vocab_size()
    return PieceTokenizer(_SIGLIP_CLEAN[kind], encode, (), end, pad, length or LENGTHS[kind], size)


def _find(folder: Path, kind: str | None) -> Path:
    names = {"clip": (BPE_FILE, "vocab.json"), "wordpiece": ("vocab.txt",)}.get(kind or "", ("*.model",))
    if kind is None:
        names = ("*.model", BPE_FILE, "vocab.json", "vocab.txt")
    for name in (*names, "tokenizer.json"):
        if found := sorted(folder.glob(name)):
            return found[0]
    raise UserError(f"{folder} holds none of {', '.join((*names, 'tokenizer.json'))}")


def _agree(file: Path, kind: str | None, found: str) -> str:
    """Returns the requested kind if the file can be of it; SigLIP 1, 2 and TIPS cannot be told apart for certain."""
    if kind in (None, found) or {kind, found} <= {"siglip", "siglip2", "tips"}:
        return kind or found
    raise UserError(f"{file} is a tokenizer of kind {found}, not {kind}")


def _require(package: str) -> Any:
    return optional(package, f"this needs a package that is not installed: pip install {package}")
