"""Logits and targets -> named scalar losses."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from config import pick
from labels import adjacency

#: Share of the full loss that a side output counts, "semantic@1" beside "semantic".
SIDE_FACTOR = 0.3
#: Two nuclei with at most this many pixels between them must not have the same colour.
COLOR_REACH = 3


def bce(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Binary cross entropy, weighted mean over pixels."""
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (each * weight).sum() / weight.sum()


def focal(logits: Tensor, target: Tensor, weight: Tensor, gamma: float = 2.0) -> Tensor:
    """Focal loss of each pixel (Lin et al. 2017, doi:10.1109/ICCV.2017.324), weighted mean over pixels."""
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    probs = torch.sigmoid(logits)
    missed = (probs - target).abs()  # 1 - p_t of the paper, for soft targets too
    return (each * missed**gamma * weight).sum() / weight.sum()


def iou(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """One minus the soft pixel IoU of each image, regardless of instances."""
    both, either = _overlap(logits, target, weight)
    return (1 - (both + 1) / (either - both + 1)).mean()


def dice(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """One minus the soft Dice coefficient of each image (Milletari et al. 2016, doi:10.1109/3DV.2016.79)."""
    both, either = _overlap(logits, target, weight)
    return (1 - (2 * both + 1) / (either + 1)).mean()


def mse(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Squared difference of probability and target, weighted mean over pixels."""
    return ((torch.sigmoid(logits) - target) ** 2 * weight).sum() / weight.sum()


def _overlap(logits: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of each image: sum of the product, and sum of the sums, of probability and target."""
    probs = torch.sigmoid(logits)
    axes = (1, 2, 3)
    weight = weight / weight.mean(axes, keepdim=True)  # or the 1 that smooths would count less among large weights
    return (probs * target * weight).sum(axes), ((probs + target) * weight).sum(axes)


#: (B, C, H, W) logits, target in [0, 1], positive weight -> scalar. A ``w`` before the name asks for the weight map.
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "bce": bce,
    "focal": focal,
    "iou": iou,
    "dice": dice,
    "mse": mse,
}


def match_colors(logits: Tensor, labels: Tensor) -> Tensor:
    """The colouring of the nuclei that is nearest to what the network says.

    Any 4-colouring in which neighbours differ is as good as any other, and no network can guess which one was drawn; so
    it is free to choose. Nuclei take colours in order of how sure the network is of them, each its favourite among
    those that no neighbour has taken. After Kulikov et al. 2018 (Deep Coloring, arXiv:1807.10007), who let each object
    choose by itself and punish equal colours around it.

    Parameters
    ----------
    logits : (B, C, H, W)
        One channel a colour.
    labels : (B, 1, H, W)
        Label maps; 0 is background.

    Returns
    -------
    (B, C, H, W) of the type of `logits`
        1 where a pixel has the colour, else 0; all 0 in the background. Where a nucleus has neighbours of all
        colours it takes its favourite all the same.
    """
    ids = labels.long()
    first = ids.amax((1, 2, 3)).cumsum(0).roll(1)
    first[0] = 0
    ids = torch.where(ids > 0, ids + first.view(-1, 1, 1, 1), 0)  # unique in the batch
    n_ids = int(ids.max()) + 1
    votes = logits.detach().float().movedim(1, -1).reshape(-1, logits.shape[1])
    sums = votes.new_zeros(n_ids, logits.shape[1]).index_add_(0, ids.flatten(), votes)
    means = sums / torch.bincount(ids.flatten(), minlength=n_ids).clamp(min=1)[:, None]
    pairs = np.concatenate([adjacency(image, COLOR_REACH + 1) for image in ids[:, 0].cpu().numpy()])
    colors = _color_greedily(means.cpu().numpy(), pairs)
    chosen = F.one_hot(torch.from_numpy(colors), logits.shape[1]).to(logits)
    chosen[0] = 0
    return chosen[ids[:, 0]].movedim(-1, 1)


def _color_greedily(means: NDArray[np.float32], pairs: NDArray[np.int32]) -> NDArray[np.int64]:
    """A colour for each id, (N,) from 0; `means` (N, C) says how much each likes each."""
    around: list[list[int]] = [[] for _ in means]
    for a, b in pairs:
        around[a].append(b)
        around[b].append(a)
    ranked = np.sort(means, axis=1)
    colors = np.full(len(means), -1)
    for nucleus in np.argsort(ranked[:, -2] - ranked[:, -1], kind="stable"):
        likes = means[nucleus].copy()
        taken = [color for color in colors[around[nucleus]] if color >= 0]
        if len(set(taken)) < len(likes):
            likes[taken] = -np.inf
        colors[nucleus] = likes.argmax()
    return colors


def imitate(logits: Mapping[str, Tensor], taught: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How far a network is from its teacher: "head/teacher" -> binary cross entropy, mean over pixels.

    Hinton et al. 2015 (arXiv:1503.02531), at temperature 1.

    Parameters
    ----------
    logits, taught : mapping
        head -> (B, C, H, W) logits of the network and of its teacher. What only one of them has is left alone, and so
        is a colour head, where any colouring is as good.
    """
    heads = [head for head in logits if head in taught and head not in MATCHERS]
    return {
        f"{head}/teacher": F.binary_cross_entropy_with_logits(logits[head].float(), taught[head].float().sigmoid())
        for head in heads
    }


#: head -> (logits, target as it comes) -> target as its losses want it
MATCHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"color": match_colors}


def parse_terms(text: str) -> list[tuple[float, str, bool]]:
    """Read ``wbce + 0.5*dice`` as (factor, row of `LOSSES`, weighted?) of each term."""
    terms = []
    for part in text.split("+"):
        found = re.fullmatch(r"(?:(\d+\.?\d*|\.\d+)\s*\*\s*)?([a-z_]+)", part.strip())
        if not found:
            raise ValueError(f"[loss] '{text}': wanted a sum such as wbce + 0.5*dice")
        factor, name = float(found[1] or 1), found[2]
        weighted = name not in LOSSES and name.startswith("w")
        name = name[1:] if weighted else name
        pick(LOSSES, name, "loss")
        terms.append((factor, name, weighted))
    return terms


class Criterion:
    """The losses of a batch.

    Parameters
    ----------
    rules : mapping
        head -> sum of losses, such as ``{"semantic": "wbce + dice"}``; other heads are not trained.

    Notes
    -----
    The loss of a batch is the mean of those of its parts, by their images, as far as its terms are means over images of
    one size; so many processes, or a step of several batches, find the gradients of the whole. ``wbce``, ``wfocal`` and
    ``wmse`` are not: they are means over the weight in the batch, of which an image of many borders has more.
    """

    def __init__(self, rules: Mapping[str, str]) -> None:
        self.terms = {head: parse_terms(text) for head, text in rules.items()}

    def __call__(self, logits: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Named terms, "head/loss" -> scalar with its factor in it; the total is their sum.

        Parameters
        ----------
        logits, targets : mapping
            head -> (B, C, H, W). `logits` may hold side outputs, "head@1" and so on, which learn what the head
            learns; `targets` may hold a "weight".
        """
        learned = {
            head: MATCHERS[head](logits[head].float(), targets[head]) if head in MATCHERS else targets[head]
            for head in self.terms
        }
        losses: dict[str, Tensor] = {}
        for output, value in logits.items():
            head, _, side = output.partition("@")
            for label, loss in self._head(head, value.float(), learned, targets) if head in self.terms else ():
                loss = SIDE_FACTOR * loss if side else loss
                losses[label] = losses[label] + loss if label in losses else loss
        return losses

    def _head(
        self, head: str, logits: Tensor, learned: Mapping[str, Tensor], targets: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        ones = torch.ones_like(logits[:, :1])
        for factor, name, weighted in self.terms[head]:
            weight = (targets.get("weight", ones) if weighted else ones).expand_as(logits)
            yield f"{head}/{'w' if weighted else ''}{name}", factor * LOSSES[name](logits, learned[head], weight)
