"""Probability maps -> instances. The only road from a network to a label map: scores, files, figures and tuning all
take it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage as ndi
from scipy.sparse import csc_array
from scipy.sparse.linalg import splu
from skimage import measure
from skimage.feature import peak_local_max
from skimage.segmentation import expand_labels, watershed

from candidate import Forest, Scene, describe, find_scene, grow_forest
from config import Post, pick
from labels import components, depth, fill_holes, only_neighbours, relabel, remove_fiber, remove_small, typical_area

Mask = NDArray[np.bool_]
Labels = NDArray[np.int32]
Probs = Mapping[str, NDArray[np.float32]]
#: Features of candidates, (N, F) as `candidate.describe` gives them, -> quality expected of each, (N,) in [0, 1].
Judge = Callable[[NDArray[np.float32]], NDArray[np.float32]]

#: Sharpness of the random walker, and the least weight of an edge; both as in scikit-image.
WALKER_BETA, WALKER_FLOOR = 130.0, 1e-10


class Separation(NamedTuple):
    """The instances of probability maps, and what a second opinion thinks of them where one has chosen them."""

    labels: Labels  # (H, W) int32, 1..N without gaps, 0 is background
    quality: NDArray[np.float32] | None = None  # expected of each, (N,) in [0, 1]
    promise: float = 0.0  # what all that were chosen are worth together, before any was removed, see `separate_forest`


def instances(
    probs: Probs,
    post: Post,
    thresholds: Mapping[str, float],
    opinion: Judge | None = None,
    scene: Scene | None = None,
) -> Labels:
    """The labels of `separate`, which says what it takes; (H, W) int32."""
    return separate(probs, post, thresholds, opinion, scene).labels


def separate(
    probs: Probs,
    post: Post,
    thresholds: Mapping[str, float],
    opinion: Judge | None = None,
    scene: Scene | None = None,
) -> Separation:
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
    scene : Scene, optional
        For the same, where these are the maps of a part of an image: what the whole holds.

    Returns
    -------
    Separation
        Labels and what is expected of them. The same input always gives the same labels.

    Raises
    ------
    ValueError
        A head that is not there is asked for, or an unknown policy.
    """
    mask = _above(probs, thresholds, "semantic")
    if not post.segmentation:
        return Separation(_finish(components(mask), probs, post))
    source, policy = _choose(post, probs, opinion)
    if policy == "forest":
        chosen, expected = separate_forest(mask, probs, post, opinion, scene)
        labels = _finish(chosen, probs, post)
        there = np.flatnonzero(np.bincount(chosen.ravel())[1:]) + 1
        promise = float((expected[there] - post.min_quality).sum())
        return Separation(labels, _best_inside(labels, expected[chosen]), promise)
    markers = pick(MARKERS, source, "source of markers")(mask, probs, post, thresholds)
    markers = _add_lonely(mask, markers)
    return Separation(_finish(pick(POLICIES, policy, "policy")(mask, markers, probs), probs, post))


def _best_inside(labels: Labels, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The largest value in each of the instances 1..N, (N,)."""
    best = np.zeros(int(labels.max(initial=0)) + 1, np.float32)
    np.maximum.at(best, labels.ravel(), values.ravel())
    return best[1:]


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
    if len(members) == 1 and ensemble == "avg":
        return dict(members[0])
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
        labels = remove_small(labels, least_area(labels, post))
    if post.filter_fiber:
        labels = remove_fiber(labels)
    return relabel(labels)


def least_area(labels: Labels, post: Post) -> int:
    """The area (pixels) below which ``[post]`` removes an instance."""
    return max(post.min_object_size, round(post.min_object_share * typical_area(labels)))


def heads_read(heads: Collection[str], post: Post, opinion: Judge | None = None) -> set[str]:
    """Those of the heads that `instances` looks at where there are these: without the others it says the same."""
    if not post.segmentation:
        return {"semantic"}
    source, policy = _choose(post, heads, opinion)
    if policy == "forest":
        return set(heads) - {"color"}
    if source not in {*heads, "peak"}:  # `instances` will say so, and what there is
        return set(heads)
    read = {"semantic", source} | FLOODED_BY.get(policy, set(heads))
    if source == "marker" and post.marker_contour:
        read.add("contour")
    return read & set(heads)


def _choose(post: Post, probs: Collection[str], opinion: Judge | None = None) -> tuple[str, str]:
    """Source of the markers and policy, where the settings leave them to the heads there are."""
    source, policy = post.marker, post.policy
    if policy == source == "auto" and opinion is not None:
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
    return _flood(_elevation(probs), mask, markers)


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
    return _flood(-probs["semantic"] - _head(probs, "color").max(0), mask, markers)


def separate_walker(mask: Mask, markers: Labels, probs: Probs) -> Labels:
    """Each pixel goes to the marker that a random walker starting there reaches most probably.

    Grady 2006 (doi:10.1109/TPAMI.2006.233), on the semantic probability. Gaps between markers (see `_Gaps`) do not know
    of each other: only those that several markers want are solved, those of about as many markers together.

    Parameters, Returns
        As `separate_watershed`.
    """
    gaps = _Gaps(mask, markers)
    semantic = probs["semantic"].astype(np.float64)
    scale = WALKER_BETA / (10 * float(semantic.std()) or 1.0)
    framed = np.pad(semantic, 1).ravel()
    magnitude = np.frexp(np.bincount(gaps.pairs // gaps.n_ids))[1]  # 2 for 2 or 3 markers, 3 for up to 7, ...
    for group in np.unique(magnitude):
        _walk(gaps, framed, scale, magnitude == group)
    return gaps.image


def separate_forest(
    mask: Mask, probs: Probs, post: Post, opinion: Judge | None, scene: Scene | None = None
) -> tuple[Labels, NDArray[np.float32]]:
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
        See `Judge`.
    scene : Scene, optional
        See `instances`.

    Returns
    -------
    labels : (H, W) int32
        Numbers with gaps.
    expected : (N + 1,) float32
        The quality expected of each number; 0 for the background.

    Raises
    ------
    ValueError
        There is no opinion.
    """
    if opinion is None:
        raise ValueError("[post] policy = forest: this checkpoint has no second opinion; tune.py gives it one")
    forest = candidates(mask, probs, post)
    expected = opinion(describe(forest, probs, scene))
    return forest.pick(expected - post.min_quality), np.append(np.float32(0), expected)


def survey(samples: Iterable[Probs], post: Post, thresholds: Mapping[str, float]) -> Scene:
    """What an image holds as a whole, by the maps of samples of it; for the policy ``forest``."""
    forests = ((candidates(_above(probs, thresholds, "semantic"), probs, post), probs["semantic"]) for probs in samples)
    return find_scene(list(forests))


def candidates(mask: Mask, probs: Probs, post: Post) -> Forest:
    """The ways in which the blobs of a mask fall apart, by the head that tells nuclei apart best."""
    if "marker" in probs:
        height = np.clip(_less_contour(probs, post), 0, 1)
    elif "distance" in probs:
        height = probs["distance"]
    elif "contour" in probs:
        height = 1 - probs["contour"]
    else:
        blobs = components(mask)
        inside = depth(blobs)
        deepest = np.append(np.float32(0), _best_inside(blobs, inside))[blobs]
        height = (inside / np.maximum(deepest, 1)).astype(np.float32)
    return grow_forest(mask, height, _elevation(probs))


#: (mask, markers, probs) -> labels
POLICIES: dict[str, Callable[[Mask, Labels, Probs], Labels]] = {
    "ws": separate_watershed,
    "rw": separate_walker,
    "color": separate_color,
}
#: Heads that a policy looks at, beside the semantic one; one that is not here may look at all.
FLOODED_BY: dict[str, set[str]] = {"ws": {"contour", "distance"}, "rw": set(), "color": {"color"}}


def _markers_from_marker(mask: Mask, probs: Probs, post: Post, thresholds: Mapping[str, float]) -> Labels:
    return components(mask & (_less_contour(probs, post) > thresholds["marker"]))


def _less_contour(probs: Probs, post: Post) -> NDArray[np.float32]:
    """The marker map, less the contour as far as the settings want it."""
    marker = _head(probs, "marker")
    if post.marker_contour and "contour" in probs:
        marker = marker - np.float32(post.marker_contour) * probs["contour"]
    return marker


def _markers_from_distance(mask: Mask, probs: Probs, post: Post, thresholds: Mapping[str, float]) -> Labels:
    return components(mask & _above(probs, thresholds, "distance"))


def _markers_from_contour(mask: Mask, probs: Probs, post: Post, thresholds: Mapping[str, float]) -> Labels:
    return components(mask & ~_above(probs, thresholds, "contour"))


def _markers_from_color(mask: Mask, probs: Probs, post: Post, thresholds: Mapping[str, float]) -> Labels:
    """Pieces of one colour; what is smaller than a nucleus is left to the pieces around it."""
    colors = _head(probs, "color")
    color = np.where(mask & (colors.max(0) > thresholds["color"]), colors.argmax(0) + 1, 0)
    pieces: NDArray[np.int_] = measure.label(color, connectivity=1)
    return remove_small(pieces, post.min_object_size)


def _markers_from_peaks(mask: Mask, probs: Probs, post: Post, thresholds: Mapping[str, float]) -> Labels:
    """Peaks of the distance to the background, at least `seg_scale` times the root of the typical area apart."""
    peaks = np.zeros(mask.shape, bool)
    blobs = components(mask)
    sizes = np.sort(np.bincount(blobs.ravel())[1:])
    if not sizes.size:
        return components(peaks)
    typical = sizes[: max(1, round(post.seg_ratio * sizes.size))].mean()
    apart = max(1, round(post.seg_scale * float(np.sqrt(typical))))
    # Smoothing joins the twin peaks of a flat ridge; the distance itself would make a marker of each.
    ridges = ndi.gaussian_filter(ndi.distance_transform_edt(mask), 1.0) * mask
    found = peak_local_max(ridges, min_distance=apart, labels=blobs, exclude_border=False)
    peaks[tuple(found.T)] = True
    return components(peaks)


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
    blobs = components(mask)
    lonely = np.ones(int(blobs.max(initial=0)) + 1, bool)
    lonely[blobs[markers > 0]] = False
    lonely[0] = False
    return np.where(lonely[blobs], blobs + markers.max(initial=0), markers).astype(np.int32)


def _above(probs: Probs, thresholds: Mapping[str, float], head: str) -> Mask:
    return _head(probs, head) > thresholds[head]


def _head(probs: Probs, head: str) -> NDArray[np.float32]:
    if head not in probs:
        raise ValueError(f"the network has no head '{head}'; there are: {', '.join(probs)}")
    return probs[head]


class _Gaps:
    """What of a mask no marker covers, in pieces; a piece that meets one marker alone is that marker's at once.

    Work on flat arrays with a frame of one pixel, so that every pixel has four neighbours.

    Parameters
    ----------
    mask : (H, W) bool
    markers : (H, W) int32
        What of them lies outside the mask does not count.

    Attributes
    ----------
    labels : ((H + 2) * (W + 2),) int32
        Markers, and the pieces that meet one; 0 elsewhere.
    pixels : (n,) int64
        Where the pixels of contested pieces are in `labels`, in order.
    piece : (n,) int64
        Which contested piece each belongs to, from 0.
    pairs : (k,) int64
        Which markers each contested piece meets, as piece times `n_ids` plus marker, sorted.
    n_ids : int
        One more than the greatest marker.
    beside : (4,) int64
        Steps to the neighbours above, left, right and below.
    """

    def __init__(self, mask: Mask, markers: Labels) -> None:
        self.shape = mask.shape[0] + 2, mask.shape[1] + 2
        self.beside = np.array([-self.shape[1], -1, 1, self.shape[1]])
        seeds = np.where(mask, markers, 0)
        pieces = np.pad(components(mask & (seeds == 0)), 1).ravel()
        self.labels = np.pad(seeds, 1).astype(np.int32).ravel()
        pixels = np.flatnonzero(pieces)
        n_pieces = int(pieces.max(initial=0)) + 1
        owner, wanted = only_neighbours(self.labels[pixels[:, None] + self.beside], pieces[pixels], n_pieces)
        self.labels[pixels] = owner[pieces[pixels]]
        self.pixels = pixels[wanted[pieces[pixels]]]
        self.piece = (np.cumsum(wanted) - 1)[pieces[self.pixels]]
        met = self.labels[self.pixels[:, None] + self.beside]
        some, which = np.nonzero(met)
        self.n_ids = int(self.labels.max()) + 1
        self.pairs = np.unique(self.piece[some] * self.n_ids + met[some, which])

    @property
    def image(self) -> Labels:
        """The labels, (H, W) int32."""
        return np.ascontiguousarray(self.labels.reshape(self.shape)[1:-1, 1:-1])


def _flood(elevation: NDArray[np.floating], mask: Mask, markers: Labels) -> Labels:
    """The watershed of scikit-image, which sees of the image no more than contested gaps and the markers' rims.

    Gaps do not know of each other, so nothing changes but where rims of markers are equally high: their order in its
    queue is left open.
    """
    gaps = _Gaps(mask, markers)
    if not gaps.pixels.size:
        return gaps.image
    needed = np.zeros(gaps.labels.size, bool)
    beside = gaps.pixels[:, None] + gaps.beside
    needed[beside[gaps.labels[beside] > 0]] = True
    seeds = np.where(needed, gaps.labels, 0)
    needed[gaps.pixels] = True
    flat = watershed(np.pad(elevation, 1), seeds.reshape(gaps.shape), mask=needed.reshape(gaps.shape)).ravel()
    gaps.labels[gaps.pixels] = flat[gaps.pixels]
    return gaps.image


def _walk(gaps: _Gaps, semantic: NDArray[np.float64], scale: float, chosen: Mask) -> None:
    """Solve the chosen pieces, and write who wins into the labels."""
    mine = chosen[gaps.piece]
    pixels, piece = gaps.pixels[mine], gaps.piece[mine]
    beside = pixels[:, None] + gaps.beside
    row = np.full(gaps.labels.size, -1)
    row[pixels] = np.arange(pixels.size)
    seeds, neighbours = gaps.labels[beside], row[beside]
    linked = (seeds > 0) | (neighbours >= 0)
    step = semantic[pixels][:, None] - semantic[beside]
    weights = np.where(linked, np.exp(-scale * step**2) + WALKER_FLOOR, 0)

    # Each piece has its markers in columns of their own, from 0.
    first = np.searchsorted(gaps.pairs, np.arange(len(chosen) + 1) * gaps.n_ids)
    n_columns = int(np.diff(first)[chosen].max())
    at, direction = np.nonzero(seeds)
    column = np.searchsorted(gaps.pairs, piece[at] * gaps.n_ids + seeds[at, direction]) - first[piece[at]]
    pull = np.bincount(at * n_columns + column, weights[at, direction], pixels.size * n_columns)

    solver = splu(
        _laplacian(neighbours, weights),
        permc_spec="MMD_AT_PLUS_A",
        diag_pivot_thresh=0.0,
        options={"SymmetricMode": True},
    )
    # The first marker's probability is one minus all others, and is not solved for.
    others = solver.solve(pull.reshape(-1, n_columns)[:, 1:])
    chances = np.concatenate([1 - others.sum(axis=1, keepdims=True), others], axis=1)
    gaps.labels[pixels] = gaps.pairs[first[piece] + chances.argmax(axis=1)] % gaps.n_ids


def _laplacian(neighbours: NDArray[np.int64], weights: NDArray[np.float64]) -> csc_array:
    """What of the graph Laplacian links pixels without marker, from the rows and the weights of the four neighbours.

    The rows of the pixels are in their order, as are above, left, itself, right, below: it is sorted as it is made.
    """
    n = len(neighbours)
    rows = np.insert(neighbours, 2, np.arange(n), axis=1)
    values = np.insert(-weights, 2, weights.sum(axis=1), axis=1)
    kept = rows >= 0
    ends = np.concatenate([[0], np.cumsum(kept.sum(axis=1))])
    return csc_array((values[kept], rows[kept].astype(np.int32), ends.astype(np.int32)), shape=(n, n))
