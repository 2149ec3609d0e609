"""Models of other libraries by a name, as the commands take them.

``timm:NAME``, ``torchvision:NAME``, and ``hf:FOLDER`` for what transformers has saved.
A library is imported when one of its models is asked for.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mmcastling.analysis import input_channels
from mmcastling.castle import castle as castle_model
from mmcastling.castle import castled_from_pretrained
from mmcastling.checkpoint import load_checkpoint, load_weights, read_safetensors
from mmcastling.deploy import is_deployed
from mmcastling.errors import OptionError, UnavailableError
from mmcastling.verbs import restore_mask, switch_to_deploy

logger = logging.getLogger("mmcastling")

CASTLE_META_KEY = "castle"
"""Where a checkpoint's ``meta`` holds the options that its model was castled with."""

# What lets models of timm take images of other sizes than they were built for.
_ANY_SIZE = (
    dict(dynamic_img_size=True, dynamic_img_pad=True),
    dict(dynamic_img_size=True),
    dict(strict_img_size=False),
    {},
)


def is_model_name(name: str) -> bool:
    """Whether a command's MODEL names a library's model, and no config."""
    return name.partition(":")[0] in _BUILDERS


def build_named_model(
    name: str,
    checkpoint: str | None = None,
    *,
    castle: dict[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """Build a model of another library, in evaluation mode.

    Weights are those of the checkpoint; without one they are random for timm and
    torchvision, which the log says, and the folder's for transformers. Where a library
    can build a model for images of any size, it does.

    Args:
        name: ``'timm:NAME'``, ``'torchvision:NAME'`` or ``'hf:FOLDER'``, where
            transformers has saved a model.
        checkpoint: A file of weights, ``.safetensors`` or torch's, whose names and
            shapes must be the model's. If its ``meta`` has ``castle``, the model is
            castled with these options first; if it has been deployed, deployed.
        castle: Options of :func:`mmcastling.castle` to castle the model with before
            the weights are loaded, of a folder too. Defaults to None (what the
            checkpoint says).
        **options: Arguments of the library's model, such as ``num_classes``.

    Raises:
        OptionError: If the name or an option is not known; says what resembles it.
        UnavailableError: If the library is not installed; says what to install.
        CheckpointError: If the checkpoint cannot be read, or does not fit.
    """
    library, _, rest = name.partition(":")
    if library not in _BUILDERS or not rest:
        raise OptionError(
            f"{name!r} names no model: give timm:NAME, torchvision:NAME, or hf:FOLDER"
        )
    state = None if checkpoint is None else read_checkpoint(checkpoint)
    if library == "hf" and state is None and castle is not None:
        return _hf(rest, options, castle).eval()
    model = _BUILDERS[library](rest, options)
    if state is not None:
        meta = state.get("meta") or {}
        castle = meta.get(CASTLE_META_KEY) if castle is None else castle
    elif library != "hf":
        logger.warning("%s has random weights, as no checkpoint was given", name)
    if castle is not None:
        castle_model(model, **castle)
    if state is not None:
        if is_deployed(state):
            switch_to_deploy(model, inplace=True)
        restore_mask(model, state)
        load_weights(model, state, str(checkpoint))
    return model.eval()


def image_shape(
    model: nn.Module, size: Sequence[int] | None = None
) -> tuple[int, int, int]:
    """``(C, H, W)`` of an image for a model: of this size, or its own, or 224x224."""
    if size is None:
        timms = (getattr(model, "default_cfg", None) or {}).get("input_size")
        others = getattr(getattr(model, "config", None), "image_size", None)
        own = timms[-2:] if timms else others or getattr(model, "image_size", 224)
        size = (own, own) if isinstance(own, int) else own
    if len(size) != 2 or min(size) < 1:
        raise OptionError(f"size {tuple(size)}: give a height and a width, above 0")
    return input_channels(model), int(size[0]), int(size[1])


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of any library with its weights under ``state_dict``."""
    if Path(path).suffix == ".safetensors":
        return {"state_dict": read_safetensors(Path(path))}
    state = load_checkpoint(path)
    if "state_dict" not in state and isinstance(state.get("model"), dict):
        state = {**state, "state_dict": state["model"]}
    return state


def _timm(name: str, options: dict[str, Any]) -> nn.Module:
    timm = _library("timm", "timm")
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    for flexible in _ANY_SIZE:
        try:
            return timm.create_model(name, **{**flexible, **options})
        except TypeError as error:  # of a class that does not take one of them
            if not flexible:
                raise _refused(name, options, error) from error
        except (ValueError, RuntimeError) as error:
            raise _refused(name, options, error) from error
    raise AssertionError("the last one raises")


def _torchvision(name: str, options: dict[str, Any]) -> nn.Module:
    models = _library("torchvision", "torchvision").models
    if name not in models.list_models():
        raise _unknown("torchvision", name, models.list_models())
    builder = models.get_model_builder(name)
    if "weights_backbone" in inspect.signature(builder).parameters:
        options = {"weights_backbone": None, **options}  # else it is downloaded
    try:
        return builder(**options)
    except (TypeError, ValueError) as error:
        raise _refused(name, options, error) from error


def _hf(
    folder: str, options: dict[str, Any], castle: dict[str, Any] | None = None
) -> nn.Module:
    transformers = _library("transformers", "hf")
    if not (Path(folder) / "config.json").is_file():
        raise OptionError(
            f"hf:{folder} is no folder with a config.json: give one that "
            "save_pretrained has written"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        (kind, *_) = config.architectures or ["AutoModel"]
        if hasattr(config, "vision_config"):  # of its images alone
            kind = re.sub(r"(Vision)?(Model|For\w+)(WithProjection)?$", "", kind)
            kind += "VisionModel"
        if not hasattr(transformers, kind):
            raise OptionError(f"transformers {transformers.__version__} has no {kind}")
        kind = getattr(transformers, kind)
        if castle is None:
            model = kind.from_pretrained(folder, local_files_only=True, **options)
        else:
            model = castled_from_pretrained(kind, folder, **castle)
    except (OSError, TypeError, ValueError) as error:
        raise _refused(f"hf:{folder}", options, error) from error
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        model.register_forward_pre_hook(_any_size, with_kwargs=True)
    return model


def _any_size(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return args, {"interpolate_pos_encoding": True, **kwargs}


_BUILDERS = {"timm": _timm, "torchvision": _torchvision, "hf": _hf}


def _library(name: str, prefix: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(
            f"{prefix}: models need {name} ({error}): pip install {name}"
        ) from error


def _unknown(library: str, name: str, known: Iterable[str]) -> OptionError:
    close = difflib.get_close_matches(name, list(known), n=5, cutoff=0.5)
    hint = f"do you mean {' or '.join(close)}?" if close else "see its list_models()"
    return OptionError(f"{library} has no model {name!r}: {hint}")


def _refused(name: str, options: dict[str, Any], error: Exception) -> OptionError:
    given = f" with {options}" if options else ""
    return OptionError(f"{name} cannot be built{given}: {error}")
