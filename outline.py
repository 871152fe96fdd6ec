"""Outlines of nuclei, as annotation programs store them: read from Aperio ImageScope XML, QuPath GeoJSON and COCO
JSON, and filled into label maps.

What an annotator sets beside a nucleus, such as an arrow or a line of two points, is no outline. It is passed over and
named; the rest of the file is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError

import defusedxml
import numpy as np
from defusedxml import ElementTree
from numpy.typing import NDArray
from scipy import ndimage
from skimage.draw import polygon

from labels import compose, relabel

Ring = NDArray[np.float64]

FREEHAND, RECTANGLE = "0", "1"  # the types of Aperio's regions that enclose something by their vertices
IMAGE_ENDS = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp", ".svs")  # QuPath may write "slide.tif.geojson"


@dataclass(frozen=True)
class Outline:
    """One nucleus.

    Attributes
    ----------
    name : str
        What to call it in messages.
    parts : tuple of tuple of (K, 2) float64
        Each part is a ring of (x, y) and the rings of its holes. The nucleus is the union of the parts. Coordinates
        are pixels, and (0, 0) is the outer corner of the first pixel, whose middle is (0.5, 0.5).
    runs : tuple of int
        Instead of parts: the lengths of alternating stretches of background and nucleus, column by column (COCO).
    shape : (int, int), optional
        (height, width) of the image that `runs` were counted in.
    """

    name: str
    parts: tuple[tuple[Ring, ...], ...] = ()
    runs: tuple[int, ...] = ()
    shape: tuple[int, int] | None = None

    def pixels(self, shape: tuple[int, int]) -> NDArray[np.intp]:
        """Indices, in the flattened image, of the pixels whose middle lies inside; what is beyond the image is cut off.

        Raises
        ------
        ValueError
            It is no outline of anything in an image of this shape.
        """
        inside = self._decode(shape) if self.runs else self._fill(shape)
        if not inside.size:
            raise ValueError(f"{self.name}: covers no pixel of an image of {shape[0]} x {shape[1]}")
        return inside

    def _fill(self, shape: tuple[int, int]) -> NDArray[np.intp]:
        for ring in (ring for part in self.parts for ring in part):
            if len(np.unique(ring, axis=0)) < 3:
                raise ValueError(f"{self.name}: {len(np.unique(ring, axis=0))} points, an outline has at least 3")
            if not np.isfinite(ring).all():
                raise ValueError(f"{self.name}: has points that are not finite")
        found: list[NDArray[np.intp]] = []
        for outer, *holes in self.parts:
            part = _fill_ring(outer, shape)
            for hole in holes:
                part = np.setdiff1d(part, _fill_ring(hole, shape))
            found.append(part)
        return np.unique(np.concatenate(found)) if found else np.empty(0, np.intp)

    def _decode(self, shape: tuple[int, int]) -> NDArray[np.intp]:
        if self.shape != shape or sum(self.runs) != shape[0] * shape[1] or min(self.runs) < 0:
            raise ValueError(f"{self.name}: run lengths of another image than one of {shape[0]} x {shape[1]}")
        values = np.arange(len(self.runs)) % 2 == 1
        return np.flatnonzero(np.repeat(values, self.runs).reshape(shape[::-1]).T)


@dataclass
class Annotation:
    """What a file says of one image: its outlines, and what in it is none, by name."""

    outlines: list[Outline] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def add(self, make: Callable[..., Outline], name: str, *arguments: Any) -> None:
        """Take the outline that `make` gives for the arguments, or the reason why it gives none."""
        try:
            self.outlines.append(make(name, *arguments))
        except ValueError as error:
            self.refused.append(f"{name}: {error}")
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            self.refused.append(f"{name}: not understood ({type(error).__name__}: {error})")


def draw(outlines: Sequence[Outline], shape: tuple[int, int]) -> tuple[NDArray[np.int32], list[str]]:
    """Fill outlines; where they overlap, a pixel goes to the smallest, as `image.read_labels` has it.

    Parameters
    ----------
    shape
        (height, width) of the image.

    Returns
    -------
    labels : (H, W) int32
        1..N in the order of the outlines, without those that others hide.
    refused : list of str
        Why an outline could not be filled, a line each.
    """
    pixels, refused = [], []
    for outline in outlines:
        try:
            pixels.append(outline.pixels(shape))
        except ValueError as error:
            refused.append(str(error))
    labels = compose(pixels, shape)
    hidden = set(range(1, len(pixels) + 1)).difference(np.unique(labels).tolist())
    if hidden:
        first = outlines[0].name.partition(":")[0]
        refused.append(f"{first}: {len(hidden)} outlines are hidden by smaller or equal ones that lie on them")
    return relabel(labels), refused


def read_outlines(path: str | Path) -> dict[str, Annotation]:
    """Read a file of outlines: image id -> annotation.

    Parameters
    ----------
    path
        ``.xml`` (Aperio ImageScope) or ``.geojson`` (QuPath), of the image of the same name; or ``.json``, either
        QuPath's or COCO's, which names its images itself. An id is the stem of a file name.

    Raises
    ------
    ValueError
        The file is none of these, is damaged, or is XML that declares entities.
    """
    path = Path(path)
    if path.suffix.lower() == ".xml":
        return {path.stem: _read_aperio(path)}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON that can be read: {error}") from None
    if isinstance(content, dict) and "annotations" in content and "images" in content:
        return _read_coco(path, content)
    image = Path(path.stem)
    return {image.stem if image.suffix.lower() in IMAGE_ENDS else image.name: _read_geojson(path, content)}


def _fill_ring(ring: Ring, shape: tuple[int, int]) -> NDArray[np.intp]:
    x, y = ring.T - 0.5  # from corners to middles of pixels
    rows, columns = polygon(y, x, shape)
    if not rows.size:
        return np.empty(0, np.intp)
    # Where a hand drew on past its beginning the ring crosses itself, and a scan by parity leaves specks open.
    top, left = rows.min(), columns.min()
    box = np.zeros((np.ptp(rows) + 1, np.ptp(columns) + 1), bool)
    box[rows - top, columns - left] = True
    rows, columns = np.nonzero(ndimage.binary_fill_holes(box))
    return np.ravel_multi_index((rows + top, columns + left), shape)


def _ring(points: Iterable[Sequence[Any]]) -> Ring:
    return np.array([(float(point[0]), float(point[1])) for point in points], np.float64).reshape(-1, 2)


# Aperio ImageScope


def _read_aperio(path: Path) -> Annotation:
    try:
        root = ElementTree.parse(path, forbid_dtd=True).getroot()
    except defusedxml.DefusedXmlException:
        raise ValueError(f"{path}: declares a document type or entities, which no annotation needs; refused") from None
    except (ParseError, ValueError, LookupError) as error:
        raise ValueError(f"{path}: not XML that can be read: {error}") from None
    if root.tag != "Annotations":
        raise ValueError(f"{path}: <{root.tag}>, wanted <Annotations> as Aperio ImageScope writes it")
    found = Annotation()
    for layer in root.iter("Annotation"):
        for region in layer.iter("Region"):
            name = f"{path.name}: layer {layer.get('Id', '?')} region {region.get('Id', '?')}"
            found.add(_aperio_region, name, region)
    return found


def _aperio_region(name: str, region: Element) -> Outline:
    kind = region.get("Type", FREEHAND)
    if region.get("NegativeROA", "0") != "0":
        raise ValueError("marked as not belonging (NegativeROA)")
    if kind not in (FREEHAND, RECTANGLE):
        raise ValueError(f"of type {kind}, wanted a freehand outline (0) or a rectangle (1)")
    ring = _ring((vertex.attrib["X"], vertex.attrib["Y"]) for vertex in region.iter("Vertex"))
    return Outline(name, ((ring,),))


# GeoJSON


def _read_geojson(path: Path, content: Any) -> Annotation:
    if isinstance(content, dict) and content.get("type") == "FeatureCollection":
        content = content.get("features")
    elif isinstance(content, dict) and content.get("type") == "Feature":
        content = [content]
    if not isinstance(content, list) or not all(isinstance(item, dict) and "geometry" in item for item in content):
        raise ValueError(f"{path}: neither COCO (images, annotations) nor GeoJSON (a list of features)")
    found = Annotation()
    for number, feature in enumerate(content, start=1):
        found.add(_geojson_feature, f"{path.name}: feature {number}", feature)
    return found


def _geojson_feature(name: str, feature: Mapping[str, Any]) -> Outline:
    geometry = feature.get("nucleusGeometry") or feature["geometry"]  # QuPath's cells hold the nucleus beside the cell
    kind, coordinates = geometry["type"], geometry["coordinates"]
    if kind == "Polygon":
        coordinates = [coordinates]
    elif kind != "MultiPolygon":
        raise ValueError(f"a {kind}, wanted a Polygon or MultiPolygon")
    return Outline(name, tuple(tuple(_ring(ring) for ring in part) for part in coordinates))


# COCO


def _read_coco(path: Path, content: Mapping[str, Any]) -> dict[str, Annotation]:
    try:
        images = {image["id"]: Path(image["file_name"]).stem for image in content["images"]}
        sizes = {image["id"]: (image.get("height"), image.get("width")) for image in content["images"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: an image of this COCO file wants 'id' and 'file_name' ({error})") from None
    if len(set(images.values())) < len(images):
        raise ValueError(f"{path}: two of its images have the same file name; ids are stems of file names")
    found = {image_id: Annotation() for image_id in images.values()}
    stray = [
        item for item in content["annotations"] if not isinstance(item, dict) or item.get("image_id") not in images
    ]
    if stray:
        raise ValueError(f"{path}: {len(stray)} annotations belong to none of its {len(images)} images")
    for item in content["annotations"]:
        name = f"{path.name}: annotation {item.get('id', '?')}"
        found[images[item["image_id"]]].add(_coco_item, name, item, sizes[item["image_id"]])
    return found


def _coco_item(name: str, item: Mapping[str, Any], size: tuple[int, int]) -> Outline:
    if item.get("iscrowd"):
        raise ValueError("a crowd, wanted one nucleus")
    segmentation = item["segmentation"]
    if isinstance(segmentation, list):
        rings = [np.array(flat, np.float64).reshape(-1, 2) for flat in segmentation]
        if not rings:
            raise ValueError("without a polygon")
        return Outline(name, tuple((ring,) for ring in rings))
    counts = segmentation["counts"]
    runs = _uncompress(counts) if isinstance(counts, str) else [int(count) for count in counts]
    return Outline(name, runs=tuple(runs), shape=tuple(segmentation.get("size", size)))


def _uncompress(text: str) -> list[int]:
    """Run lengths of COCO's compressed string: groups of 5 bits from the lowest, each from the fourth on a
    difference to the one before the last."""
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"'{letter}' in its run lengths, which are no compressed string")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs
