"""The datasets that LR-Ray knows by name: what they are, where they come from, how they lie on disk."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from lr_ray.data.datasets import annotations, tables, wilds
from lr_ray.data.datasets.drawings import quick_draw
from lr_ray.data.datasets.items import Loader, loader_of
from lr_ray.data.datasets.trees import class_folders, nested_class_folders


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a dataset may lie on disk.

    Attributes:
        needs: paths or patterns in the dataset's folder that tell the layout, all of which must be there.
        load: reads it.
        folders: where in the user's folder the dataset's may be, the first that has what is needed.
    """

    needs: tuple[str, ...]
    load: Loader
    folders: tuple[str, ...] = ("",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """A dataset known by name.

    Attributes:
        layouts: tried in this order.
        obtain: what to download from where, for messages.
        terms: its licence, as far as its authors give one.
        class_list: name of the file of class splits in `splits/`; None: no class split is known.
        parts: splits that the authors' own files make, image by image.
        home: the folder in $LR_RAY_DATA; default the dataset's name.
        aliases: class name in Parquet as the hub has it → the authors'.
    """

    layouts: tuple[Layout, ...]
    obtain: str
    terms: str
    class_list: str | None = None
    parts: tuple[str, ...] = ()
    home: str | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)


_META = "meta-dataset"
_DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
_FLOWERS = Layout(
    needs=("jpg", "imagelabels.mat"), load=loader_of(annotations.flowers), folders=("", "vgg_flower", "flowers-102")
)
_BIRDS = Layout(needs=("images/001.Black_footed_Albatross",), load=class_folders("images/*"), folders=("", "CUB_200_2011"))
_CHARACTERS = Layout(
    needs=("images_background", "images_evaluation"),
    load=nested_class_folders("images_background/*/*", "images_evaluation/*/*"),
    folders=("", "omniglot", "omniglot-py"),
)
_FLOWERS_FROM = "102flowers.tgz (330 MB) and imagelabels.mat from https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
_BIRDS_FROM = "CUB_200_2011.tgz (1.2 GB) from https://data.caltech.edu/records/65de6-vp158"
_CHARACTERS_FROM = "images_background.zip and images_evaluation.zip from https://github.com/brendenlake/omniglot (python/)"


def _wilds(name: str, table: str, reader: Loader, parts: tuple[str, ...], size: str, terms: str) -> Dataset:
    return Dataset(
        layouts=(Layout(needs=(table,), load=reader, folders=(name, "")),),
        obtain=f"{name} ({size}) with the wilds package or from https://wilds.stanford.edu/datasets/",
        terms=terms,
        parts=parts,
        home="wilds",
    )


def _meta(layout: Layout, name: str, obtain: str, terms: str) -> Dataset:
    return Dataset(layouts=(layout,), obtain=obtain, terms=terms, class_list=f"meta-{name}", home=_META)


_NAMED = {
    "cifar-fs": Dataset(
        layouts=(Layout(needs=("apple",), load=class_folders("*"), folders=("", "data", "cifar100/data")),),
        obtain="cifar100.zip from https://zenodo.org/records/7978538, or set data.SECTION.root to hf://datasets/uoft-cs/cifar100",
        terms="none given by CIFAR-100's authors",
        class_list="cifar-fs",
        aliases={"cra": "crab"},
    ),
    "miniimagenet": Dataset(
        layouts=(
            Layout(needs=("images", "*.csv"), load=loader_of(tables.mini_imagenet)),
            Layout(needs=("n01532829",), load=class_folders("n*"), folders=("", "images", "data")),
            Layout(needs=("*/n0*",), load=class_folders("train/n*", "val/n*", "test/n*")),
        ),
        obtain="the images (https://github.com/yaoyao-liu/mini-imagenet-tools makes them of ImageNet) and train.csv, val.csv, "
        "test.csv from https://github.com/twitter-research/meta-learning-lstm (data/miniImagenet)",
        terms="ImageNet's: research, non-commercial",
        class_list="miniimagenet",
    ),
    "vgg-flower": Dataset(layouts=(_FLOWERS,), obtain=_FLOWERS_FROM, terms="none given", class_list="meta-vgg_flower"),
    "cub": Dataset(layouts=(_BIRDS,), obtain=_BIRDS_FROM, terms="research, non-commercial", class_list="cub"),
    "omniglot": Dataset(layouts=(_CHARACTERS,), obtain=_CHARACTERS_FROM, terms="MIT", class_list="omniglot"),
    "omniglot-parts": Dataset(
        layouts=(_CHARACTERS,), obtain=_CHARACTERS_FROM, terms="MIT", class_list="omniglot-parts", home="omniglot"
    ),
    "chestx": Dataset(
        layouts=(Layout(needs=("Data_Entry_2017.csv",), load=loader_of(tables.chest_x)),),
        obtain="the images and Data_Entry_2017.csv, which has this name there (45 GB), from https://www.kaggle.com/datasets/nih-chest-xrays/data",
        terms="NIH: free use, with acknowledgement",
        class_list="chestx",
    ),
    "isic": Dataset(
        layouts=(
            Layout(needs=("ISIC2018_Task3_Training_GroundTruth", "ISIC2018_Task3_Training_Input"), load=loader_of(tables.isic)),
        ),
        obtain="the training input and ground truth of task 3 (2.6 GB) from https://challenge.isic-archive.com/data/#2018",
        terms="CC BY-NC 4.0",
    ),
    "eurosat": Dataset(
        layouts=(Layout(needs=("AnnualCrop",), load=class_folders("*"), folders=("", "2750", "EuroSAT_RGB", "eurosat/2750")),),
        obtain="EuroSAT_RGB.zip (90 MB) from https://zenodo.org/records/7711810, or have torchvision.datasets.EuroSAT do so",
        terms="MIT",
    ),
    "cropdiseases": Dataset(
        layouts=(Layout(needs=("Apple___Apple_scab",), load=class_folders("*"), folders=("dataset/train", "train", "")),),
        obtain="plant-disease from https://www.kaggle.com/datasets/saroz014/plant-disease",
        terms="see the page",
    ),
}

_META_TEN = {
    "ilsvrc_2012": _meta(
        Layout(needs=("n01440764",), load=class_folders("n*"), folders=("ILSVRC2012_img_train", "train", "")),
        "ilsvrc_2012",
        "ILSVRC2012_img_train.tar (138 GB), and the class archives in it, from https://image-net.org",
        "research, non-commercial",
    ),
    "omniglot": _meta(_CHARACTERS, "omniglot", _CHARACTERS_FROM, "MIT"),
    "aircraft": _meta(
        Layout(
            needs=("data/images", "data/images_box.txt"),
            load=loader_of(annotations.aircraft),
            folders=("fgvc-aircraft-2013b", ""),
        ),
        "aircraft",
        "fgvc-aircraft-2013b.tar.gz (2.7 GB) from https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        "research, non-commercial",
    ),
    "cu_birds": _meta(_BIRDS, "cu_birds", _BIRDS_FROM, "research, non-commercial"),
    "dtd": _meta(
        Layout(needs=("images/banded",), load=class_folders("images/*"), folders=("dtd", "", "dtd/dtd")),
        "dtd",
        "dtd-r1.0.1.tar.gz (600 MB) from https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        "research",
    ),
    "quickdraw": _meta(
        Layout(needs=("*airplane.npy",), load=quick_draw, folders=("quickdraw", "")),
        "quickdraw",
        "gs://quickdraw_dataset/full/numpy_bitmap/*.npy (39 GB; gsutil -m cp), as https://quickdraw.withgoogle.com/data says",
        "CC BY 4.0",
    ),
    "fungi": _meta(
        Layout(needs=("train.json", "val.json", "images"), load=loader_of(annotations.fungi), folders=("fungi", "")),
        "fungi",
        "fungi_train_val.tgz (13 GB) and train_val_annotations.tgz from https://github.com/visipedia/fgvcx_fungi_comp",
        "research and education, non-commercial, not to be passed on",
    ),
    "vgg_flower": _meta(_FLOWERS, "vgg_flower", _FLOWERS_FROM, "none given"),
    "traffic_sign": _meta(
        Layout(
            needs=("00000", "00042"),
            load=class_folders("[0-9]*"),
            folders=("GTSRB/Final_Training/Images", "Final_Training/Images", ""),
        ),
        "traffic_sign",
        "GTSRB_Final_Training_Images.zip (276 MB; torchvision's GTSRB is an older, smaller set) from https://benchmark.ini.rub.de",
        "see the page",
    ),
    "mscoco": _meta(
        Layout(
            needs=("train2017", "annotations/instances_train2017.json"),
            load=loader_of(annotations.coco),
            folders=("mscoco", ""),
        ),
        "mscoco",
        "train2017.zip (18 GB) and annotations_trainval2017.zip from https://cocodataset.org",
        "annotations CC BY 4.0, images as on Flickr",
    ),
}

_DOMAIN_NET = {
    domain: Dataset(
        layouts=(
            Layout(
                needs=(domain, f"{domain}_train.txt", f"{domain}_test.txt"),
                load=loader_of(partial(tables.domain_net, domain)),
            ),
        ),
        obtain=f"{domain}.zip, {domain}_train.txt and {domain}_test.txt (cleaned version) from http://ai.bu.edu/M3SDA/",
        terms="research, non-commercial",
        parts=("train", "test"),
        home="domainnet",
    )
    for domain in _DOMAINS
}

_WILDS = {
    "iwildcam": _wilds(
        "iwildcam_v2.0",
        "metadata.csv",
        loader_of(wilds.iwildcam),
        ("train", "val", "test", "id_val", "id_test"),
        "12 GB",
        "CDLA-Permissive-1.0",
    ),
    "camelyon17": _wilds(
        "camelyon17_v1.0", "metadata.csv", loader_of(wilds.camelyon17), ("train", "id_val", "val", "test"), "11 GB", "CC0"
    ),
    "rxrx1": _wilds(
        "rxrx1_v1.0", "metadata.csv", loader_of(wilds.rxrx1), ("train", "val", "test", "id_test"), "7 GB", "CC BY-NC-SA 4.0"
    ),
    "fmow": _wilds(
        "fmow_v1.1",
        "rgb_metadata.csv",
        loader_of(wilds.fmow),
        ("train", "val", "test", "id_val", "id_test"),
        "54 GB",
        "FMoW Challenge Public License",
    ),
}

DATASETS: dict[str, Dataset] = {
    **_NAMED,
    **{f"{_META}/{name}": dataset for name, dataset in _META_TEN.items()},
    **{f"domainnet/{domain}": dataset for domain, dataset in _DOMAIN_NET.items()},
    **{f"wilds/{name}": dataset for name, dataset in _WILDS.items()},
}
"""Name → dataset."""

WITHOUT_CLASSES = {
    "wilds/poverty": "PovertyMap labels images with a number, not a class",
    "wilds/globalwheat": "GlobalWheat labels images with boxes, not a class",
}
"""Datasets one may look for here → why they cannot serve."""
