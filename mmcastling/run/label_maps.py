"""What a segmentation config says of its label maps, and their check."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmcastling.data import SegmentationFormatError, check_segmentation
from mmcastling.data.image_sizes import is_upright
from mmcastling.errors import ConfigError
from mmcastling.registry import type_name

IGNORED = 255
"""mmseg's label of pixels that neither loss nor metric counts, unless a config says
otherwise."""


def check_label_maps(
    model: dict[str, Any],
    dataset: dict[str, Any],
    kind: type,
    classes: tuple[str, ...] | None,
) -> None:
    """Check the split of one dataset: every image's size and every label map.

    The heads in the model's config must have as many classes as the dataset's, which is
    of mmseg's ``BaseSegDataset`` or a subclass. A split that is missing or malformed is
    a :class:`SegmentationFormatError`.
    """
    if not classes:
        raise ConfigError(
            f"the dataset {dataset['type']} has no classes: give their names with "
            "metainfo=dict(classes=(...))"
        )
    ignored = _check_heads(model, len(classes))
    # A subset of a dataset's classes is picked from maps that hold all of them.
    known = (getattr(kind, "METAINFO", None) or {}).get("classes")
    ids = len(known or classes)
    first = int(bool(_option(kind, dataset, "reduce_zero_label", False)))
    allowed = {*range(first + ids), *ignored}
    void = " or ".join(map(str, sorted(ignored)))
    meaning = (
        f"{'0 for none, ' if first else ''}{first} to {first + ids - 1} for the {ids} "
        f"classes, or {void} where nothing is labelled"
    )
    root = dataset.get("data_root") or ""
    prefix = dataset["data_prefix"]
    check_segmentation(
        os.path.join(root, prefix.get("img_path") or ""),
        os.path.join(root, prefix["seg_map_path"] or ""),
        allowed=allowed,
        meaning=f"{meaning} (classes and ignore_index of the config)",
        image_suffix=_option(kind, dataset, "img_suffix", ".jpg"),
        label_suffix=_option(kind, dataset, "seg_map_suffix", ".png"),
        names=_listed(root, dataset.get("ann_file") or ""),
        upright=is_upright(loading_of(dataset)),
    )


def loading_of(dataset: dict[str, Any]) -> dict[str, Any]:
    """The step of a dataset's pipeline that reads images; empty where it has none."""
    return step_of(dataset, "LoadImageFromFile")


def step_of(dataset: dict[str, Any], name: str) -> dict[str, Any]:
    """The first step of a dataset's pipeline of that type; empty where it has none."""
    steps = dataset.get("pipeline") or []
    return next((s for s in steps if type_name(s["type"]) == name), {})


def _check_heads(model: dict[str, Any], count: int) -> set[int]:
    """Compare the heads' number of classes; the labels that they pass over."""
    ignored = set()
    model = model.get("module", model)  # inside what averages augmented views
    for key in ("decode_head", "auxiliary_head"):
        heads = model.get(key) or []
        for head in heads if isinstance(heads, (list, tuple)) else [heads]:
            classes = head.get("num_classes")
            if classes is not None and classes != count:
                raise ConfigError(
                    f"{key}.num_classes is {classes}, but the data has {count} "
                    "classes: set them alike"
                )
            ignored.add(head.get("ignore_index", IGNORED))
    return ignored or {IGNORED}


def _option(kind: type, dataset: dict[str, Any], name: str, default: Any) -> Any:
    """A dataset's argument: from the config, or the default of the nearest class."""
    if name in dataset:
        return dataset[name]
    for cls in inspect.getmro(kind):
        parameters = inspect.signature(cls.__init__).parameters
        if name in parameters:
            return parameters[name].default
    return default


def _listed(root: str, ann_file: str) -> Iterator[str] | None:
    """Names in a split's list, or None where the folder is the split."""
    path = Path(root, ann_file)
    if not ann_file or path.is_dir():
        return None
    if not path.is_file():
        raise SegmentationFormatError(
            f"the split's list {path} does not exist: set ann_file to a file with a "
            "name a line, or leave it out to take the whole folder"
        )
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]
