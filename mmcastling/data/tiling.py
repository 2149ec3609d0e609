"""Cut outlined objects of a large image into COCO annotations of small tiles.

Coordinates are pixels of the large image, x to the right and y down, with integer
values on pixel borders: a tile at ``(x, y)`` covers ``[x, x + size) x [y, y + size)``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

# A nucleus of which less than this fraction lies inside the tile, or whose visible
# part is smaller than this, cannot be told from the background by its pixels alone.
MIN_KEPT_FRACTION = 0.15
MIN_AREA = 12.0  # px^2
# Parts below one pixel are artefacts of the cut and may not rasterise to anything.
MIN_PART_AREA = 1.0  # px^2


@dataclass(frozen=True)
class Tile:
    """A square window of a slide, in pixels of the slide."""

    slide: str
    x: int
    y: int
    size: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """``(x1, y1, x2, y2)``, the far corner exclusive."""
        return self.x, self.y, self.x + self.size, self.y + self.size

    def overlaps(self, other: "Tile") -> bool:
        """Whether the two tiles share at least one pixel of the same slide."""
        return (
            self.slide == other.slide
            and self.box[0] < other.box[2]
            and other.box[0] < self.box[2]
            and self.box[1] < other.box[3]
            and other.box[1] < self.box[3]
        )


@dataclass(frozen=True)
class Piece:
    """The part of one object that lies in a tile, in pixels of the tile.

    Args:
        polygons: One flat list ``[x0, y0, x1, y1, ...]`` per connected part.
        bbox: Tight box ``[x, y, width, height]`` around all parts.
        area: Area of all parts, px^2.
        is_sliver: Too little of the object is visible to ask for it.
    """

    polygons: list[list[float]]
    bbox: list[float]
    area: float
    is_sliver: bool


def grid_tiles(
    slide: str, x_range: tuple[int, int], y_range: tuple[int, int], size: int, step: int
) -> Iterator[Tile]:
    """Yield the tiles that lie wholly inside a rectangle, row by row.

    Args:
        slide: Name of the slide, copied to each tile.
        x_range: First column and the column after the last.
        y_range: First row and the row after the last.
        size: Side of a tile.
        step: Distance between neighbouring tiles.
    """
    for y in range(y_range[0], y_range[1] - size + 1, step):
        for x in range(x_range[0], x_range[1] - size + 1, step):
            yield Tile(slide, x, y, size)


def cut_pieces(outlines: Sequence[BaseGeometry], tile: Tile) -> list[Piece]:
    """Cut the outlines that reach into a tile.

    Args:
        outlines: Polygons without holes, in pixels of the slide.
        tile: The window to cut with.

    Returns:
        One piece for each outline with at least ``MIN_PART_AREA`` inside, in the order
        of ``outlines``; an outline that the border cuts apart gives several polygons.
    """
    window = shapely.box(*tile.box)
    pieces = []
    for index in np.flatnonzero(shapely.intersects(outlines, window)):
        # Normalised, because the first corner that a cut reports is GEOS's own choice.
        cut = shapely.normalize(shapely.intersection(outlines[index], window))
        kept = [_ring(part, tile) for part in _polygon_parts(cut)]
        if kept:
            pieces.append(_piece(kept, outlines[index].area))
    return pieces


def to_annotation(piece: Piece, **ids: Any) -> dict[str, Any]:
    """Return the COCO annotation of a piece; slivers are marked ``iscrowd``."""
    return {
        **ids,
        "iscrowd": int(piece.is_sliver),
        "bbox": piece.bbox,
        "area": piece.area,
        "segmentation": piece.polygons,
    }


def _polygon_parts(geometry: BaseGeometry) -> list[BaseGeometry]:
    # A cut along an edge may also return lines and points, which enclose nothing.
    parts = shapely.get_parts(geometry)
    return [
        part
        for part in parts
        if part.geom_type == "Polygon" and part.area >= MIN_PART_AREA
    ]


def _ring(polygon: BaseGeometry, tile: Tile) -> np.ndarray:
    """Corners of a part in tile pixels, ``(P, 2)``, without the repeated last one."""
    corners = np.asarray(polygon.exterior.coords)[:-1] - (tile.x, tile.y)
    corners = corners.round(2)
    fresh = np.any(corners != np.roll(corners, 1, axis=0), axis=1)
    return corners[fresh]


def _piece(rings: list[np.ndarray], full_area: float) -> Piece:
    # Box and area are taken after rounding, so they describe what the file holds.
    corners = np.concatenate(rings)
    low, high = corners.min(axis=0), corners.max(axis=0)
    area = sum(shapely.Polygon(ring).area for ring in rings)
    return Piece(
        polygons=[ring.ravel().tolist() for ring in rings],
        bbox=np.concatenate([low, high - low]).round(2).tolist(),
        area=round(float(area), 2),
        is_sliver=area < MIN_AREA or area < MIN_KEPT_FRACTION * full_area,
    )
