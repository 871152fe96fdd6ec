"""Probability maps -> instances. The only road from a network to a label map: scores, files, figures and tuning all
take it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage as ndi
from scipy.sparse import coo_array, csc_array
from scipy.sparse.linalg import splu
from skimage import measure
from skimage.feature import peak_local_max
from skimage.segmentation import expand_labels, watershed

from candidate import Forest, describe, grow_forest
from config import Post, pick
from labels import depth, fill_holes, relabel, remove_fiber, remove_small, typical_area

Mask = NDArray[np.bool_]
Labels = NDArray[np.int32]
Probs = Mapping[str, NDArray[np.float32]]
#: Features of candidates, (N, F) as `candidate.describe` gives them, -> quality expected of each, (N,) in [0, 1].
Opinion = Callable[[NDArray[np.float32]], NDArray[np.float32]]

#: Sharpness of the random walker, and the least weight of an edge; both as in scikit-image.
WALKER_BETA, WALKER_FLOOR = 130.0, 1e-10


def instances(probs: Probs, post: Post, thresholds: Mapping[str, float], opinion: Opinion | None = None) -> Labels:
    """Give every nucleus its own label.

    Parameters
    ----------
    probs : mapping
        head -> (H, W) float32 in [0, 1], "color" (C, H, W); "semantic" must be there.
    post : Post
        Policy, source of the markers, and what is removed.
    thresholds : mapping
        head -> probability above which a pixel belongs.
    opinion : callable, optional
        For the policy ``forest``, which ``auto`` is where there is an opinion.

    Returns
    -------
    (H, W) int32
        Labels 1..N without gaps, 0 is background. The same input always gives the same labels.

    Raises
    ------
    ValueError
        A head that is not there is asked for, or an unknown policy.
    """
    mask = _above(probs, thresholds, "semantic")
    if not post.segmentation:
        return _finish(_components(mask), probs, post)
    source, policy = _choose(post, probs, opinion)
    if policy == "forest":
        return _finish(separate_forest(mask, probs, post, opinion), probs, post)
    markers = pick(MARKERS, source, "source of markers")(mask, probs, post, thresholds)
    markers = _add_lonely(mask, markers)
    return _finish(pick(POLICIES, policy, "policy")(mask, markers, probs), probs, post)


def _finish(labels: Labels, probs: Probs, post: Post) -> Labels:
    labels = drop_doubtful(labels, probs["semantic"], post.min_confidence) if post.min_confidence else labels
    return clean(expand_labels(labels, post.grow) if post.grow else labels, post)


def merge(
    members: Sequence[Probs], thresholds: Mapping[str, float], ensemble: str = "avg", weights: Sequence[float] = ()
) -> dict[str, NDArray[np.float32]]:
    """What several networks say together.

    Parameters
    ----------
    members : sequence of mapping
        Of each network: head -> (H, W) float32 in [0, 1], or (C, H, W). They may differ in their heads: each head is
        that of the networks that have it. Maps of several channels are not mixed, the first network's are taken: which
        nucleus has which colour differs from network to network.
    thresholds : mapping
        head -> probability, for votes.
    ensemble : {'avg', 'vote'}
        Mean probability, or the share of networks above the threshold.
    weights : sequence of float, optional
        How much each network counts; all the same by default. One that counts nothing lends no head.

    Returns
    -------
    dict
        head -> map, float32 in [0, 1].

    Raises
    ------
    ValueError
        The weights are not as many as the networks.
    """
    if weights and len(weights) != len(members):
        raise ValueError(f"[valid] ensemble_weights: {len(weights)} for {len(members)} networks; wanted one for each")
    merged: dict[str, NDArray[np.float32]] = {}
    total: dict[str, float] = {}
    for maps, weight in zip(members, weights or [1.0] * len(members), strict=True):
        for head, probs in maps.items() if weight else ():
            if probs.ndim == 3:
                merged.setdefault(head, probs)
                continue
            said = (probs > thresholds[head]).astype(np.float32) if ensemble == "vote" else probs
            merged[head] = merged[head] + np.float32(weight) * said if head in merged else np.float32(weight) * said
            total[head] = total.get(head, 0.0) + weight
    return {head: maps / np.float32(total[head]) if head in total else maps for head, maps in merged.items()}


def merged_thresholds(probs: Probs, thresholds: Mapping[str, float], ensemble: str) -> dict[str, float]:
    """The thresholds for what `merge` gives: where networks have voted, each by its own, half is a majority."""
    voted = {head for head, maps in probs.items() if ensemble == "vote" and maps.ndim == 2}
    return {head: 0.5 if head in voted else threshold for head, threshold in thresholds.items()}


def drop_doubtful(labels: Labels, semantic: NDArray[np.float32], least: float) -> Labels:
    """Take out the instances whose pixels have a mean semantic probability below `least`, (H, W) int32."""
    ids = labels.ravel()
    score = np.bincount(ids, semantic.ravel()) / np.maximum(np.bincount(ids), 1)
    return np.where(score[labels] < least, 0, labels)


def clean(labels: Labels, post: Post) -> Labels:
    """Fill and remove what ``[post]`` says, and number what is left 1..N."""
    if post.fill_holes:
        labels = fill_holes(labels)
    if post.remove_objects:
        labels = remove_small(labels, max(post.min_object_size, round(post.min_object_share * typical_area(labels))))
    if post.filter_fiber:
        labels = remove_fiber(labels)
    return relabel(labels)


def _choose(post: Post, probs: Probs, opinion: Opinion | None = None) -> tuple[str, str]:
    """Source of the markers and policy, where the settings leave them to the heads there are."""
    source, policy = post.marker, post.policy
    if policy == "auto" and opinion is not None and source != "color":
        policy = "forest"
    if source == "auto":
        source = "color" if policy == "color" else next((name for name in MARKERS if name in probs), "peak")
    if policy == "auto":
        policy = "color" if source == "color" else "ws"
    return source, policy


def separate_watershed(mask: Mask, markers: Labels, probs: Probs) -> Labels:
    """Flood from the markers: high semantic probability, low contour and the middles of nuclei first.

    Parameters
    ----------
    mask : (H, W) bool
    markers : (H, W) int32
    probs : mapping
        See `instances`.

    Returns
    -------
    (H, W) int32
        Every pixel of the mask that a marker reaches carries its label.
    """
    return watershed(_elevation(probs), markers, mask=mask).astype(np.int32, copy=False)


def _elevation(probs: Probs) -> NDArray[np.float32]:
    elevation = -probs["semantic"]
    if "contour" in probs:
        elevation = elevation + probs["contour"]
    if "distance" in probs:
        elevation = elevation - probs["distance"]
    return elevation


def separate_color(mask: Mask, markers: Labels, probs: Probs) -> Labels:
    """Flood from the markers, sure pixels of a sure colour first: fronts meet where one colour gives way to another.

    Parameters, Returns
        As `separate_watershed`.
    """
    return watershed(-probs["semantic"] - _head(probs, "color").max(0), markers, mask=mask).astype(np.int32, copy=False)


def separate_walker(mask: Mask, markers: Labels, probs: Probs) -> Labels:
    """Each pixel goes to the marker that a random walker starting there reaches most probably.

    Grady 2006 (doi:10.1109/TPAMI.2006.233), on the semantic probability. Components of the mask are independent of each
    other, so each is solved by itself, and one with a single marker needs no solving.

    Parameters, Returns
        As `separate_watershed`.
    """
    blobs, _ = ndi.label(mask)
    owner = _single_owner(blobs, markers)
    labels = np.where(owner[blobs] > 0, owner[blobs], 0).astype(np.int32)
    data = probs["semantic"]
    scale = WALKER_BETA / (10 * float(data.std()) or 1.0)
    boxes = ndi.find_objects(blobs)
    for blob in np.flatnonzero(owner < 0):
        box = boxes[blob - 1]
        inside = blobs[box] == blob
        labels[box][inside] = _walk(data[box], inside, markers[box], scale)
    return labels


def separate_forest(mask: Mask, probs: Probs, post: Post, opinion: Opinion | None) -> Labels:
    """Of all the ways in which blobs fall apart the one that promises most.

    A candidate is worth the quality that is expected of it less ``min_quality``: what a nucleus has to promise, as one
    that is wrong costs precision.

    Parameters
    ----------
    mask : (H, W) bool
    probs : mapping
        See `instances`.
    post : Post
    opinion : callable
        See `Opinion`.

    Returns
    -------
    (H, W) int32

    Raises
    ------
    ValueError
        There is no opinion.
    """
    if opinion is None:
        raise ValueError("[post] policy = forest: this checkpoint has no second opinion; tune.py gives it one")
    forest = candidates(mask, probs, post)
    return forest.pick(opinion(describe(forest, probs)) - post.min_quality)


def candidates(mask: Mask, probs: Probs, post: Post) -> Forest:
    """The ways in which the blobs of a mask fall apart, by the head that tells nuclei apart best."""
    if "marker" in probs:
        height = np.clip(_less_contour(probs, post), 0, 1)
    elif "distance" in probs:
        height = probs["distance"]
    elif "contour" in probs:
        height = 1 - probs["contour"]
    else:
        inside = depth(mask.astype(np.int32))
        height = inside / max(float(inside.max(initial=0)), 1.0)
    return grow_forest(mask, height, _elevation(probs))


def expected_quality(labels: Labels, probs: Probs, opinion: Opinion) -> NDArray[np.float32]:
    """The quality expected of instances 1..N, (N,) float32 in [0, 1], whatever policy has separated them."""
    n = int(labels.max(initial=0))
    lone = Forest(labels, np.full(n, -1), np.arange(1, n + 1), np.zeros(n), np.zeros(n))
    return opinion(describe(lone, probs)) if n else np.zeros(0, np.float32)


#: (mask, markers, probs) -> labels
POLICIES: dict[str, Callable[[Mask, Labels, Probs], Labels]] = {
    "ws": separate_watershed,
    "rw": separate_walker,
    "color": separate_color,
}


def _markers_from_marker(mask: Mask, probs: Probs, post: Post, thresholds: Mapping[str, float]) -> Labels:
    return _components(mask & (_less_contour(probs, post) > thresholds["marker"]))


def _less_contour(probs: Probs, post: Post) -> NDArray[np.float32]:
    """The marker map, less the contour as far as the settings want it."""
    marker = _head(probs, "marker")
    if post.marker_contour and "contour" in probs:
        marker = marker - np.float32(post.marker_contour) * probs["contour"]
    return marker


def _markers_from_distance(mask: Mask, probs: Probs, post: Post, thresholds: Mapping[str, float]) -> Labels:
    return _components(mask & _above(probs, thresholds, "distance"))


def _markers_from_contour(mask: Mask, probs: Probs, post: Post, thresholds: Mapping[str, float]) -> Labels:
    return _components(mask & ~_above(probs, thresholds, "contour"))


def _markers_from_color(mask: Mask, probs: Probs, post: Post, thresholds: Mapping[str, float]) -> Labels:
    """Pieces of one colour; what is smaller than a nucleus is left to the pieces around it."""
    colors = _head(probs, "color")
    color = np.where(mask & (colors.max(0) > thresholds["color"]), colors.argmax(0) + 1, 0)
    pieces: NDArray[np.int_] = measure.label(color, connectivity=1)
    return remove_small(pieces, post.min_object_size)


def _markers_from_peaks(mask: Mask, probs: Probs, post: Post, thresholds: Mapping[str, float]) -> Labels:
    """Peaks of the distance to the background, at least `seg_scale` times the typical diameter apart."""
    peaks = np.zeros(mask.shape, bool)
    blobs, n_blobs = ndi.label(mask)
    if not n_blobs:
        return _components(peaks)
    sizes = np.sort(np.bincount(blobs.ravel())[1:])
    typical = sizes[: max(1, round(post.seg_ratio * n_blobs))].mean()
    apart = max(1, round(post.seg_scale * float(np.sqrt(typical))))
    # Smoothing joins the twin peaks of a flat ridge; the distance itself would make a marker of each.
    depth = ndi.gaussian_filter(ndi.distance_transform_edt(mask), 1.0) * mask
    found = peak_local_max(depth, min_distance=apart, labels=blobs, exclude_border=False)
    peaks[tuple(found.T)] = True
    return _components(peaks)


#: Where the markers of the nuclei come from; `auto` takes the first whose head is there.
MARKERS: dict[str, Callable[[Mask, Probs, Post, Mapping[str, float]], Labels]] = {
    "marker": _markers_from_marker,
    "distance": _markers_from_distance,
    "contour": _markers_from_contour,
    "color": _markers_from_color,
    "peak": _markers_from_peaks,
}


def _add_lonely(mask: Mask, markers: Labels) -> Labels:
    """A blob that no marker touches is a nucleus all the same, and becomes a marker."""
    blobs, n_blobs = ndi.label(mask)
    lonely = np.ones(n_blobs + 1, bool)
    lonely[blobs[markers > 0]] = False
    lonely[0] = False
    return np.where(lonely[blobs], blobs + markers.max(initial=0), markers).astype(np.int32)


def _above(probs: Probs, thresholds: Mapping[str, float], head: str) -> Mask:
    return _head(probs, head) > thresholds[head]


def _head(probs: Probs, head: str) -> NDArray[np.float32]:
    if head not in probs:
        raise ValueError(f"the network has no head '{head}'; there are: {', '.join(probs)}")
    return probs[head]


def _components(mask: Mask) -> Labels:
    labels, _ = ndi.label(mask, output=np.int32)
    return labels


def _single_owner(blobs: Labels, markers: Labels) -> NDArray[np.int64]:
    """Of each blob the marker that is alone in it, 0 where there is none, -1 where there are several."""
    n = int(blobs.max(initial=0)) + 1
    inside = (blobs > 0) & (markers > 0)
    pairs = np.unique(np.stack([blobs[inside], markers[inside]], axis=1), axis=0)
    count = np.bincount(pairs[:, 0], minlength=n)
    owner = np.zeros(n, np.int64)
    owner[pairs[:, 0]] = pairs[:, 1]
    return np.where(count > 1, -1, owner)


def _walk(data: NDArray[np.float32], inside: Mask, markers: Labels, scale: float) -> Labels:
    """Labels of the pixels of one connected component, in row order, (n_pixels,) int32."""
    index = np.full(inside.shape, -1)
    index[inside] = np.arange(np.count_nonzero(inside))
    seeds = markers[inside]
    laplacian = _laplacian(data.astype(np.float64), index, scale)
    free = seeds == 0
    ids, which = np.unique(seeds[~free], return_inverse=True)
    seeded = np.eye(len(ids))[which]
    # The first marker's probability is one minus all others, and is not solved for.
    rhs = -(laplacian[free][:, ~free] @ seeded[:, 1:])
    labels = seeds.copy()
    if free.any():
        solved = splu(csc_array(laplacian[free][:, free])).solve(rhs)
        chances = np.concatenate([1 - solved.sum(axis=1, keepdims=True), solved], axis=1)
        labels[free] = ids[np.argmax(chances, axis=1)]
    return labels


def _laplacian(data: NDArray[np.float64], index: NDArray[np.int64], scale: float) -> csc_array:
    """Graph Laplacian of the 4-neighbourhood of the pixels with an index."""
    heads, tails, weights = [], [], []
    for a, b in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        linked = (index[a] >= 0) & (index[b] >= 0)
        heads.append(index[a][linked])
        tails.append(index[b][linked])
        weights.append(np.exp(-scale * (data[a][linked] - data[b][linked]) ** 2) + WALKER_FLOOR)
    head, tail, weight = (np.concatenate(parts) for parts in (heads, tails, weights))
    n = int(index.max()) + 1
    i, j = np.concatenate([head, tail]), np.concatenate([tail, head])
    degree = np.bincount(i, np.concatenate([weight, weight]), n)
    rows, columns = np.concatenate([i, np.arange(n)]), np.concatenate([j, np.arange(n)])
    values = np.concatenate([-weight, -weight, degree])
    return csc_array(coo_array((values, (rows, columns)), shape=(n, n)))
