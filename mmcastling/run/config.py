"""From a config file and the command line to a config that is ready to run.

Everything that can be wrong about the inputs is found here, before a work directory
is touched or a model is built.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, init_default_scope

from mmcastling.data import DatasetError, check_coco
from mmcastling.errors import ConfigError
from mmcastling.run.label_maps import check_label_maps, is_segmentation

DATA_VARIABLE = "MMCASTLING_DATA"
"""Environment variable that names the folder standing for ``data/`` in all configs."""

HOW_TO_GET = {
    "ADEChallengeData2016": "get ADE20K (images/, annotations/) from the MIT Scene "
    "Parsing challenge",
    "camvid": "get CamVid (images/ and annotations/, each with train/ and val/), "
    "labelled as for SegNet",
    "coco": "get COCO 2017 (train2017/, val2017/, annotations/) from cocodataset.org",
    "imagenet": "get ImageNet-1k (train/, val/, a folder a class) from image-net.org",
    "nuclei": "make it with: python tools/data/prepare_nuclei.py",
}


def load_config(
    path: str | os.PathLike[str],
    options: dict[str, Any] | None = None,
    work_dir: str | None = None,
) -> Config:
    """Load a config of any OpenMMLab toolbox and settle its data and work directory.

    ``data_root`` among the options, or the folder that :data:`DATA_VARIABLE` names in
    place of ``data``, moves every path of the config that lies in its data root.

    Args:
        path: The config file.
        options: What ``--cfg-options`` gave. Defaults to None.
        work_dir: Overrides the config's; ``work_dirs/<name of the config>`` without
            either. Defaults to None.

    Raises:
        ConfigError: If the file is missing or cannot be read, or an option does not
            fit.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config {path} does not exist: check the path")
    try:
        cfg = Config.fromfile(path)
    except Exception as error:
        raise ConfigError(f"config {path} cannot be read: {error}") from error
    options = dict(options or {})
    new_root = options.pop("data_root", None)
    old_root = cfg.get("data_root")
    if new_root is not None and old_root is None:
        raise ConfigError(f"config {path} has no data_root that could be set")
    if new_root is None and DATA_VARIABLE in os.environ and old_root is not None:
        new_root = _below_data_folder(old_root, os.environ[DATA_VARIABLE])
    if new_root is not None:
        _move_paths(cfg._cfg_dict, old_root, str(new_root))
    try:
        cfg.merge_from_dict(options)
    except (TypeError, KeyError, AssertionError, IndexError) as error:
        raise ConfigError(f"--cfg-options do not fit {path}: {error}") from error
    require(cfg, "model")
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = str(Path("work_dirs") / path.stem)
    _import_toolbox(cfg)
    return cfg


def require(cfg: Config, *keys: str) -> None:
    """Raise unless a config has each of these settings.

    Raises:
        ConfigError: If one is missing or None.
    """
    missing = [key for key in keys if cfg.get(key) is None]
    if missing:
        raise ConfigError(
            f"config {cfg.filename} lacks {', '.join(missing)}: start from a config "
            "that has them, by _base_=[...]"
        )


def _import_toolbox(cfg: Config) -> None:
    scope = cfg.get("default_scope", "mmengine")
    try:
        importlib.import_module(scope)
    except ImportError as error:
        raise ConfigError(
            f"the config's default_scope {scope!r} cannot be imported: {error}"
        ) from error
    init_default_scope(scope)


def _below_data_folder(root: str, folder: str) -> str:
    parts = Path(root).parts
    if parts[:1] != ("data",):
        raise ConfigError(
            f"{DATA_VARIABLE} stands for the folder 'data', but the config's data_root "
            f"is {root!r}: set it with --cfg-options data_root=..."
        )
    return str(Path(folder).joinpath(*parts[1:]))


def _move_paths(node: Any, old: str, new: str) -> None:
    old_bare, new_bare = old.rstrip("/"), new.rstrip("/")

    def moved(value: Any) -> Any:
        if isinstance(value, str) and f"{value}/".startswith(f"{old_bare}/"):
            return new_bare + value[len(old_bare) :]
        if not isinstance(value, str):
            _move_paths(value, old, new)
        return value

    if isinstance(node, dict):
        for key in node:
            node[key] = moved(node[key])
    elif isinstance(node, list):
        node[:] = [moved(value) for value in node]


def datasets_of(cfg: Config, split: str) -> Iterator[ConfigDict]:
    """Yield the dataset configs of a split's dataloader, inside any wrappers.

    Args:
        cfg: The config.
        split: ``'train'``, ``'val'`` or ``'test'``.
    """
    loader = cfg.get(f"{split}_dataloader")
    stack = [loader["dataset"]] if loader else []
    while stack:
        dataset = stack.pop()
        inner = dataset.get("dataset", dataset.get("datasets"))
        if inner is None:
            yield dataset
        else:
            stack.extend(inner if isinstance(inner, list) else [inner])


def has_data(cfg: Config, split: str) -> bool:
    """Whether every data folder that a split reads exists."""
    datasets = list(datasets_of(cfg, split))
    return bool(datasets) and all(
        Path(dataset.get("data_root") or ".").is_dir() for dataset in datasets
    )


def check_data(cfg: Config, *splits: str) -> None:
    """Check that a config's data is there and well-formed.

    COCO annotations and the label maps of segmentation are read.

    Args:
        cfg: A config from :func:`load_config`.
        *splits: The splits that will be used.

    Raises:
        DatasetError: If a folder is missing; says how to get it.
        CocoFormatError: If an annotation file is missing or malformed.
        SegmentationFormatError: If images or label maps are.
        ConfigError: If the heads have another number of classes than the data.
    """
    seen: set[str] = set()
    for split in splits:
        for dataset in datasets_of(cfg, split):
            root = dataset.get("data_root") or ""
            if root and not Path(root).is_dir():
                raise DatasetError(_missing_root(root))
            if is_segmentation(dataset):
                check_label_maps(cfg, dataset)
                continue
            ann_file = dataset.get("ann_file") or ""
            if Path(ann_file).suffix != ".json":
                continue
            ann_file = os.path.join(root, ann_file)
            if ann_file not in seen:
                seen.add(ann_file)
                images = (dataset.get("data_prefix") or {}).get("img", "")
                check_coco(
                    ann_file,
                    image_dir=os.path.join(root, images),
                    classes=_classes_of(dataset),
                )


def _missing_root(root: str) -> str:
    parts = Path(root).parts
    name = Path(*parts[1:]) if parts[0] == "data" and parts[1:] else Path(root).name
    how = HOW_TO_GET.get(Path(root).name)
    how = f"{how}, or " if how else ""
    return (
        f"the data folder {root} does not exist: {how}point to yours with "
        f"--cfg-options data_root=FOLDER, or with {DATA_VARIABLE}=FOLDER where FOLDER/"
        f"{name} is it"
    )


def _classes_of(dataset: ConfigDict) -> tuple[str, ...] | None:
    classes = (dataset.get("metainfo") or {}).get("classes")
    if classes is None:
        kind = DATASETS.get(dataset["type"])
        classes = getattr(kind, "METAINFO", {}).get("classes")
    return tuple(classes) if classes is not None else None


def check_work_dir(work_dir: str | os.PathLike[str]) -> None:
    """Create the work directory and prove that files can be written in it.

    Raises:
        ConfigError: If not.
    """
    try:
        Path(work_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=work_dir, prefix=".writable-") as file:
            file.write(b"1")
            file.flush()
    except OSError as error:
        raise ConfigError(
            f"the work directory {work_dir} cannot be written: {error}; choose another "
            "with --work-dir"
        ) from error
