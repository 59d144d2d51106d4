"""COCO 2017: panoptic segments joined with captions, and COCO-Stuff's semantic maps."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from ovseg_jax.data.images import read_ids, read_mask
from ovseg_jax.data.sources.coco import coco_classes, number_segments
from ovseg_jax.datasets.base import Download, Entry, Option, segments_of_map
from ovseg_jax.datasets.packed import Packed
from ovseg_jax.errors import UserError
from ovseg_jax.reading import column, flag, objects, reading, text, whole
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.splits import load_split

_IMAGES = (
    Download("train2017.zip", "http://images.cocodataset.org/zips/train2017.zip", "images of train"),
    Download("val2017.zip", "http://images.cocodataset.org/zips/val2017.zip", "images of val"),
)
_ANNOTATIONS = "http://images.cocodataset.org/annotations"
# Official ids and names of COCO-Stuff's labels.txt, without the 11 classes of things that have no annotation.
_STUFF = (
    "1 person; 2 bicycle; 3 car; 4 motorcycle; 5 airplane; 6 bus; 7 train; 8 truck; 9 boat; 10 traffic "
    "light; 11 fire hydrant; 13 stop sign; 14 parking meter; 15 bench; 16 bird; 17 cat; 18 dog; 19 horse; "
    "20 sheep; 21 cow; 22 elephant; 23 bear; 24 zebra; 25 giraffe; 27 backpack; 28 umbrella; 31 handbag; "
    "32 tie; 33 suitcase; 34 frisbee; 35 skis; 36 snowboard; 37 sports ball; 38 kite; 39 baseball bat; 40 "
    "baseball glove; 41 skateboard; 42 surfboard; 43 tennis racket; 44 bottle; 46 wine glass; 47 cup; 48 "
    "fork; 49 knife; 50 spoon; 51 bowl; 52 banana; 53 apple; 54 sandwich; 55 orange; 56 broccoli; 57 "
    "carrot; 58 hot dog; 59 pizza; 60 donut; 61 cake; 62 chair; 63 couch; 64 potted plant; 65 bed; 67 "
    "dining table; 70 toilet; 72 tv; 73 laptop; 74 mouse; 75 remote; 76 keyboard; 77 cell phone; 78 "
    "microwave; 79 oven; 80 toaster; 81 sink; 82 refrigerator; 84 book; 85 clock; 86 vase; 87 scissors; "
    "88 teddy bear; 89 hair drier; 90 toothbrush; 92 banner; 93 blanket; 94 branch; 95 bridge; 96 "
    "building-other; 97 bush; 98 cabinet; 99 cage; 100 cardboard; 101 carpet; 102 ceiling-other; 103 "
    "ceiling-tile; 104 cloth; 105 clothes; 106 clouds; 107 counter; 108 cupboard; 109 curtain; 110 "
    "desk-stuff; 111 dirt; 112 door-stuff; 113 fence; 114 floor-marble; 115 floor-other; 116 floor-stone; "
    "117 floor-tile; 118 floor-wood; 119 flower; 120 fog; 121 food-other; 122 fruit; 123 furniture-other; "
    "124 grass; 125 gravel; 126 ground-other; 127 hill; 128 house; 129 leaves; 130 light; 131 mat; 132 "
    "metal; 133 mirror-stuff; 134 moss; 135 mountain; 136 mud; 137 napkin; 138 net; 139 paper; 140 "
    "pavement; 141 pillow; 142 plant-other; 143 plastic; 144 platform; 145 playingfield; 146 railing; 147 "
    "railroad; 148 river; 149 road; 150 rock; 151 roof; 152 rug; 153 salad; 154 sand; 155 sea; 156 shelf; "
    "157 sky-other; 158 skyscraper; 159 snow; 160 solid-other; 161 stairs; 162 stone; 163 straw; 164 "
    "structural-other; 165 table; 166 tent; 167 textile-other; 168 towel; 169 tree; 170 vegetable; 171 "
    "wall-brick; 172 wall-concrete; 173 wall-other; 174 wall-panel; 175 wall-stone; 176 wall-tile; 177 "
    "wall-wood; 178 water-other; 179 waterdrops; 180 window-blind; 181 window-other; 182 wood"
)
_LAST_THING, _UNLABELLED = 91, 255
# The end of the names of maps that NVlabs/GroupViT's convert_coco_object.py writes.
_TRAIN_IDS = "_instanceTrainIds"


class _Segment(NamedTuple):
    """An entry of `segments_info`; as dicts, those of train2017 would take gigabytes."""

    id: int
    category: int
    crowd: bool


class CocoPanoptic(Packed):
    """COCO 2017's panoptic segments, joined with its captions by image.

    Names are those of the annotation file in plain words: "wall-other-merged" is "wall".
    """

    name = "coco_panoptic"
    about = (
        "118,287 training and 5,000 validation images with panoptic segments of 80 thing and 53 stuff classes "
        "and five captions"
    )
    homepage = "https://cocodataset.org"
    licence = "annotations: CC BY 4.0; images: Flickr's terms of use, each with a licence of its own"
    download = (
        *_IMAGES,
        Download(
            "panoptic_annotations_trainval2017.zip",
            f"{_ANNOTATIONS}/panoptic_annotations_trainval2017.zip",
            "segments; holds archives of PNGs",
        ),
        Download(
            "annotations_trainval2017.zip",
            f"{_ANNOTATIONS}/annotations_trainval2017.zip",
            "captions; not for captions=no",
        ),
    )
    options = (Option("captions", ("yes", "no"), "whether the captions are joined"),)
    splits = ("train", "val")
    provides = frozenset({"image", "segments", "class_ids", "captions"})
    archives = (
        "train2017.zip",
        "val2017.zip",
        "panoptic_annotations_trainval2017.zip",
        "panoptic_*2017.zip",
        "annotations_trainval2017.zip",
    )

    def __init__(self, source: epath.PathLike, **options: str):
        super().__init__(source, **options)
        if self.chosen["captions"] == "no":
            self.provides -= {"captions"}
        name = self.need("panoptic_val2017.json", "panoptic_train2017.json")
        data = self.json(name, _compact)
        with reading(self.members.where(name)):
            self.classes = coco_classes(objects(data["categories"], "'categories'"))

    def entries(self, split: str) -> Iterator[Entry]:
        """Yields the images of a split with their segments and captions, sorted by file name."""
        self.check_split(split)
        year = f"{split}2017"
        images, segments = self._segments(year)
        captions = self._captions(year, images) if "captions" in self.provides else {}
        folder = self.files(self.need_folder(year, suffix=".jpg"), ".jpg")
        self.present(split, images, folder)
        if surplus := sorted(folder.keys() - images.keys()):
            self.notes.append(
                f"{split}: {len(surplus)} images that the annotation file does not list were left out, such as "
                f"{folder[surplus[0]]}"
            )
        pngs = self.files(self.need_folder(f"panoptic_{year}", suffix=".png"), ".png")
        for key, image, mask in self.paired(split, {key: folder[key] for key in images}, pngs):
            data = {"image": image, "mask": mask, "segments": segments[images[key]]}
            yield Entry(key, data | {"captions": captions.get(images[key], [])})

    def _segments(self, year: str) -> tuple[dict[str, int], dict[int, list[Any]]]:
        """Returns the id of each image by its stem, and the segments of each id: [id, class, crowd]."""
        name = self.need(f"panoptic_{year}.json")
        data = self.json(name, _compact)
        index = {category: k for k, category in enumerate(self.classes.ids)}
        with reading(self.members.where(name)):
            if coco_classes(objects(data["categories"], "'categories'")) != self.classes:
                raise ValueError("its categories differ from those of the other split")
            rows = objects(data["images"], "'images'")
            ids = column(rows, "id", whole, of="image")
            stems = [file.rpartition(".")[0] for file in column(rows, "file_name", text, of="image")]
            if len(set(ids)) < len(ids) or len(set(stems)) < len(stems):
                raise ValueError("it lists an image twice")
            found: dict[int, list[Any]] = {}
            for row in objects(data["annotations"], "'annotations'"):
                owner = whole(row["image_id"], "'image_id'")
                own = [_segment(item, index) for item in row["segments_info"]]
                if found.setdefault(owner, own) is not own:
                    raise ValueError(f"it has two annotations for the image {owner}")
                if len({number for number, _, _ in own}) < len(own):
                    raise ValueError(f"two segments of the image {owner} have the same id")
            if stray := found.keys() - set(ids):
                raise ValueError(f"an annotation has the image_id {min(stray)}, which 'images' does not list")
            if missing := [key for key in ids if key not in found]:
                raise ValueError(
                    f"{len(missing)} of {len(ids)} images have no annotation, such as {missing[0]}"
                )
        return dict(zip(stems, ids, strict=True)), found

    def _captions(self, year: str, images: dict[str, int]) -> dict[int, list[str]]:
        name = self.need(f"captions_{year}.json")
        data = self.json(name)
        found: dict[int, list[str]] = {image: [] for image in images.values()}
        stray = 0
        with reading(self.members.where(name)):
            rows = objects(data["annotations"], "'annotations'")
            owners = column(rows, "image_id", whole, of="annotation")
            for owner, caption in zip(owners, column(rows, "caption", text, of="annotation"), strict=True):
                words = " ".join(caption.split())
                stray += owner not in found
                if words and owner in found:
                    found[owner].append(words)
        if stray:
            self.notes.append(f"{year}: {stray} captions of images without segments were left out")
        if silent := sum(not own for own in found.values()):
            self.notes.append(f"{year}: {silent} images have no caption")
        return found

    def example(self, split: str, entry: Entry) -> dict[str, Any]:
        """Returns `image`, `segments`, `class_ids`, `iscrowd` and, if chosen, `captions` of an image."""
        image, mask = self.encoded(entry.data["image"]), self.encoded(entry.data["mask"])
        stored = self.upright(read_ids(mask, "the PNG"), mask, image)
        rows = np.array(entry.data["segments"], np.int64).reshape(-1, 3)
        found = {
            "image": image.data,
            "segments": number_segments(stored, rows[:, 0], mask, f"panoptic_{split}2017.json"),
            "class_ids": rows[:, 1].astype(np.int32),
            "iscrowd": rows[:, 2].astype(bool),
        }
        return found | ({"captions": entry.data["captions"]} if "captions" in self.provides else {})


def _compact(item: dict[str, Any]) -> Any:
    """Returns a `_Segment` for an entry of `segments_info`, and any other object as it is."""
    if "category_id" not in item or "image_id" in item:
        return item
    # In the PNG 0 is void, and ids have three bytes.
    number = whole(item["id"], "the id of a segment", 1, (1 << 24) - 1)
    return _Segment(
        number, whole(item["category_id"], "'category_id'"), flag(item.get("iscrowd", 0), "'iscrowd'")
    )


def _segment(item: Any, index: dict[int, int]) -> list[int]:
    if not isinstance(item, _Segment):
        raise ValueError("an entry of 'segments_info' is not a segment")
    if item.category not in index:
        raise ValueError(f"a segment has the category_id {item.category}, which 'categories' does not list")
    return [item.id, index[item.category], int(item.crowd)]


class CocoStuff(Packed):
    """COCO-Stuff 164k: semantic maps of 80 thing and 91 stuff classes on COCO 2017's images.

    Class ids are the official ones, 1 to 182 with gaps; a map's value is the id less one, and 255 is unlabelled.
    """

    name = "coco_stuff"
    about = "118,287 training and 5,000 validation images of COCO 2017 with semantic maps of 171 classes"
    homepage = "https://github.com/nightrome/cocostuff"
    licence = "annotations: CC BY 4.0; images: Flickr's terms of use, each with a licence of its own"
    download = (
        *_IMAGES,
        Download(
            "stuffthingmaps_trainval2017.zip",
            "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/stuffthingmaps_trainval2017.zip",
            "maps",
        ),
    )
    options: tuple[Option, ...] = (
        Option(
            "zero_shot",
            ("no", "yes"),
            "groups the classes: 156 seen and 15 unseen (SPNet, ZS3 and papers after them)",
        ),
    )
    splits = ("train", "val")
    provides = frozenset({"image", "segments", "class_ids"})
    archives = ("train2017.zip", "val2017.zip", "stuffthingmaps*.zip")

    def __init__(self, source: epath.PathLike, **options: str):
        super().__init__(source, **options)
        self.classes = stuff_classes()
        if self.chosen["zero_shot"] == "yes":
            self.classes = load_split(self.classes, "coco_stuff")

    def entries(self, split: str) -> Iterator[Entry]:
        """Yields the images of a split with their maps."""
        self.check_split(split)
        year = f"{split}2017"
        images = self.files(self.need_folder(f"images/{year}", year, suffix=".jpg"), ".jpg")
        maps = self.files(
            self.need_folder(f"stuffthingmaps/{year}", f"annotations/{year}", year, suffix=".png"), ".png"
        )
        for key, image, mask in self.paired(split, images, maps):
            yield Entry(key, {"image": image, "mask": mask})

    def example(self, split: str, entry: Entry) -> dict[str, Any]:
        """Returns `image`, `segments` and `class_ids` of an image."""
        image, mask = self.encoded(entry.data["image"]), self.encoded(entry.data["mask"])
        labels = self.upright(read_mask(mask), mask, image).astype(np.int32) + 1
        segments, ids = segments_of_map(labels, self.classes, (_UNLABELLED + 1,), f"{mask} (less one)")
        return {"image": image.data, "segments": segments, "class_ids": ids}


class CocoObject(CocoStuff):
    """COCO-Object (NVlabs/GroupViT): the 80 things of COCO-Stuff's maps; all other pixels, unlabelled too, are void.

    Class ids are COCO's. An evaluation with background counts the void pixels (`background=void`). Maps that GroupViT's
    conversion wrote, `*_instanceTrainIds.png`, are read in place of COCO-Stuff's where they are.
    """

    name = "coco_object"
    about = "118,287 training and 5,000 validation images of COCO 2017 with semantic maps of 80 things"
    options = ()

    def __init__(self, source: epath.PathLike, **options: str):
        Packed.__init__(self, source, **options)
        every = stuff_classes()
        self.classes = every.subset([k for k, thing in enumerate(every.isthing) if thing])

    def files(self, folder: str, suffix: str) -> dict[str, str]:
        """Returns the files of a folder by their base names; if some are converted maps, only those."""
        found = super().files(folder, suffix)
        converted = {key.removesuffix(_TRAIN_IDS): name for key, name in found.items() if _TRAIN_IDS in key}
        return converted or found

    def example(self, split: str, entry: Entry) -> dict[str, Any]:
        """Returns `image`, `segments` and `class_ids` of an image."""
        image, mask = self.encoded(entry.data["image"]), self.encoded(entry.data["mask"])
        labels = self.upright(read_mask(mask), mask, image).astype(np.int32)
        if _TRAIN_IDS in entry.data["mask"]:
            ids_of = np.array([0, *self.classes.ids], np.int32)
            if labels.max(initial=0) >= len(ids_of):
                raise UserError(
                    f"{mask} holds the value {labels.max()}, but those of {_TRAIN_IDS[1:]} are 0 to 80"
                )
            labels = ids_of[labels]
        else:
            labels = np.where(labels < _LAST_THING, labels + 1, 0)
        segments, ids = segments_of_map(labels, self.classes, (0,), str(mask))
        return {"image": image.data, "segments": segments, "class_ids": ids}


def stuff_classes() -> ClassList:
    """Returns the 171 classes of COCO-Stuff with their official ids, named in plain words."""
    pairs = [entry.split(" ", 1) for entry in _STUFF.split("; ")]
    rows = [
        {"id": int(number), "name": name, "isthing": int(number) <= _LAST_THING} for number, name in pairs
    ]
    return coco_classes(rows)
