"""What an exported file says about itself, beside its graph."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from mmcastling.errors import OptionError, UserError

METADATA_KEY = "mmcastling"
"""Under this key the file holds the metadata, as JSON."""

KINDS = ("backbone", "classifier", "detector", "module", "segmentor")


class ExportedModelError(UserError, RuntimeError):
    """An exported file that cannot be read or run, or an input that it cannot take."""


@dataclasses.dataclass(frozen=True)
class ExportMetadata:
    """What a process without the model's code must know to run an exported file.

    Attributes:
        kind: One of :data:`KINDS`. What a file returns, by name:

            - backbone: ``feature_0``, ``feature_1``, ... (B, C, h, w) or (B, C)
            - classifier: ``scores`` (B, classes), which sum to one
            - detector: ``boxes`` (N, 4) as x1, y1, x2, y2 in pixels of the network's
              input, ``scores`` (N,), ``labels`` (N,), and with masks ``masks`` (N, h,
              w), probabilities within each box; sorted by score, N may be 0
            - module: what it gives, by the names it has there; how its images are
              prepared, the file does not say
            - segmentor: ``logits`` (B, classes, H, W), as large as the input
        name: Class of the model, such as ``'MaskRCNN'``.
        outputs: Names of the outputs, in order.
        classes: Names of the classes; empty where unknown.
        palette: A colour ``(R, G, B)`` per class, or empty.
        mean: Subtracted from each channel of 0 to 255, after any change of order.
        std: Then divided by.
        to_rgb: Whether a BGR image becomes RGB first.
        pipeline: How an image becomes the network's, in order: steps as those of the
            config (``LoadImageFromFile``, ``Resize``, ``ResizeEdge``, ``CenterCrop``,
            ``Pad``).
        channels: Of the images that the graph takes.
        pad_size: Height and width are padded to these at least, and ...
        pad_divisor: ... to multiples of this ...
        pad_value: ... with this, after normalization.
        size_divisor: The graph takes heights and widths that are multiples of this.
        min_size: And no smaller ones.
        dynamic_batch: Whether it takes several images at once.
        mask_threshold: Pixels of a mask have at least this probability.
        segmentation: Of a segmentor: ``align_corners``, ``threshold`` of a binary one,
            and ``mode`` with ``crop_size`` and ``stride`` where it slides.
        precision: What the layers compute in.
        versions: Of the libraries that made the file.
    """

    kind: str
    name: str
    outputs: tuple[str, ...]
    classes: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    to_rgb: bool = False
    pipeline: tuple[dict[str, Any], ...] = ()
    channels: int = 3
    pad_size: tuple[int, int] | None = None
    pad_divisor: int = 1
    pad_value: float = 0.0
    size_divisor: int = 1
    min_size: int = 1
    dynamic_batch: bool = True
    mask_threshold: float = 0.5
    segmentation: dict[str, Any] = dataclasses.field(default_factory=dict)
    precision: str = "fp32"
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ExportedModelError(
                f"the file holds a model of kind {self.kind!r}, expected one of "
                f"{KINDS}: it was written by a newer version of mmcastling"
            )

    def to_json(self) -> str:
        """As text, to be kept in the file."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes | None, source: str) -> ExportMetadata:
        """Read what :meth:`to_json` wrote.

        Raises:
            ExportedModelError: If there is none, or it is of another version.
        """
        if not text:
            raise ExportedModelError(
                f"{source} says nothing about its model under {METADATA_KEY!r}: export "
                "it with tools/export.py"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        try:
            values = json.loads(text)
            if not isinstance(values, dict) or not values.keys() <= known:
                raise OptionError(f"expected {sorted(known)}")
            return cls(**{name: _tuples(value) for name, value in values.items()})
        except (TypeError, ValueError) as error:
            raise ExportedModelError(
                f"{source} says what this version of mmcastling cannot read about its "
                f"model ({error}): export it again"
            ) from error


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
