"""Image classification in the splits of CoOp (Zhou et al., IJCV 2022), which POMP is scored on."""

from collections.abc import Iterator
from typing import Any

from etils import epath

from ovseg_jax.datasets.base import Download, Entry, Option
from ovseg_jax.datasets.packed import MISSING, Packed
from ovseg_jax.errors import UserError
from ovseg_jax.reading import array, reading, short, text, whole
from ovseg_jax.vocab.classes import ClassList

_HOMEPAGE = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
_TRIES = 50  # images that are looked for to find the folder that the paths of a split start from


class CoopSplit(Packed):
    """One of the nine data sets that CoOp has a file split_zhou_SET.json for, which lists images, labels and names.

    The sets are Caltech101, OxfordPets, StanfordCars, OxfordFlowers, Food101, SUN397, DescribableTextures, EuroSAT and
    UCF101 (frames from the middle of the videos). Class ids are the labels; names are the file's, with spaces in place
    of underscores, as they stand in CoOp's prompts.
    """

    name = "coop"
    about = (
        "one of nine classification sets in CoOp's split: put its images and its split_zhou_SET.json into DIR"
    )
    homepage = _HOMEPAGE
    licence = "each set has a licence of its own (see its homepage)"
    download = (
        Download("split_zhou_SET.json", _HOMEPAGE, "the link of each set"),
        Download("the images of the set", _HOMEPAGE, "as archives or unpacked"),
    )
    options = (
        Option("set", (), "such as OxfordPets, if the folder holds several split files"),
        MISSING,
    )
    splits = ("train", "val", "test")
    provides = frozenset({"image", "label"})
    archives = ("*.zip", "*.tar", "*.tar.gz", "*.tgz")

    def __init__(self, source: epath.PathLike, **options: str):
        super().__init__(source, **options)
        self._listing = self.need(*self._listings())
        self.chosen["set"] = self._listing.rpartition("split_zhou_")[2].removesuffix(".json")
        names: dict[int, str] = {}
        for split in self.splits:
            for path, label, name in self._rows(split):
                if names.setdefault(label, name) != name:
                    raise UserError(
                        f"{self.members.where(self._listing)} cannot be read: {path} has the label {label} of "
                        f"{names[label]!r}, but the name {name!r}"
                    )
        ids = tuple(sorted(names))
        self.classes = ClassList.things([names[k] for k in ids], ids)

    def _listings(self) -> list[str]:
        if self.chosen["set"]:
            return [f"split_zhou_{self.chosen['set']}.json"]
        found = [name for name in self.members.names(suffix=".json") if "split_zhou_" in name]
        sets = sorted({name.rpartition("split_zhou_")[2].removesuffix(".json") for name in found})
        if len(sets) > 1:
            raise UserError(
                f"{self.name}: {self.source} holds the splits of {', '.join(sets)}: name one, such as "
                f"--option=set={sets[0]}"
            )
        return [f"split_zhou_{(*sets, 'SET')[0]}.json"]

    def _rows(self, split: str) -> list[tuple[str, int, str]]:
        """Returns the path, the label and the class name of each image of a split."""
        data = self.json(self._listing)
        with reading(self.members.where(self._listing)):
            rows = [array(row, "an image") for row in array(data[split], repr(split))]
            if wrong := [row for row in rows if len(row) != 3]:
                raise ValueError(f"expected [path, label, name], got {short(wrong[0])}")
            found = [
                (
                    text(path, "a path").lstrip("/"),
                    whole(label, "a label", 0, 1 << 24),
                    " ".join(text(name, "a name").replace("_", " ").split()),
                )
                for path, label, name in rows
            ]
            if not found or not all(path and name for path, _, name in found):
                raise ValueError(f"a path or a name of {split!r} is empty, or it lists no image")
            return found

    def entries(self, split: str) -> Iterator[Entry]:
        """Yields the images of a split with their labels, in the order of the file; their key is the listed path."""
        self.check_split(split)
        rows = self._rows(split)
        start = self._start([path for path, _, _ in rows])
        known = {path: start + path for path, _, _ in rows if start + path in self.members}
        there = set(self.present(split, [path for path, _, _ in rows], known))
        index = {k: row for row, k in enumerate(self.classes.ids)}
        for path, label, _ in rows:
            if path in there:
                yield Entry(path, {"image": known[path], "label": index[label]})

    def _start(self, paths: list[str]) -> str:
        """Returns the folder, with a slash at its end, that the paths of the split file start from."""
        for path in paths[:_TRIES]:
            if (found := self.members.find(path)) is not None:
                return found.removesuffix(path)
        return ""

    def example(self, split: str, entry: Entry) -> dict[str, Any]:
        """Returns `image` and `label` of an image."""
        return {"image": self.members.read(entry.data["image"]), "label": entry.data["label"]}
