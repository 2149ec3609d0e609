"""Slides with outlined objects: read them, and cut the outlines into tiles.

Only here are pyarrow and shapely needed. Coordinates are pixels of the slide, x to the
right and y down, with integer values on pixel borders: a tile at ``(x, y)`` covers
``[x, x + size) x [y, y + size)``.
"""

import io
from typing import Any

import numpy as np
import pyarrow.parquet
import shapely
from PIL import Image

# An object of which less than this fraction lies inside the tile, or whose visible
# part is smaller than this, cannot be told from the background by its pixels alone.
MIN_KEPT_FRACTION = 0.15
MIN_AREA = 12.0  # px^2
# Parts below one pixel are artefacts of the cut and may not rasterise to anything.
MIN_PART_AREA = 1.0  # px^2


def load_slide(image: bytes, outlines: bytes) -> tuple[Image.Image, np.ndarray]:
    """Decode an image in RGB, and polygons from parquet with WKB under ``geometry``."""
    table = pyarrow.parquet.read_table(io.BytesIO(outlines), columns=["geometry"])
    picture = Image.open(io.BytesIO(image)).convert("RGB")
    return picture, shapely.from_wkb(table["geometry"].to_numpy())


def cut_pieces(outlines: np.ndarray, x: int, y: int, size: int) -> list[dict[str, Any]]:
    """Cut the outlines that reach into a tile.

    Args:
        outlines: Polygons without holes, in pixels of the slide.
        x: First column of the tile.
        y: First row of the tile.
        size: Side of the tile.

    Returns:
        COCO's ``segmentation``, ``bbox``, ``area`` and ``iscrowd``, in pixels of the
        tile, of each outline with at least ``MIN_PART_AREA`` inside, in the order of
        ``outlines``. One that the border cuts apart has several polygons; slivers,
        which show too little to ask for, are crowds.
    """
    window = shapely.box(x, y, x + size, y + size)
    pieces = []
    for index in np.flatnonzero(shapely.intersects(outlines, window)):
        # Normalised, because the first corner that a cut reports is GEOS's own choice.
        cut = shapely.normalize(shapely.intersection(outlines[index], window))
        # A cut along an edge may also return lines and points, whose area is 0.
        parts = [p for p in shapely.get_parts(cut) if p.area >= MIN_PART_AREA]
        if not parts:
            continue
        # Box and area are taken after rounding, so they describe what the file holds.
        rings = [_corners(part, x, y) for part in parts]
        corners = np.concatenate(rings)
        low, high = corners.min(axis=0), corners.max(axis=0)
        area = sum(shapely.Polygon(ring).area for ring in rings)
        is_sliver = area < max(MIN_AREA, MIN_KEPT_FRACTION * outlines[index].area)
        pieces.append(
            {
                "iscrowd": int(is_sliver),
                "bbox": np.concatenate([low, high - low]).round(2).tolist(),
                "area": round(float(area), 2),
                "segmentation": [ring.ravel().tolist() for ring in rings],
            }
        )
    return pieces


def _corners(polygon: Any, x: int, y: int) -> np.ndarray:
    """Corners of a part in tile pixels, ``(P, 2)``, without the repeated last one."""
    corners = (np.asarray(polygon.exterior.coords)[:-1] - (x, y)).round(2)
    is_fresh = np.any(corners != np.roll(corners, 1, axis=0), axis=1)
    return corners[is_fresh]
