"""The house: each room stands on its floor, and imports only from below."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS: tuple[tuple[str, ...], ...] = (
    ("columns", "config", "files", "labels", "light", "network", "parallel", "pipeline", "png"),
    ("candidate", "collage", "color", "schedule", "stain"),
    (
        "image", "record", "transform", "target", "encoder", "mixedscale", "detector", "loss", "metric", "postprocess",
        "tile", "annotation", "footprint", "helper", "view", "engine",
        "outline", "likeness", "download", "paint",
    ),
    (
        "division", "confidence", "link", "piece", "plot", "score", "audit", "survey", "synthetic", "mosaic",
    ),
    ("dataset", "model", "tuning", "slide", "collect", "stitching"),
    ("predict", "trainer"),
    ("stream",),
    ("train", "valid", "split", "prepare", "crop", "stitch", "tune"),
)  # fmt: skip
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
SCRIPTS = set(FLOORS[-1])
WITHOUT_TORCH = (
    "config",
    "files",
    "labels",
    "image",
    "record",
    "division",
    "target",
    "metric",
    "candidate",
    "postprocess",
    "tile",
    "mosaic",
    "slide",
    "annotation",
    "outline",
    "likeness",
    "piece",
    "collect",
    "audit",
    "pipeline",
    "png",
)
ROOMS = sorted(path.stem for path in ROOT.glob("*.py"))
every_room = pytest.mark.parametrize("room", ROOMS)


def read(room: str) -> ast.Module:
    return ast.parse((ROOT / f"{room}.py").read_text(encoding="utf-8"))


def imports(room: str) -> set[str]:
    """First parts of all imported names, inside functions and type checks too."""
    found = set()
    for node in ast.walk(read(room)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{room} imports relatively; rooms lie side by side"
            found.add((node.module or "").partition(".")[0])
    return found


def test_the_table_is_sound():
    assert len(FLOOR) == sum(map(len, FLOORS))
    assert {"config", "model", "postprocess", "train"} <= set(ROOMS)


@every_room
def test_every_room_has_a_floor(room):
    assert room in FLOOR, f"{room}.py: give it a floor in this table"


@every_room
def test_a_room_imports_from_below(room):
    above = {other for other in imports(room) & FLOOR.keys() if FLOOR[other] >= FLOOR[room]}
    assert not above, f"{room} (floor {FLOOR[room]}) imports {above}"


@every_room
def test_nobody_imports_a_script(room):
    assert not imports(room) & SCRIPTS


@every_room
def test_no_room_bears_a_name_of_the_standard_library(room):
    assert room not in sys.stdlib_module_names


@pytest.mark.parametrize("room", [room for room in WITHOUT_TORCH if room in ROOMS])
def test_torch_is_absent_where_numpy_serves(room):
    reached, waiting = set(), {room}
    while waiting:
        reached |= (found := imports(waiting.pop()))
        waiting |= found & set(ROOMS) - {room}
    assert not reached & {"torch", "torchvision", "timm"}


@every_room
def test_a_room_opens_with_its_duty(room):
    assert ast.get_docstring(read(room))


@pytest.mark.parametrize("room", [room for room in ROOMS if room not in SCRIPTS])
def test_a_room_does_not_print(room):
    """Rooms log; a progress line goes through tqdm."""
    calls = [
        node.func.id for node in ast.walk(read(room)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    # The one line of a script that fails, on stderr; the table that `python model.py` is asked for.
    allowed = {"helper": 2, "model": 3}
    assert calls.count("print") <= allowed.get(room, 0)


@pytest.mark.parametrize("room", [room for room in ROOMS if room in SCRIPTS])
def test_a_script_has_a_main_and_a_manual(room):
    tree = read(room)
    (main,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert [argument.arg for argument in main.args.args] == ["argv"]
    assert f"python {room}.py" in (ast.get_docstring(tree) or "")
