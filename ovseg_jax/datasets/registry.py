"""The readers of published data sets by name."""

from ovseg_jax.config import import_class
from ovseg_jax.datasets.base import Dataset

DATASETS: dict[str, str] = {
    "ade20k_150": "ovseg_jax.datasets.ade20k:Ade20k150",
    "ade20k_847": "ovseg_jax.datasets.ade20k:Ade20kFull",
    "cifar10": "ovseg_jax.datasets.pixel_files:Cifar10",
    "cifar100": "ovseg_jax.datasets.pixel_files:Cifar100",
    "coco_object": "ovseg_jax.datasets.coco:CocoObject",
    "coco_panoptic": "ovseg_jax.datasets.coco:CocoPanoptic",
    "coco_retrieval": "ovseg_jax.datasets.retrieval:CocoRetrieval",
    "coco_stuff": "ovseg_jax.datasets.coco:CocoStuff",
    "coop": "ovseg_jax.datasets.coop:CoopSplit",
    "country211": "ovseg_jax.datasets.classification:Country211",
    "fer2013": "ovseg_jax.datasets.pixel_files:Fer2013",
    "fgvc_aircraft": "ovseg_jax.datasets.classification:FgvcAircraft",
    "flickr30k_retrieval": "ovseg_jax.datasets.retrieval:Flickr30kRetrieval",
    "gtsrb": "ovseg_jax.datasets.classification:Gtsrb",
    "imagenet21k": "ovseg_jax.datasets.imagenet:ImageNet21k",
    "imagenet_a": "ovseg_jax.datasets.imagenet:ImageNetA",
    "imagenet_r": "ovseg_jax.datasets.imagenet:ImageNetR",
    "imagenet_s": "ovseg_jax.datasets.imagenet:ImageNetS",
    "imagenet_sketch": "ovseg_jax.datasets.imagenet:ImageNetSketch",
    "imagenet_v2": "ovseg_jax.datasets.imagenet:ImageNetV2",
    "localized_narratives": "ovseg_jax.datasets.narratives:LocalizedNarratives",
    "lvis_v1": "ovseg_jax.datasets.lvis:Lvis",
    "mnist": "ovseg_jax.datasets.pixel_files:Mnist",
    "objectnet": "ovseg_jax.datasets.classification:ObjectNet",
    "objects365_v2": "ovseg_jax.datasets.objects365:Objects365",
    "pascal_context_459": "ovseg_jax.datasets.pascal_context:PascalContext459",
    "pascal_context_59": "ovseg_jax.datasets.pascal_context:PascalContext59",
    "pcam": "ovseg_jax.datasets.pixel_files:Pcam",
    "rendered_sst2": "ovseg_jax.datasets.classification:RenderedSst2",
    "resisc45": "ovseg_jax.datasets.classification:Resisc45",
    "stl10": "ovseg_jax.datasets.pixel_files:Stl10",
    "svhn": "ovseg_jax.datasets.pixel_files:Svhn",
    "voc2007": "ovseg_jax.datasets.classification:Voc2007",
    "voc_2012": "ovseg_jax.datasets.voc:Voc2012",
}
"""The class of each data set, imported when it is used."""


def find_dataset(name: str) -> type[Dataset]:
    """Returns the reader of a data set that is named as in `DATASETS`, or as "module:Class".

    Raises:
      UserError: there is no such data set.
    """
    return import_class(DATASETS.get(name, name), Dataset, "data set", DATASETS)


def list_datasets() -> str:
    """Returns a line for each data set of `DATASETS`."""
    width = max(map(len, DATASETS), default=0)
    return "\n".join(f"{name:{width}}  {find_dataset(name).about}" for name in DATASETS)


def describe(kind: type[Dataset]) -> str:
    """Returns what a user needs to know to prepare a data set: files, addresses, licence, splits, options."""
    lines = [
        f"{kind.name} {kind.version}: {kind.about}",
        f"homepage: {kind.homepage}",
        f"licence: {kind.licence}",
    ]
    lines += ["files of --source, as archives or unpacked:"]
    for file in kind.download:
        lines += [f"  {file.file}" + (f" ({file.note})" if file.note else ""), f"    {file.address}"]
    lines += [f"splits: {', '.join(kind.splits)}"]
    for option in kind.options:
        values = "|".join(option.values) or "TEXT"
        lines += [f"--option={option.name}={values}: {option.about}"]
    return "\n".join(lines)
