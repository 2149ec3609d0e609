"""From a config file and the command line to a config that is ready to run.

Everything that can be wrong about the inputs is found here, before a work directory
is touched or a model is built.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.fileio import list_from_file
from mmengine.registry import DATASETS, init_default_scope

from mmcastling.compat.coco_eval import read_byte_order_marks
from mmcastling.data import DatasetError, check_coco
from mmcastling.data.image_sizes import is_upright
from mmcastling.errors import ConfigError
from mmcastling.run.arguments import DATA_VARIABLE
from mmcastling.run.label_maps import check_label_maps, loading_of, step_of

HOW_TO_GET = {
    "ADEChallengeData2016": "get ADE20K (images/, annotations/) from the MIT Scene "
    "Parsing challenge",
    "camvid": "get CamVid (images/ and annotations/, each with train/ and val/), "
    "labelled as for SegNet",
    "coco": "get COCO 2017 (train2017/, val2017/, annotations/) from cocodataset.org",
    "dsb2018": "make it of a clone of the source with: python "
    "tools/data/prepare_dsb2018.py",
    "imagenet": "get ImageNet-1k (train/, val/, a folder a class) from image-net.org",
    "nuclei": "make it with: python tools/data/prepare_nuclei.py",
}


def load_config(
    path: str | os.PathLike[str],
    options: dict[str, Any] | None = None,
    work_dir: str | None = None,
) -> Config:
    """Load a config of any OpenMMLab toolbox and settle its data and work directory.

    Args:
        path: The config file.
        options: What ``--cfg-options`` gave. ``data_root``, or the folder that
            :data:`DATA_VARIABLE` names in place of ``data``, moves every path of the
            config that lies in its data root. Defaults to None.
        work_dir: Overrides the config's; ``work_dirs/<name of the config>`` without
            either. Defaults to None.

    Raises:
        ConfigError: If the file cannot be read, or an option does not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config {path} does not exist: check the path")
    try:
        cfg = Config.fromfile(path)
    except Exception as error:
        # MMEngine hides which module was not found, and perhaps where ours has moved.
        cause: BaseException | None = error
        while not isinstance(cause, ModuleNotFoundError | None):
            cause = cause.__cause__ or cause.__context__
        raise ConfigError(f"config {path} cannot be read: {cause or error}") from error
    options = dict(options or {})
    new_root = options.pop("data_root", None)
    old_root = cfg.get("data_root")
    if new_root is not None and old_root is None:
        raise ConfigError(f"config {path} has no data_root that could be set")
    if new_root is None and DATA_VARIABLE in os.environ and old_root is not None:
        parts = Path(old_root).parts
        if parts[:1] != ("data",):
            raise ConfigError(
                f"{DATA_VARIABLE} stands for the folder 'data', but the config's "
                f"data_root is {old_root!r}: set it with --cfg-options data_root=..."
            )
        new_root = Path(os.environ[DATA_VARIABLE], *parts[1:])
    if new_root is not None:
        _move_paths(cfg._cfg_dict, old_root, str(new_root))
    try:
        cfg.merge_from_dict(options)
    except (TypeError, KeyError, AssertionError, IndexError) as error:
        raise ConfigError(f"--cfg-options do not fit {path}: {error}") from error
    require(cfg, "model")
    default = Path("work_dirs") / path.stem
    cfg.work_dir = str(work_dir or cfg.get("work_dir") or default)
    scope = cfg.get("default_scope", "mmengine")
    try:
        importlib.import_module(scope)
    except ImportError as error:
        raise ConfigError(
            f"the config's default_scope {scope!r} cannot be imported: {error}"
        ) from error
    init_default_scope(scope)
    return cfg


def require(cfg: Config, *keys: str) -> None:
    """Raise a :class:`ConfigError` where a config lacks one of these settings."""
    missing = [key for key in keys if cfg.get(key) is None]
    if missing:
        raise ConfigError(
            f"config {cfg.filename} lacks {', '.join(missing)}: start from a config "
            "that has them, by _base_=[...]"
        )


def _move_paths(node: Any, old: str, new: str) -> Any:
    """A setting with what lies in the old folder moved to the new one."""
    old, new = old.rstrip("/"), new.rstrip("/")
    if isinstance(node, str) and f"{node}/".startswith(f"{old}/"):
        return new + node[len(old) :]
    if isinstance(node, dict):
        for key in node:
            node[key] = _move_paths(node[key], old, new)
    elif isinstance(node, list):
        node[:] = [_move_paths(value, old, new) for value in node]
    return node


def datasets_of(cfg: Config, split: str) -> Iterator[ConfigDict]:
    """The datasets of a split (``'train'``, ``'val'``, ``'test'``), inside wrappers."""
    loader = cfg.get(f"{split}_dataloader")
    stack = [loader["dataset"]] if loader else []
    while stack:
        dataset = stack.pop()
        inner = dataset.get("dataset", dataset.get("datasets"))
        if inner is None:
            yield dataset
        else:
            stack.extend(inner if isinstance(inner, list) else [inner])


def dataset_class(dataset: dict[str, Any]) -> type | None:
    """The class of a dataset's config, looked up in the toolbox that is in use."""
    kind = dataset.get("type")
    if not isinstance(kind, str):
        return kind
    with DATASETS.switch_scope_and_registry(None) as registry:
        return registry.get(kind)


def dataset_meta(
    dataset: dict[str, Any], checkpoint: dict[str, Any] | None = None
) -> dict[str, Any]:
    """``classes`` and ``palette``, tuples or None: what a config's dataset is of.

    The ``meta`` of a loaded checkpoint wins over the config, and the config over the
    dataset's class. Classes may be a file with a name a line, as for MMEngine; any
    other value that is no sequence of names is a :class:`ConfigError`.
    """
    given = dict(dataset.get("metainfo") or {})
    if dataset.get("classes") is not None:  # of mmpretrain
        given["classes"] = dataset["classes"]
    if unread := {"CLASSES", "PALETTE"} & set(given):
        raise ConfigError(
            f"metainfo of the dataset has {sorted(unread)}, which no toolbox reads: "
            "write it in small letters"
        )
    if given.get("classes") is not None:
        given["classes"] = _class_names(given["classes"])
    sources = (
        getattr(dataset_class(dataset), "METAINFO", None),
        given,
        ((checkpoint or {}).get("meta") or {}).get("dataset_meta"),
    )
    classes = palette = None
    for source in sources:
        found = {key.lower(): value for key, value in (source or {}).items()}
        names, colours = found.get("classes"), found.get("palette")
        if isinstance(names, (list, tuple)) and tuple(names) != classes:
            classes, palette = tuple(names), None
        if isinstance(colours, (list, tuple)):
            palette = tuple(map(tuple, colours))
    return dict(classes=classes, palette=palette)


def _class_names(value: Any) -> tuple[str, ...]:
    if isinstance(value, (list, tuple)) and all(isinstance(n, str) for n in value):
        return tuple(value)
    if isinstance(value, str):
        try:
            return tuple(list_from_file(value))
        except (TypeError, OSError, UnicodeDecodeError):
            raise ConfigError(
                f"the dataset's classes are the text {value!r}, which names no file; "
                f"expected a tuple of names, such as ({value!r},) with a comma, or the "
                "path of a file with a name a line"
            ) from None
    raise ConfigError(
        f"the dataset's classes are {value!r}; expected a tuple of names, "
        "metainfo=dict(classes=('cat', 'dog'))"
    )


def has_data(cfg: Config, split: str) -> bool:
    """Whether every data folder that a split reads exists."""
    roots = [dataset.get("data_root") or "." for dataset in datasets_of(cfg, split)]
    return bool(roots) and all(Path(root).is_dir() for root in roots)


def check_data(cfg: Config, *splits: str) -> list[str]:
    """Check that the data of these splits is there and well-formed.

    COCO annotations and the label maps of segmentation are read. What is missing or
    malformed is a :class:`DatasetError`; classes that cannot be, and a segmentation
    head with another number of them, are a :class:`ConfigError`. Returns warnings.
    """
    read_byte_order_marks()
    seen: set[tuple] = set()
    warnings: list[str] = []
    for split, dataset in (
        (s, dataset) for s in splits for dataset in datasets_of(cfg, s)
    ):
        root = dataset.get("data_root") or ""
        if root and not Path(root).is_dir():
            raise DatasetError(_missing_root(root))
        prefix = dataset.get("data_prefix") or {}
        ann_file = os.path.join(root, dataset.get("ann_file") or "")
        classes = dataset_meta(dataset)["classes"]
        if "seg_map_path" in prefix:
            if (kind := dataset_class(dataset)) is not None:  # else building says so
                check_label_maps(cfg.model, dataset, kind, classes)
        elif ann_file.endswith(".json"):
            if "img" not in prefix and _is_coco(dataset):
                raise ConfigError(
                    "the dataset has no folder of images, which mmdet asks for: set "
                    "data_prefix=dict(img='train/'), or img='' for its data_root"
                )
            what = dict(
                image_dir=os.path.join(root, prefix.get("img", "")),
                classes=classes,
                masks=_asks_for_masks(cfg, split),
                evaluated=split != "train",
                upright=is_upright(loading_of(dataset)),
                polygons=not step_of(dataset, "LoadAnnotations").get("poly2mask", True),
            )
            if (key := (ann_file, *what.values())) not in seen:
                seen.add(key)
                warnings += check_coco(ann_file, **what)
    return list(dict.fromkeys(warnings))


def _is_coco(dataset: dict[str, Any]) -> bool:
    kinds = getattr(dataset_class(dataset), "__mro__", ())
    return "CocoDataset" in [kind.__name__ for kind in kinds]


def _asks_for_masks(cfg: Config, split: str) -> bool:
    """Whether a step of a split's pipelines, or its metric, needs masks."""
    stack = [cfg.get(f"{split}_dataloader"), cfg.get(f"{split}_evaluator")]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            if node.get("with_mask") or "segm" in (node.get("metric") or []):
                return True
            stack.extend(node.values())
        elif isinstance(node, (list, tuple)):
            stack.extend(node)
    return False


def _missing_root(root: str) -> str:
    parts = Path(root).parts
    name = Path(*parts[1:]) if parts[0] == "data" and parts[1:] else Path(root).name
    how = HOW_TO_GET.get(Path(root).name)
    return (
        f"the data folder {root} does not exist: {f'{how}, or ' if how else ''}point "
        f"to yours with --cfg-options data_root=FOLDER, or with {DATA_VARIABLE}=FOLDER "
        f"where FOLDER/{name} is it"
    )
