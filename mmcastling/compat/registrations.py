"""Makes this package known to OpenMMLab and timm, where they have a place for it.

Each function is given the module of :data:`mmcastling.compat.on_import.AFTER_IMPORT`,
which has just been imported or was before. Its neighbours may be half imported then: so
nothing here imports a toolbox but what runs later.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import pickle
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

from torch import nn

from mmcastling.attention import TokenConv
from mmcastling.checkpoint import SAFE_GLOBALS, with_metadata
from mmcastling.compat import mmcv_ext, model_index, own_size
from mmcastling.verbs import copy_masks

# Whose inferencers know the models of a metafile; mmpretrain's have a way of their own.
METAFILES = {
    "mmdet": "configs/metafile_detection.yml",
    "mmseg": "configs/metafile_segmentation.yml",
}
CLASSIFIERS = "configs/metafile_classification.yml"

# Tells our wrappers from those that others may have put around the same function.
_OURS = "_is_of_mmcastling"

TIMM_ARCHS = {
    "castling_vit": ("nano", "tiny", "small", "base", "large"),
    "castling_levit": ("128s", "128", "192", "256", "384"),
    "castling_mvit": ("tiny", "small", "base"),
}


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Put ``wrapper(theirs)`` around a function of a library, once."""
    theirs = getattr(owner, name)
    if not hasattr(theirs, _OURS):
        ours = functools.wraps(theirs)(wrapper(theirs))
        setattr(ours, _OURS, True)
        setattr(owner, name, ours)


def load_second_half_on_first_lookup(module: ModuleType) -> None:
    """Import all that a config can name when a registry is first asked for anything.

    Not before: the toolboxes, which it needs, may be half imported until then.
    """
    registry = module.Registry
    theirs = registry.get
    if hasattr(theirs, _OURS):
        return

    @functools.wraps(theirs)
    def get(self: Any, key: str) -> Any:
        registry.get = theirs  # what is imported may look things up itself
        try:
            _load_second_half()
        except BaseException:
            registry.get = get
            raise
        return theirs(self, key)

    setattr(get, _OURS, True)
    registry.get = get


def _load_second_half() -> None:
    importlib.import_module("mmcastling.train")
    if importlib.util.find_spec("mmpretrain") is not None:
        mmcv_ext.require_ops()
        importlib.import_module("mmcastling.models")


def name_packages(module: ModuleType) -> None:
    """Let MMEngine find configs by ``mmcastling::NAME`` and ``mmseg::NAME``."""
    packages = module.MODULE2PACKAGE
    packages.setdefault("mmcastling", "mmcastling")
    # MMEngine looks for the distribution "mmsegmentation"; the maintained one has
    # another name, and is found by that of its module.
    try:
        importlib.metadata.version(packages["mmseg"])
    except importlib.metadata.PackageNotFoundError:
        packages["mmseg"] = "mmseg"


def name_classifiers(module: ModuleType) -> None:
    """Name our classifiers in mmpretrain's ``get_model``, lists and inferencers."""
    folder = model_index.find_root()
    if folder is None:  # the package stands without configs
        return
    file = folder / CLASSIFIERS
    first = model_index.read(file)["Models"][0]["Name"]
    if not module.ModelHub.has(first):
        module.ModelHub.register_model_index(file, folder)


def name_models_in_inferencers(module: ModuleType) -> None:
    """Let MMEngine's inferencers find our models beside those of their toolbox.

    They read one list, that of the toolbox, and have no registry of further ones; so
    the function that reads it is wrapped, and ours follow what it yields.
    """
    inferencer = module.BaseInferencer
    theirs = inferencer._get_models_from_metafile
    if hasattr(theirs, _OURS):
        return

    @functools.wraps(theirs)
    def with_ours(dir: str) -> Iterator[dict[str, Any]]:
        yield from theirs(dir)
        folder = model_index.find_root()
        for toolbox, part in METAFILES.items() if folder else ():
            # A toolbox that is asked for its models has been imported.
            if sys.modules.get(toolbox) is not None and (
                dir == inferencer._get_repo_or_mim_dir(toolbox)
            ):
                for entry in model_index.read(folder / part)["Models"]:
                    yield {**entry, "Config": str(folder / entry["Config"])}

    setattr(with_ours, _OURS, True)
    inferencer._get_models_from_metafile = staticmethod(with_ours)


def keep_images_at_own_size(module: ModuleType) -> None:
    """Keep the padding of a batch out of what a detector finds in an image."""
    _wrap(module.BaseDetector, "forward", own_size.at_own_size)


def leave_out_what_transformers_5_breaks(module: ModuleType) -> None:
    """Let mmpretrain be imported beside transformers 5, without its multimodal models.

    They import what transformers 5 no longer has. Placeholders that say what to install
    stand in for them, as where transformers is missing.
    """
    if module.satisfy_requirement("transformers>=5"):
        module.WITH_MULTIMODAL = False


def drop_debug_messages(module: ModuleType) -> None:
    """Keep off the screen what the toolboxes print at debug level as they are imported.

    MMEngine prints whatever is for no logger, of any level.
    """

    def but_debug(theirs: Callable[..., None]) -> Callable[..., None]:
        def print_log(msg: Any, logger: Any = None, level: int = logging.INFO) -> None:
            if logger is not None or level > logging.DEBUG:
                theirs(msg, logger, level)

        return print_log

    _wrap(module, "print_log", but_debug)


def drop_warnings_for_torchao(module: ModuleType) -> None:
    """Keep off the screen what torch says to torchao, which transformers imports."""
    log = logging.getLogger("torch.utils._pytree")
    log.addFilter(lambda record: "register_constant() on Enum" not in str(record.msg))


def allow_history_in_checkpoints(module: ModuleType) -> None:
    """Let :func:`mmcastling.checkpoint.load_checkpoint` read MMEngine's history."""
    history = module.HistoryBuffer

    def statistic(owner: type, name: str) -> Any:
        # HistoryBuffer pickles its statistics as getattr(HistoryBuffer, name). The
        # general getattr would let a file reach any attribute of what it may name.
        if owner is not history or name not in ("min", "max", "mean", "current"):
            raise pickle.UnpicklingError(f"getattr of {name!r} is not allowed")
        return getattr(history, name)

    SAFE_GLOBALS.extend([history, (statistic, "builtins.getattr")])


def name_layers_in_counters(module: ModuleType) -> None:
    """Let thop and ptflops, which ask for exact classes, count our convolution too."""
    for table in ("register_hooks", "MODULES_MAPPING"):
        if rules := getattr(module, table, None):
            rules.setdefault(TokenConv, rules[nn.Conv2d])


def keep_metadata_in_mmengine(module: ModuleType) -> None:
    """Let weights whose names lose a prefix keep what their state dict says of modules.

    That is where the state of the masks is. MMEngine leaves these names with a prefix
    that the weights' have lost, or drops them.
    """

    def named_alike(load: Callable[..., Any]) -> Callable[..., Any]:
        def load_state_dict(module: Any, state_dict: Any, *args: Any, **kw: Any) -> Any:
            if not any(name.startswith("module.") for name in state_dict):
                state_dict = with_metadata(state_dict, state_dict)
            return load(module, state_dict, *args, **kw)

        return load_state_dict

    def kept(load_part: Callable[..., Any]) -> Callable[..., Any]:
        def load_with_prefix(prefix: str, *args: Any, **kwargs: Any) -> Any:
            read, whole = module._load_checkpoint, {}

            def reading(*args: Any, **kwargs: Any) -> Any:
                whole.update(checkpoint=read(*args, **kwargs))
                return whole["checkpoint"]

            with mock.patch.object(module, "_load_checkpoint", reading):
                part = load_part(prefix, *args, **kwargs)
            checkpoint = whole["checkpoint"]
            source = checkpoint.get("state_dict", checkpoint)
            return with_metadata(part, source, f"{prefix.removesuffix('.')}.")

        return load_with_prefix

    _wrap(module, "load_state_dict", named_alike)
    _wrap(module, "_load_checkpoint_with_prefix", kept)


def keep_metadata_in_timm(module: ModuleType) -> None:
    """The same for what timm loads, ``create_model(checkpoint_path=)`` for example."""

    def kept(clean: Callable[..., Any]) -> Callable[..., Any]:
        return lambda state_dict: with_metadata(clean(state_dict), state_dict)

    _wrap(module, "clean_state_dict", kept)


def let_averages_follow(module: ModuleType) -> None:
    """Let averaged copies of timm and torch have the masks of the model they follow."""
    for name in ("AveragedModel", "ModelEma", "ModelEmaV2", "ModelEmaV3"):
        if (kind := getattr(module, name, None)) is not None:
            method = "update_parameters" if name == "AveragedModel" else "update"
            _wrap(kind, method, _copying_masks)


def _copying_masks(update: Callable[..., Any]) -> Callable[..., Any]:
    def update_and_copy(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = update(self, model, *args, **kwargs)
        copy_masks(model, getattr(self, "module", None) or self.ema)
        return result

    return update_and_copy


def name_timm_models(module: ModuleType) -> None:
    """Register our classifiers: ``timm.create_model('castling_vit_small')``."""
    if importlib.util.find_spec("mmpretrain") is None:
        return  # which they are made of

    def entry(name: str) -> Callable[..., Any]:
        def create(pretrained: bool = False, **kwargs: Any) -> Any:
            models = importlib.import_module("mmcastling.models.timm_models")
            return models.create(name, pretrained, **kwargs)

        create.__name__ = create.__qualname__ = name
        create.__doc__ = f"{name} with its classifier, in timm's interface."
        return create

    for family, archs in TIMM_ARCHS.items():
        for arch in archs:
            name = f"{family}_{arch}"
            if not module.is_model(name):
                module.register_model(entry(name))
