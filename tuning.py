"""Find the thresholds and rules that separate nuclei best, on probability maps that are predicted once.

Every candidate is judged on every image at most once, whatever searches ask for it; so the search over all images and
those of the cross-validation, which leave out a kind of image each, cost little more than one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from candidate import describe
from confidence import Opinion, learn
from config import Config, look_up
from labels import relabel
from metric import average_precision
from postprocess import Probs, candidates, instances, merge, merged_thresholds

#: Settings that are searched, and the values tried, in this order.
GRID: dict[str, tuple[Any, ...]] = {
    "param.threshold": (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7),
    "param.threshold_mark": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    "post.marker_contour": (0.0, 0.25, 0.5, 0.75, 1.0),
    "post.min_confidence": (0.0, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8),
    "post.min_object_size": (6, 12, 20, 30, 40),
    "post.min_object_share": (0.0, 0.05, 0.1, 0.15, 0.2, 0.25),
    "post.grow": (0, 1),
    "post.policy": ("ws", "rw"),
}

#: Where a second opinion is asked: a wide mask, and small objects too; what is doubtful is left to the opinion.
WITH_OPINION: dict[str, Any] = {
    "param.threshold": 0.45,
    "post.marker_contour": 0.25,
    "post.min_object_share": 0.0,
    "post.policy": "forest",
}
#: Parts in which images of a single kind are judged, each by what was found on the others.
N_FOLDS = 5
#: Side (px) of the part of an image that is judged: a large image would take as long as all others together.
WINDOW = 512
#: How often a network is added to the mixture of an ensemble.
N_PICKS = 8
#: What a change has to gain to be made.
LEAST_GAIN = 1e-6

Choice = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Case:
    """An image as tuning sees it.

    Attributes
    ----------
    kind : str
        What cross-validation leaves out together.
    members : tuple of dict
        What each network says: head -> (H, W) or (C, H, W) uint8, 255 times the probability. That takes a quarter of
        the memory, and thresholds are never nearer to each other.
    truth : (H, W) int32
    group : str
        Images that share it are kin: none is judged by what was found on another.
    """

    kind: str
    members: tuple[Mapping[str, NDArray[np.uint8]], ...]
    truth: NDArray[np.int32]
    group: str = ""

    @classmethod
    def pack(cls, kind: str, members: Sequence[Probs], truth: NDArray[np.int32], group: str = "") -> Case:
        """From maps of float32 in [0, 1]; of a large image the middle `WINDOW` square."""
        top, left = (max(side - WINDOW, 0) // 2 for side in truth.shape)
        box = np.s_[..., top : top + WINDOW, left : left + WINDOW]
        packed = ({head: np.rint(255 * p[box]).astype(np.uint8) for head, p in maps.items()} for maps in members)
        return cls(kind, tuple(packed), relabel(truth[box]), group)


class Lesson(NamedTuple):
    """What an image teaches an opinion."""

    kind: str
    features: NDArray[np.float32]  # (N, F), of each candidate
    ious: NDArray[np.float64]  # (N,), with the truth


def judge(case: Case, config: Config, opinion: Opinion | None = None) -> float:
    """The mean average precision of an image whose nuclei are separated by the settings."""
    probs, thresholds = _unpack(case, config)
    labels = instances(probs, config.post, thresholds, opinion and opinion.judge)
    return float(average_precision(case.truth, labels).mean())


def examine(case: Case, config: Config) -> Lesson:
    """The candidates of an image."""
    probs, thresholds = _unpack(case, config)
    forest = candidates(probs["semantic"] > thresholds["semantic"], probs, config.post)
    return Lesson(case.kind, describe(forest, probs), forest.overlaps(case.truth))


def _unpack(case: Case, config: Config) -> tuple[Probs, dict[str, float]]:
    """The maps of all networks together, and their thresholds."""
    members = [{h: p.astype(np.float32) / np.float32(255) for h, p in maps.items()} for maps in case.members]
    valid = config.valid
    probs = merge(members, config.thresholds, valid.ensemble, valid.ensemble_weights)
    return probs, merged_thresholds(probs, config.thresholds, valid.ensemble)


@dataclass
class Tuner:
    """A search on the images it is given.

    Use as a context manager: it holds worker processes.

    Parameters
    ----------
    cases : sequence of Case
    config : Config
        Where the search starts; what the user has set is not searched.
    grid : mapping
        ``section.key`` -> values in order; the search moves from a value to the one beside it.
    n_worker : int
        Processes; 0 works in this one.
    """

    cases: Sequence[Case]
    config: Config
    grid: Mapping[str, Sequence[Any]] = field(default_factory=lambda: dict(GRID))
    n_worker: int = 0

    def __post_init__(self) -> None:
        self.grid = {key: values for key, values in self.grid.items() if key not in self.config.user_set}
        self._known: dict[Choice, NDArray[np.float64]] = {}
        self._pool = None
        if self.n_worker:
            # Fresh processes: a fork of one in which torch has threads may hang.
            context = get_context("spawn")
            self._pool = ProcessPoolExecutor(self.n_worker, context, _remember, (self.cases,))

    def __enter__(self) -> Tuner:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    @property
    def n_judged(self) -> int:
        """How many choices were tried."""
        return len(self._known)

    @property
    def start(self) -> Choice:
        """What the settings say now of everything that is searched."""
        dump = self.config.model_dump()
        return tuple((key, look_up(dump, key)) for key in self.grid)

    def scores(self, choice: Choice) -> NDArray[np.float64]:
        """The score of each image under a choice, (N,) float64."""
        if choice not in self._known:
            config = self.config.suggest(dict(choice))
            if self._pool is None:
                found = [judge(case, config) for case in self.cases]
            else:
                numbers = range(len(self.cases))
                found = list(self._pool.map(_judge_remembered, numbers, [config] * len(numbers), chunksize=2))
            self._known[choice] = np.array(found)
        return self._known[choice]

    def search(self, subset: NDArray[np.bool_] | None = None) -> Choice:
        """Weigh the networks, then go from setting to setting, each moved as long as the mean over the subset rises.

        Parameters
        ----------
        subset : (N,) bool, optional
            Images that count; all by default.
        """
        wanted = np.ones(len(self.cases), bool) if subset is None else subset
        best = self._weigh(wanted) + self.start
        moved = True
        while moved:
            before = best
            for key in self.grid:
                best = self._line(best, key, wanted)
            moved = best != before
        return best

    def _mean(self, choice: Choice, wanted: NDArray[np.bool_]) -> float:
        return float(self.scores(choice)[wanted].mean())

    def _line(self, choice: Choice, key: str, wanted: NDArray[np.bool_]) -> Choice:
        """The best choice along one setting: of a rule every value, of a number one after the other while they help."""
        values, now = list(self.grid[key]), dict(choice)[key]
        if isinstance(values[0], str):
            paths: list[list[Any]] = [[value] for value in values]
        else:
            low, high = (int(np.searchsorted(values, now, side)) for side in ("left", "right"))
            paths = [values[high:], values[:low][::-1]]
        best = choice
        for path in paths:
            for value in path:
                other = tuple((name, value if name == key else old) for name, old in best)
                if self._mean(other, wanted) <= self._mean(best, wanted) + LEAST_GAIN:
                    break
                best = other
        return best

    def _weigh(self, wanted: NDArray[np.bool_]) -> Choice:
        """How much each network of an ensemble should count; nothing where all the same is best, or there is but one.

        Networks are added one by one, each as often as it helps most (Caruana et al. 2004, Ensemble selection from
        libraries of models, doi:10.1145/1015330.1015432); the best mixture on the way is taken.
        """
        n, key = len(self.cases[0].members), "valid.ensemble_weights"
        if n == 1 or key in self.config.user_set:
            return ()
        found: Choice = ()
        counts, best = np.zeros(n), self._mean(self.start, wanted)
        for _ in range(N_PICKS):
            trials: list[Choice] = [((key, tuple((counts + np.eye(n)[i]).tolist())),) for i in range(n)]
            scores = [self._mean(trial + self.start, wanted) for trial in trials]
            step = trials[int(np.argmax(scores))]
            counts = np.array(step[0][1])
            if max(scores) > best + LEAST_GAIN:
                found, best = step, max(scores)
        return found

    def cross_validate(self) -> NDArray[np.float64]:
        """The score of each image under what the search finds on `strangers` to it, (N,) float64.

        This, and not the score of the final choice on the images it was found on, is what to expect of images of a kind
        that was not there. Where there is no stranger the start is judged.
        """
        scores = self.scores(self.start).copy()
        for mine, others in strangers(self.cases):
            scores[mine] = self.scores(self.search(others))[mine]
        return scores


def strangers(cases: Sequence[Case], seed: int = 1) -> list[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Parts of the images, each with those that have nothing in common with it, as pairs of (N,) bool.

    A part is a kind; where there is but one, a fifth of the groups of kin. What is kin of the part is on neither side;
    a part to which all are kin is left out.
    """
    kinds = np.unique([case.kind for case in cases], return_inverse=True)[1]
    groups = np.unique([case.group or f"image {i}" for i, case in enumerate(cases)], return_inverse=True)[1]
    if not kinds.any():
        kinds = np.random.default_rng(seed).permutation(int(groups.max()) + 1)[groups] % N_FOLDS
    parts = [(mine := kinds == kind, ~mine & ~np.isin(groups, groups[mine])) for kind in np.unique(kinds)]
    return [(mine, others) for mine, others in parts if others.any()]


def form_opinion(cases: Sequence[Case], config: Config, seed: int = 1) -> tuple[Opinion, NDArray[np.float64]] | None:
    """A second opinion formed on all images, and what to expect of it.

    Parameters
    ----------
    cases : sequence of Case
    config : Config
        Should hold what `WITH_OPINION` says.
    seed : int

    Returns
    -------
    opinion : Opinion
    scores : (N,) float64
        Of each image by an opinion formed on `strangers` alone.

    None where an image has no stranger, or strangers have no candidate to learn from.
    """
    known = [examine(case, config) for case in cases]
    parts = strangers(cases, seed)
    scores = np.full(len(cases), np.nan)
    for mine, others in parts:
        opinion = _learn([lesson for lesson, wanted in zip(known, others, strict=True) if wanted], seed)
        if opinion is None:
            return None
        scores[mine] = [judge(case, config, opinion) for case, its in zip(cases, mine, strict=True) if its]
    if np.isnan(scores).any() or (opinion := _learn(known, seed)) is None:
        return None
    return opinion, scores


def form_from_lessons(
    lessons: Sequence[Lesson], cases: Sequence[Case], config: Config, seed: int = 1
) -> tuple[Opinion, NDArray[np.float64]] | None:
    """As `form_opinion`, of other images that teach: each case is judged by what those of other kinds taught, by all
    where there is no other kind. None where there is no candidate to learn from."""
    everything = _learn(lessons, seed)
    if everything is None:
        return None
    of_others = {
        kind: _learn([lesson for lesson in lessons if lesson.kind != kind], seed) or everything
        for kind in {case.kind for case in cases} & {lesson.kind for lesson in lessons}
    }
    return everything, np.array([judge(case, config, of_others.get(case.kind, everything)) for case in cases])


def _learn(lessons: Sequence[Lesson], seed: int) -> Opinion | None:
    """What the images teach; None without a candidate."""
    if not any(len(lesson.ious) for lesson in lessons):
        return None
    return learn([lesson.features for lesson in lessons], [lesson.ious for lesson in lessons], seed)


_cases: Sequence[Case] = ()


def _remember(cases: Sequence[Case]) -> None:
    global _cases
    _cases = cases


def _judge_remembered(number: int, config: Config) -> float:
    return judge(_cases[number], config)
