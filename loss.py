"""Logits and targets -> named scalar losses."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from config import pick


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


def _overlap(logits: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of each image: sum of the product, and sum of the sums, of probability and target."""
    probs = torch.sigmoid(logits)
    axes = (1, 2, 3)
    weight = weight / weight.mean(axes, keepdim=True)  # or the 1 that smooths would count less among large weights
    return (probs * target * weight).sum(axes), ((probs + target) * weight).sum(axes)


#: (B, 1, H, W) logits, target in [0, 1], positive weight -> scalar. A ``w`` before the name asks for the weight map.
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "bce": bce,
    "focal": focal,
    "iou": iou,
    "dice": dice,
}


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
    """

    def __init__(self, rules: Mapping[str, str]) -> None:
        self.terms = {head: parse_terms(text) for head, text in rules.items()}

    def __call__(self, logits: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Named terms, "head/loss" -> scalar with its factor in it; the total is their sum.

        Parameters
        ----------
        logits, targets : mapping
            head -> (B, 1, H, W); `targets` may hold a "weight".
        """
        losses: dict[str, Tensor] = {}
        for head, terms in self.terms.items():
            ones = torch.ones_like(targets[head])
            for factor, name, weighted in terms:
                weight = targets.get("weight", ones) if weighted else ones
                label = f"{head}/{'w' if weighted else ''}{name}"
                value = factor * LOSSES[name](logits[head].float(), targets[head], weight)
                losses[label] = losses[label] + value if label in losses else value
        return losses
