"""The outline room: what annotation programs write, read and filled; and what is no outline, named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from annotation import WRITERS
from outline import Outline, draw, read_outlines

SQUARE = [(2, 1), (6, 1), (6, 4), (2, 4)]  # columns 2 to 5, rows 1 to 3
SHAPE = (8, 10)


def square() -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[1:4, 2:6] = True
    return mask


def region(points, number: int = 1, **attributes: str) -> str:
    more = " ".join(f'{key}="{value}"' for key, value in attributes.items())
    vertices = "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in points)
    return f'<Region Id="{number}" {more}><Vertices>{vertices}</Vertices></Region>'


def write_xml(folder: Path, *regions: str) -> Path:
    path = folder / "tile.xml"
    path.write_text(f'<Annotations><Annotation Id="1"><Regions>{"".join(regions)}</Regions></Annotation></Annotations>')
    return path


def feature(kind: str, coordinates, **more) -> dict:
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, **more}


def write_json(folder: Path, content, name: str = "tile.geojson") -> Path:
    path = folder / name
    path.write_text(json.dumps(content))
    return path


def coco(*annotations: dict) -> dict:
    images = [{"id": 7, "file_name": "sub/tile.png", "height": SHAPE[0], "width": SHAPE[1]}]
    return {"images": images, "annotations": [{"image_id": 7, "id": i, **a} for i, a in enumerate(annotations)]}


def only(path: Path):
    ((image_id, annotation),) = read_outlines(path).items()
    assert image_id == "tile"
    return annotation


# Filling


def test_corners_of_pixels_bound_exactly_those_pixels():
    labels, refused = draw([Outline("a", ((np.array(SQUARE, float),),))], SHAPE)
    assert np.array_equal(labels == 1, square()) and not refused


def test_the_smaller_wins_where_two_overlap_whatever_their_order():
    small, large = np.array(SQUARE, float), np.array([(0, 0), (9, 0), (9, 7), (0, 7)], float)
    for order in ((small, large), (large, small)):
        labels, _ = draw([Outline("x", ((ring,),)) for ring in order], SHAPE)
        assert len(np.unique(labels[square()])) == 1 and (labels > 0).sum() == 63 and labels.max() == 2


def test_a_ring_that_crosses_itself_has_no_hole():
    outer, inner = (
        [(low, low), (high, low), (high, high), (low, high), (low, low)] for low, high in ((2, 30), (9, 20))
    )
    ring = np.array([*outer, *inner], float)
    labels, refused = draw([Outline("loop", ((ring,),))], (40, 40))
    assert labels.sum() == 28 * 28 and not refused


def test_what_lies_beyond_the_image_is_cut_off_and_what_lies_outside_is_named():
    ring = np.array([(-5, -5), (3, -5), (3, 2), (-5, 2)], float)
    labels, refused = draw([Outline("in", ((ring,),)), Outline("out", ((ring - 50,),))], SHAPE)
    assert labels.sum() == 6 and labels[:2, :3].all()
    assert len(refused) == 1 and refused[0].startswith("out: covers no pixel")


def test_an_outline_drawn_twice_counts_once_and_is_named():
    labels, refused = draw([Outline("a.xml: 1", ((np.array(SQUARE, float),),))] * 2, SHAPE)
    assert labels.max() == 1 and refused == ["a.xml: 1 outlines are hidden by smaller or equal ones that lie on them"]


def test_no_outlines_are_a_blank_map():
    labels, refused = draw([], SHAPE)
    assert labels.shape == SHAPE and not labels.any() and not refused


# Aperio


def test_aperio_regions_become_nuclei(tmp_path):
    annotation = only(write_xml(tmp_path, region(SQUARE), region([(7, 5), (9, 5), (9, 7)], 2)))
    labels, refused = draw(annotation.outlines, SHAPE)
    assert np.array_equal(labels == 1, square()) and labels.max() == 2 and not refused


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (region([(1, 1), (2, 2)], 9), "2 points"),
        (region([(1, 1), (1, 1), (5, 5)], 9), "2 points"),
        (region([(1, 1), ("nan", 2), (4, 4)], 9), "not finite"),
        (region([("left", 1), (2, 2), (4, 4)], 9), "left"),
        (region(SQUARE, 9, Type="3"), "type 3"),
        (region(SQUARE, 9, NegativeROA="1"), "NegativeROA"),
        ('<Region Id="9"><Vertices><Vertex X="1"/></Vertices></Region>', "not understood"),
    ],
)
def test_a_broken_region_is_named_and_passed_over(tmp_path, text, why):
    annotation = only(write_xml(tmp_path, text, region(SQUARE)))
    labels, refused = draw(annotation.outlines, SHAPE)
    (line,) = annotation.refused + refused
    assert "tile.xml: layer 1 region 9" in line and why in line
    assert np.array_equal(labels == 1, square())


BOMB = "".join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    "head",
    [
        f'<!DOCTYPE Annotations [<!ENTITY a "ha">{BOMB}]>',
        '<!DOCTYPE Annotations [<!ENTITY a SYSTEM "file:///etc/hostname">]>',
        '<!DOCTYPE Annotations SYSTEM "http://127.0.0.1:9/x.dtd">',
    ],
)
def test_entities_are_refused(tmp_path, head):
    path = tmp_path / "tile.xml"
    path.write_text(f"{head}<Annotations><Annotation Id='&a;'/></Annotations>")
    with pytest.raises(ValueError, match="entities"):
        read_outlines(path)


@pytest.mark.parametrize("text", ["", "<Annotations>", "<svg/>", "no markup"])
def test_other_xml_is_refused_by_name(tmp_path, text):
    (tmp_path / "tile.xml").write_text(text)
    with pytest.raises(ValueError, match="tile.xml"):
        read_outlines(tmp_path / "tile.xml")


# GeoJSON


RING = [*SQUARE, SQUARE[0]]
HOLE = [(3, 2), (4, 2), (4, 3), (3, 3), (3, 2)]


@pytest.mark.parametrize("wrap", [lambda f: {"type": "FeatureCollection", "features": [f]}, lambda f: [f], lambda f: f])
def test_geojson_polygons_have_holes(tmp_path, wrap):
    labels, refused = draw(only(write_json(tmp_path, wrap(feature("Polygon", [RING, HOLE])))).outlines, SHAPE)
    wanted = square()
    wanted[2, 3] = False
    assert np.array_equal(labels == 1, wanted) and not refused


def test_a_multipolygon_is_one_nucleus(tmp_path):
    other = [[(7, 5), (9, 5), (9, 7), (7, 7), (7, 5)]]
    path = write_json(tmp_path, [feature("MultiPolygon", [[RING], other])], "tile.tif.geojson")
    labels, _ = draw(only(path).outlines, SHAPE)
    assert labels.max() == 1 and labels.sum() == 12 + 4


def test_of_a_cell_the_nucleus_is_taken(tmp_path):
    cell = feature("Polygon", [[(0, 0), (9, 0), (9, 7), (0, 7), (0, 0)]], nucleusGeometry={})
    cell["nucleusGeometry"] = {"type": "Polygon", "coordinates": [RING]}
    labels, _ = draw(only(write_json(tmp_path, [cell])).outlines, SHAPE)
    assert np.array_equal(labels == 1, square())


def test_points_are_named(tmp_path):
    annotation = only(write_json(tmp_path, [feature("Point", [1, 2]), feature("Polygon", [RING])]))
    assert len(annotation.outlines) == 1 and annotation.refused == [
        "tile.geojson: feature 1: a Point, wanted a Polygon or MultiPolygon"
    ]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1}', "[" * 100_000])
def test_other_json_is_refused_by_name(tmp_path, text):
    (tmp_path / "tile.json").write_text(text)
    with pytest.raises(ValueError, match="tile.json"):
        read_outlines(tmp_path / "tile.json")


# COCO


def runs_of(mask: np.ndarray) -> list[int]:
    flat = mask.T.ravel()
    changes = np.flatnonzero(np.diff(np.concatenate([[False], flat, [False]]).astype(int)))
    return np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()


def test_coco_polygons_and_run_lengths_agree(tmp_path):
    flat = [value for point in SQUARE for value in point]
    runs = {"size": list(SHAPE), "counts": runs_of(square())}
    for segmentation in ([flat], runs):
        path = write_json(tmp_path, coco({"segmentation": segmentation}), "all.json")
        labels, refused = draw(only(path).outlines, SHAPE)
        assert np.array_equal(labels == 1, square()) and not refused


def test_coco_compressed_run_lengths(tmp_path):
    counts = [17, 3, 5, 3, 5, 3, 5, 3, 36]
    assert runs_of(square()) == counts
    path = write_json(tmp_path, coco({"segmentation": {"size": list(SHAPE), "counts": compress(counts)}}), "all.json")
    labels, refused = draw(only(path).outlines, SHAPE)
    assert np.array_equal(labels == 1, square()) and not refused


def compress(counts: list[int]) -> str:
    """The encoder of the COCO tools, step by step."""
    letters = []
    for i, count in enumerate(counts):
        x = count - (counts[i - 2] if i > 2 else 0)
        more = True
        while more:
            bits = x & 31
            x >>= 5
            more = x != -1 if bits & 16 else x != 0
            letters.append(chr((bits | 32 if more else bits) + 48))
    return "".join(letters)


@pytest.mark.parametrize(
    ("item", "why"),
    [
        ({"segmentation": []}, "without a polygon"),
        ({"segmentation": [[1, 2, 3]]}, "reshape"),
        ({"segmentation": {"size": [3, 3], "counts": [9]}}, "another image"),
        ({"segmentation": {"size": list(SHAPE), "counts": "~~"}}, "no compressed string"),
        ({"segmentation": {"size": list(SHAPE), "counts": [80]}, "iscrowd": 1}, "a crowd"),
        ({}, "not understood"),
    ],
)
def test_a_broken_coco_item_is_named(tmp_path, item, why):
    annotation = only(write_json(tmp_path, coco(item), "all.json"))
    (line,) = annotation.refused + draw(annotation.outlines, SHAPE)[1]
    assert line.startswith("all.json: annotation 0") and why in line


def test_coco_annotations_of_no_image_are_refused(tmp_path):
    content = coco({"segmentation": []})
    content["annotations"][0]["image_id"] = 8
    with pytest.raises(ValueError, match="1 annotations belong to none of its 1 images"):
        read_outlines(write_json(tmp_path, content, "all.json"))


def test_outlines_that_are_written_are_read_again(tmp_path):
    labels = np.zeros((40, 50), np.int32)
    labels[5:20, 5:25], labels[8:30, 25:40] = 1, 2
    WRITERS["geojson"](tmp_path, "one.v2", labels, np.array([0.25, 0.8765]))
    ((image_id, annotation),) = read_outlines(tmp_path / "one.v2.geojson").items()
    assert image_id == "one.v2" and not annotation.refused
    again, refused = draw(annotation.outlines, labels.shape)
    assert not refused and np.array_equal(again, labels)
    features = json.loads((tmp_path / "one.v2.geojson").read_text())["features"]
    assert [f["properties"]["measurements"] for f in features] == [
        {"expected quality": 0.25},
        {"expected quality": 0.876},
    ]
    WRITERS["geojson"](tmp_path, "none", labels * 0, None)
    assert json.loads((tmp_path / "none.geojson").read_text())["features"] == []
