"""All the ways in which the maps of an image could be cut into nuclei, as a forest of candidates, and how to pick.

Under a threshold that rises, a blob of the marker map falls apart, and its parts again: each part, with all that is
flooded from it, is a candidate, and what falls apart last is an atom. A nucleus is a union of atoms that hang together
in the forest; a separation is a set of candidates none of which holds another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage as ndi
from scipy.sparse import csr_array
from skimage.segmentation import watershed

from labels import components, overlap_table, typical_size

Mask = NDArray[np.bool_]
Labels = NDArray[np.int32]
Map = NDArray[np.float32]

#: Thresholds under which blobs fall apart.
LEVELS = np.arange(0.15, 0.96, 0.05)
#: Least area (pixels) of a part.
LEAST_PART = 3
#: What is known of a candidate, in this order; see `describe`. Nothing of it depends on how large the image is shown.
FEATURES = (
    "relative_area", "axis_ratio", "ellipse_fit", "solidity", "roundness",
    "semantic", "least_semantic", "edge_semantic", "marker", "most_marker", "contour", "edge_contour",
    "touching", "touching_contour", "touching_semantic",
    "neck", "neck_contour", "neck_semantic", "neck_marker", "log_atoms",
    "birth", "life", "is_blob", "share_of_parent", "parent_neck", "parent_neck_contour",
    "at_frame", "image_semantic", "rank",
)  # fmt: skip


@dataclass(frozen=True)
class Forest:
    """Candidates of one image; a parent comes before its children.

    Attributes
    ----------
    atoms : (H, W) int32
        1..K, 0 is background.
    parent : (N,) int64
        Candidate it is a part of; -1 for a whole blob of the mask.
    atom : (N,) int64
        The atom a candidate is, 0 where it is several.
    birth, end : (N,) float64
        Levels between which it is one piece that no other belongs to.
    """

    atoms: Labels
    parent: NDArray[np.int64]
    atom: NDArray[np.int64]
    birth: NDArray[np.float64]
    end: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.parent)

    @cached_property
    def members(self) -> csr_array:
        """Which atoms a candidate is made of, (N, K + 1) of 0 and 1."""
        rows, columns = [], []
        node = np.flatnonzero(self.atom)
        atom = self.atom[node]
        while len(node):
            rows.append(node)
            columns.append(atom)
            node = self.parent[node]
            node, atom = node[node >= 0], atom[node >= 0]
        shape = (len(self), int(self.atom.max(initial=0)) + 1)
        row, column = (np.concatenate(parts) if parts else np.zeros(0, int) for parts in (rows, columns))
        return csr_array((np.ones(len(row)), (row, column)), shape=shape)

    def overlaps(self, truth: Labels) -> NDArray[np.float64]:
        """The IoU of each candidate with the true nucleus, of (H, W) int32, that it fits best, (N,) float64."""
        of_atoms = overlap_table(truth, self.atoms).T
        shared = self.members @ of_atoms[: self.members.shape[1]].astype(float)
        area, true = shared.sum(axis=1), np.bincount(truth.ravel())
        iou = shared / (area[:, None] + true - shared)
        return iou[:, 1:].max(axis=1, initial=0)

    def pick(self, worth: NDArray[np.floating]) -> Labels:
        """The separation of the greatest total worth, (H, W) int32; a candidate of negative worth is never in it.

        Parameters
        ----------
        worth : (N,) float
            Of each candidate.
        """
        best = np.maximum(worth, 0.0)
        parts = np.zeros(len(self))
        for node in range(len(self) - 1, -1, -1):
            best[node] = max(best[node], parts[node])
            if self.parent[node] >= 0:
                parts[self.parent[node]] += best[node]
        label = np.zeros(len(self), np.int32)
        for node, parent in enumerate(self.parent):
            if parent >= 0 and label[parent]:
                label[node] = label[parent]
            elif worth[node] > 0 and worth[node] >= parts[node]:
                label[node] = node + 1
        of_atom = np.zeros(self.members.shape[1], np.int32)
        of_atom[self.atom] = np.where(self.atom > 0, label, 0)
        of_atom[0] = 0
        return of_atom[self.atoms]


def grow_forest(mask: Mask, height: Map, elevation: Map) -> Forest:
    """Candidates of a mask.

    Parameters
    ----------
    mask : (H, W) bool
        The pixels that belong to nuclei.
    height : (H, W) float32
        High in the middles of nuclei, in [0, 1]: its blobs above a level are parts.
    elevation : (H, W) float32
        What pixels between parts are flooded by, low first.
    """
    blobs = components(mask)
    n = int(blobs.max(initial=0))
    parent, birth, end = np.full(n, -1), np.zeros(n), np.zeros(n)
    owner = blobs - 1  # of each pixel the deepest candidate it belongs to
    for level in LEVELS:
        parts = components(mask & (height > level))
        if not parts.any():
            break
        pixels = np.flatnonzero(parts)
        _, first, size = np.unique(parts.ravel()[pixels], return_index=True, return_counts=True)
        above = owner.ravel()[pixels[first]]
        large = size >= LEAST_PART
        n_parts = np.bincount(above[large], minlength=len(parent))
        new = large & (n_parts[above] > 1)  # a candidate of which one part is left stays what it is
        names = above.copy()
        names[new] = len(parent) + np.arange(np.count_nonzero(new))
        parent, birth = np.append(parent, above[new]), np.append(birth, np.full(np.count_nonzero(new), level))
        end = np.append(end, birth[len(end) :])
        end[names[large]] = level
        inside = np.append(False, large)[parts]
        owner = np.where(inside, np.append(0, names)[parts], owner)
    leaf = np.bincount(parent + 1, minlength=len(parent) + 1)[1:] == 0
    atom = np.where(leaf, np.cumsum(leaf), 0)
    markers = np.where(mask, np.append(atom, 0)[owner], 0).astype(np.int32)
    atoms = watershed(elevation, markers, mask=mask).astype(np.int32, copy=False)
    return Forest(atoms, parent, atom, birth, end)


class Scene(NamedTuple):
    """What an image holds as a whole, against which a candidate is seen.

    Attributes
    ----------
    typical : int
        Typical area (pixels) of an atom; at least 1.
    semantic : float
        Mean semantic probability of the pixels of nuclei; 0 without nuclei.
    areas : (N,) float64
        Of all candidates (pixels), in rising order.
    """

    typical: int
    semantic: float
    areas: NDArray[np.float64]


def find_scene(parts: Sequence[tuple[Forest, Map]]) -> Scene:
    """The scene of an image, from the forest and the semantic probabilities of all of it, or of several samples."""
    sizes, areas, total = [np.zeros(0, int)], [np.zeros(0)], 0.0
    for forest, semantic in parts:
        inside = forest.atoms > 0
        size = np.bincount(forest.atoms[inside], minlength=forest.members.shape[1])
        sizes.append(size)
        areas.append(forest.members @ size.astype(float))
        total += float(semantic[inside].sum(dtype=np.float64))
    known = np.concatenate(sizes)
    return Scene(max(typical_size(known), 1), total / max(int(known.sum()), 1), np.sort(np.concatenate(areas)))


def describe(forest: Forest, probs: Mapping[str, Map], scene: Scene | None = None) -> NDArray[np.float32]:
    """What `FEATURES` names, of each candidate, (N, F) float32.

    Sums over pixels and over the borders between atoms are taken once; those of a candidate follow by addition, so the
    cost does not grow with how often candidates overlap.

    Parameters
    ----------
    forest : Forest
    probs : mapping
        head -> (H, W) float32; "semantic" must be there.
    scene : Scene, optional
        Of the whole image, where this is a part of it; else what is there is all.
    """
    semantic = probs["semantic"]
    scene = scene or find_scene([(forest, semantic)])
    nothing = np.zeros_like(semantic)
    maps = {head: probs.get(head, nothing) for head in ("semantic", "marker", "contour")}
    members = forest.members
    pixels = _sum_pixels(forest.atoms, maps, members)
    borders = _sum_borders(forest.atoms, maps, members)
    area = pixels["area"]
    hull = _hull_areas(forest)
    yy, xx, xy = (pixels[name] for name in ("yy", "xx", "xy"))
    spread = np.sqrt((yy - xx) ** 2 + 4 * xy**2)
    long, short = (yy + xx + spread) / 2, np.maximum((yy + xx - spread) / 2, 1 / 12)
    perimeter = np.maximum(borders["outer"] + borders["touching"], 1)
    of_parent = np.where(forest.parent >= 0, forest.parent, np.arange(len(forest)))
    columns = {
        "relative_area": area / scene.typical,
        "axis_ratio": np.sqrt(short / long),
        "ellipse_fit": area / (4 * np.pi * np.sqrt(long * short)),
        "solidity": area / np.maximum(hull, 1),
        "roundness": np.sqrt(4 * np.pi * area) / perimeter,
        **{head: pixels[head] for head in maps},
        "least_semantic": pixels["least_semantic"],
        "most_marker": pixels["most_marker"],
        "edge_semantic": borders["outer_semantic"],
        "edge_contour": borders["outer_contour"],
        "touching": borders["touching"] / perimeter,
        "touching_contour": borders["touching_contour"],
        "touching_semantic": borders["touching_semantic"],
        "neck": borders["inner"] / np.sqrt(area),
        "neck_contour": borders["inner_contour"],
        "neck_semantic": borders["inner_semantic"],
        "neck_marker": borders["inner_marker"],
        "log_atoms": np.log(members.sum(axis=1)),
        "birth": forest.birth,
        "life": forest.end - forest.birth,
        "is_blob": forest.parent < 0,
        "share_of_parent": area / area[of_parent],
        "parent_neck": np.where(forest.parent >= 0, borders["inner"][of_parent] / np.sqrt(area), 0),
        "parent_neck_contour": np.where(forest.parent >= 0, borders["inner_contour"][of_parent], 0),
        "at_frame": borders["frame"] > 0,
        "image_semantic": np.full(len(forest), scene.semantic),
        "rank": np.searchsorted(scene.areas, area) / max(len(scene.areas), 1),
    }
    return np.stack([np.asarray(columns[name], np.float32) for name in FEATURES], axis=1)


def _sum_pixels(atoms: Labels, maps: Mapping[str, Map], members: csr_array) -> dict[str, NDArray[np.float64]]:
    """Of each candidate: area, central second moments, means of the maps, and two extremes."""
    inside, n = np.flatnonzero(atoms), members.shape[1]
    ids = atoms.ravel()[inside]
    index = {"y": (inside // atoms.shape[1]).astype(np.int32), "x": (inside % atoms.shape[1]).astype(np.int32)}
    seen = {head: p.ravel()[inside] for head, p in maps.items()}
    del inside
    total = {"area": np.bincount(ids, minlength=n).astype(float)}
    for name, values in (index | seen).items():
        total[name] = np.bincount(ids, values, minlength=n)
    for a, b in ("yy", "xx", "xy"):  # one at a time: of a large image each is large
        total[a + b] = np.bincount(ids, np.multiply(index[a], index[b], dtype=np.float64), minlength=n)
    sums = {name: members @ values for name, values in total.items()}
    mean = {name: values / sums["area"] for name, values in sums.items()}
    known = {"area": sums["area"], **{head: mean[head] for head in maps}}
    for a, b in ("yy", "xx", "xy"):
        known[a + b] = mean[a + b] - mean[a] * mean[b] + (a == b) / 12
    lowest, highest = (_extremes(ids, seen[head], n, least) for head, least in (("semantic", True), ("marker", False)))
    known["least_semantic"] = _over(members, lowest, np.minimum)
    known["most_marker"] = _over(members, highest, np.maximum)
    return known


def _extremes(ids: NDArray[np.int32], values: NDArray[np.float32], n: int, least: bool) -> NDArray[np.float64]:
    found = np.full(n, 1.0 if least else 0.0)
    (np.minimum if least else np.maximum).at(found, ids, values)
    return found


def _over(members: csr_array, values: NDArray[np.float64], rule: np.ufunc) -> NDArray[np.float64]:
    """The rule over the atoms of each candidate; every candidate has one."""
    return rule.reduceat(values[members.indices], members.indptr[:-1]) if members.shape[0] else np.zeros(0)


def _sum_borders(atoms: Labels, maps: Mapping[str, Map], members: csr_array) -> dict[str, NDArray[np.float64]]:
    """Of each candidate: lengths (pixels) of its borders with the background (`outer`), with other candidates
    (`touching`), between its own atoms (`inner`) and with the frame of the image; and the mean of each map along
    them."""
    pairs, sums = _borders(atoms, maps)
    n = members.shape[1]
    ends = csr_array((np.ones(pairs.size), (np.repeat(np.arange(len(pairs)), 2), pairs.ravel())), shape=(len(pairs), n))
    inside = (members @ ends.T).tocoo()  # 2: both atoms are of the candidate, 1: one is
    (row, column), count = inside.coords, inside.data
    background = pairs[column, 0] == 0
    kinds = {"inner": count == 2, "outer": (count == 1) & background, "touching": (count == 1) & ~background}
    known: dict[str, NDArray[np.float64]] = {}
    for kind, mine in kinds.items():
        total = csr_array((np.ones(np.count_nonzero(mine)), (row[mine], column[mine])), shape=inside.shape)
        known[kind] = total @ sums["length"]
        known |= {f"{kind}_{head}": (total @ sums[head]) / np.maximum(known[kind], 1) for head in maps}
    frame = np.concatenate([atoms[0], atoms[-1], atoms[:, 0], atoms[:, -1]])
    known["frame"] = members @ np.bincount(frame, minlength=n).astype(float)
    return known


def _borders(atoms: Labels, maps: Mapping[str, Map]) -> tuple[NDArray[np.int64], dict[str, NDArray[np.float64]]]:
    """Pairs of atoms that are neighbours, (P, 2), the lower first; and of each the number of pixel edges between the
    two and the sums of the maps there."""
    n = int(atoms.max(initial=0)) + 1
    keys: list[NDArray[np.int64]] = []
    values: dict[str, list[Map]] = {head: [] for head in maps}
    for a, b in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        apart = atoms[a] != atoms[b]
        one, two = atoms[a][apart].astype(np.int64), atoms[b][apart].astype(np.int64)
        keys.append(np.minimum(one, two) * n + np.maximum(one, two))
        for head, p in maps.items():
            values[head].append((p[a][apart] + p[b][apart]) / 2)
    found, which = np.unique(np.concatenate(keys), return_inverse=True)
    n_pairs = len(found)
    sums = {head: np.bincount(which, np.concatenate(parts), n_pairs).astype(float) for head, parts in values.items()}
    sums["length"] = np.bincount(which, minlength=n_pairs).astype(float)
    return np.stack([found // n, found % n], axis=1), sums


def _hull_areas(forest: Forest) -> NDArray[np.float64]:
    """Area (pixels) of the convex hull of each candidate; a hull is that of the hulls of its parts."""
    boxes = ndi.find_objects(forest.atoms)
    points: list[list[NDArray[np.int32]]] = [[] for _ in range(len(forest))]
    hull_areas = np.zeros(len(forest))
    for node in range(len(forest) - 1, -1, -1):
        if forest.atom[node]:
            number = forest.atom[node]
            rows, columns = boxes[number - 1]
            inside = (forest.atoms[rows, columns] == number).astype(np.uint8)
            outlines, _ = cv2.findContours(
                inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE, offset=(columns.start, rows.start)
            )
            points[node] = [outline[:, 0] for outline in outlines]
        hull = cv2.convexHull(np.concatenate(points[node]))
        # OpenCV's polygon runs through the middles of pixels: half a pixel is missing all around (Pick's theorem).
        hull_areas[node] = cv2.contourArea(hull) + cv2.arcLength(hull, True) / 2 + 1
        if forest.parent[node] >= 0:
            points[forest.parent[node]].append(hull[:, 0])
    return hull_areas
