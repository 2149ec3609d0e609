"""A config's test pipeline: from a file to what its network sees, here or exported."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose

from mmcastling.errors import ConfigError
from mmcastling.export import UnsupportedModelError
from mmcastling.registry import type_name
from mmcastling.run.config import datasets_of
from mmcastling.runtime.images import read_image
from mmcastling.runtime.preprocess import PILLOW, STEPS

_ANNOTATIONS = {
    "FilterAnnotations": None,
    "LoadAnnotations": None,
    "LoadEmptyAnnotations": None,
    "LoadPanopticAnnotations": None,
}
_PACKING = {
    "Collect": None,
    "PackDetInputs": dict(meta_keys=None),
    "PackInputs": dict(input_key=("img",), algorithm_keys=None, meta_keys=None),
    "PackSegInputs": dict(meta_keys=None),
}
"""Steps that change no image, and their options with the values of which that is true;
None for all."""


class FilePipeline:
    """The config's own test pipeline for a file that has no annotations.

    Attributes:
        steps: Those behind reading, as the config has them.

    Raises:
        ConfigError: If the config has no test pipeline.
    """

    def __init__(self, cfg: Config) -> None:
        dataset = next(datasets_of(cfg, "test"), None)
        if dataset is None or not dataset.get("pipeline"):
            raise ConfigError(
                f"config {cfg.filename} has no test_dataloader with a pipeline, which "
                "says how an image reaches the network: start from a config that has"
            )
        steps = copy.deepcopy(dataset.pipeline)
        steps = [s for s in steps if type_name(s["type"]) not in _ANNOTATIONS]
        reading = [s for s in steps if type_name(s["type"]).startswith("Load")]
        self.steps: list[ConfigDict] = [s for s in steps if s not in reading]
        self._reading = reading
        self._read, self._change = Compose(reading), Compose(self.steps)

    def read(self, path: str | os.PathLike[str]) -> np.ndarray:
        """The image of a file ``(H, W, C)`` or ``(H, W)``, as the config reads it.

        Raises:
            UserError: If that fails.
        """
        if not self._reading or not os.path.isfile(path):
            return read_image(path)
        try:
            return self._read(dict(img_path=str(path), img_id=0))["img"]
        except Exception as error:  # of whatever reads
            raise ConfigError(
                f"image {path} ({os.path.getsize(path)} bytes) cannot be read by the "
                f"config's {self._reading}: {error or type(error).__name__}"
            ) from error

    def __call__(self, image: np.ndarray) -> dict[str, Any]:
        """An image that has been read, as the network's data preprocessor takes it."""
        shape = image.shape[:2]
        packed = self._change(
            dict(img=image, img_shape=shape, ori_shape=shape, img_id=0, img_path="")
        )
        if packed is None:
            raise ConfigError("the config's test pipeline drops the image")
        return packed


def runtime_steps(cfg: Config) -> Iterator[dict[str, Any]]:
    """The steps of the test pipeline that change the image, as plain values.

    Raises:
        UnsupportedModelError: If :mod:`mmcastling.runtime` does not know a step, or a
            value of one of its options.
    """
    for step in next(datasets_of(cfg, "test"), {}).get("pipeline") or []:
        name = type_name(step["type"])
        options = {key: _plain(step[key]) for key in step if key != "type"}
        if name in _ANNOTATIONS:
            continue
        if name in _PACKING:
            if _unknown(options, _PACKING[name]):
                _refuse(step, _unknown(options, _PACKING[name]))
            continue
        if name not in STEPS:
            _refuse(step, {})
        if name == "Resize" and isinstance(options.get("scale"), int):
            options["scale"] = (options["scale"], options["scale"])
        known = STEPS[name]
        idle = dict.fromkeys(known.no_image)
        if unknown := _unknown(options, {**known.options, **idle}):
            _refuse(step, unknown)
        pillow = options.get("backend") == "pillow"
        if pillow and options.get("interpolation", "bilinear") not in PILLOW:
            _refuse(step, {"interpolation": options["interpolation"]})
        if name == "Resize" and not isinstance(options.get("scale"), tuple):
            _refuse(step, {"scale": options.get("scale")})
        yield dict(
            type=name, **{k: v for k, v in options.items() if k in known.options}
        )


def _unknown(
    options: dict[str, Any], known: Mapping[str, tuple[Any, ...] | None] | None
) -> dict[str, Any]:
    """The options that are not known, or have a value that is not."""
    if known is None:
        return {}
    return {
        name: value
        for name, value in options.items()
        if name not in known or (known[name] is not None and value not in known[name])
    }


def _refuse(step: dict[str, Any], unknown: dict[str, Any]) -> None:
    options = ", ".join(f"{name}={value!r}" for name, value in unknown.items())
    raise UnsupportedModelError(
        f"the test pipeline has the step {dict(step)}, which the runtime does not do"
        f"{f' with {options}' if unknown else ''}: use {', '.join(STEPS)} (Resize with "
        "scale=(W, H)), or set another pipeline with --cfg-options"
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value
