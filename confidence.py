"""A second opinion on every nucleus: small networks that have learned, of candidates whose truth was known, how well
each would score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from candidate import FEATURES
from metric import THRESHOLDS

#: Networks whose opinions are averaged, and the units of each of their two hidden layers.
N_VOICES, N_UNITS = 5, 48
#: How they are trained: least steps, candidates a step, peak learning rate, weight decay.
N_STEPS, N_BATCH, RATE, DECAY = 1500, 256, 3e-3, 1e-2
#: How often each candidate is seen, where they are so many that this takes more steps.
N_PASSES = 64
#: Deviations of the noise on features that are learned from, so that what is learned holds where images look otherwise.
NOISE = 0.5
#: Features are standardised, and cut off beyond so many deviations: what was never seen is taken for the extreme.
REACH = 4.0


class Opinion(nn.Module):
    """Expected quality of candidates, by the features of `candidate.describe`.

    Quality is the share of the thresholds 0.50:0.05:0.95 that the IoU with the true nucleus passes: what a nucleus adds
    to the mean average precision.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, n_voices: int = N_VOICES, n_features: int = len(FEATURES), n_units: int = N_UNITS) -> None:
        super().__init__()
        sizes = (n_features, n_units, n_units, 1)
        self.weights = nn.ParameterList(
            torch.randn(n_voices, n_in, n_out) / n_in**0.5 for n_in, n_out in zip(sizes, sizes[1:], strict=False)
        )
        self.biases = nn.ParameterList(torch.zeros(n_voices, 1, n_out) for n_out in sizes[1:])
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("std", torch.ones(n_features))

    @classmethod
    def load(cls, state: Mapping[str, Tensor]) -> Opinion:
        """From the state of another.

        Raises
        ------
        ValueError
            It is of a version with other features.
        """
        n_voices, n_features, n_units = state["weights.0"].shape
        if n_features != len(FEATURES):
            raise ValueError(
                f"a second opinion on {n_features} features, this version has {len(FEATURES)}: run tune.py"
            )
        opinion = cls(n_voices, n_features, n_units)
        opinion.load_state_dict(state)
        return opinion.eval()

    def forward(self, features: Tensor) -> Tensor:
        """Logits of each voice: (V, N, F) or (N, F), the same for all, -> (V, N)."""
        x = ((features - self.mean) / self.std).clamp(-REACH, REACH)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = x @ weight + bias
            x = F.silu(x) if i + 1 < len(self.weights) else x
        return x[..., 0]

    @torch.inference_mode()
    def judge(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Expected quality in [0, 1] of (N, F) features, (N,) float32."""
        return torch.sigmoid(self(torch.from_numpy(features))).mean(0).numpy()


def quality(iou: NDArray[np.floating]) -> NDArray[np.float32]:
    """The share of the competition's thresholds that each IoU passes: float -> float32 of the same shape, in [0, 1]."""
    return (iou[..., None] > THRESHOLDS).mean(-1, dtype=np.float32)


def learn(features: Sequence[NDArray[np.float32]], ious: Sequence[NDArray[np.floating]], seed: int = 1) -> Opinion:
    """Train an opinion on candidates whose truth is known.

    Parameters
    ----------
    features, ious : sequence of (N, F) float32 and of (N,) float in [0, 1]
        Of each image, as `candidate.describe` gives them and by the true nucleus that each overlaps most; an image of
        many candidates counts more than one of few, but less than as many times.
    seed : int

    Returns
    -------
    Opinion
        In evaluation mode.

    Raises
    ------
    ValueError
        There is no candidate.

    Notes
    -----
    Five networks of two hidden layers, each shown other candidates at each step, with other noise, by cross entropy
    with the quality. Noise on the input is Tikhonov regularisation (Bishop 1995, doi:10.1162/neco.1995.7.1.108).
    """
    counts = np.array([len(iou) for iou in ious])
    if not counts.sum():
        raise ValueError("no candidate to learn from: the maps of the network show no nucleus")
    x = torch.from_numpy(np.concatenate(features))
    y = torch.from_numpy(quality(np.concatenate(ious)))
    weight = torch.from_numpy(np.repeat(1 / np.sqrt(np.maximum(counts, 1)), counts).astype(np.float32))
    weight = weight / weight.mean()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        opinion = Opinion()
        opinion.mean.copy_(x.mean(0))
        opinion.std.copy_(x.std(0, correction=0).clamp(min=1e-6))
        optimizer = torch.optim.AdamW(opinion.parameters(), RATE, weight_decay=DECAY)
        n_steps = max(N_STEPS, N_PASSES * len(x) // N_BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, n_steps)
        for _ in range(n_steps):
            some = torch.randint(len(x), (N_VOICES, N_BATCH))
            seen = x[some] + NOISE * opinion.std * torch.randn(*some.shape, x.shape[1])
            losses = F.binary_cross_entropy_with_logits(opinion(seen), y[some], weight[some], reduction="none")
            optimizer.zero_grad()
            losses.mean(1).sum().backward()
            optimizer.step()
            schedule.step()
    return opinion.eval()
