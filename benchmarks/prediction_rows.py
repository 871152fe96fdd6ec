"""Row: images to the CSV of a submission."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import valid
from annotation import decode_rle, read_csv
from benchmarks import agree, plain
from benchmarks.inputs import Inputs
from benchmarks.row import Floor, Row
from config import CHECKPOINT_KEYS, Post, load_config
from helper import DEFAULT_WEIGHTS, load_checkpoint
from image import read_image
from model import load_model

POST = Post(policy="rw", marker="marker", marker_contour=0.0, min_confidence=0.0, min_object_share=0.0)
THRESHOLDS = {"semantic": 0.5, "marker": 0.5}
SETTINGS = [
    "post.policy=rw", "post.marker=marker", "post.marker_contour=0", "post.min_confidence=0", "post.min_object_share=0",
    f"post.min_object_size={POST.min_object_size}", "param.threshold=0.5", "param.threshold_mark=0.5",
    "pre.nucleus_diameter=0", "valid.test_time_augment=flips",
]  # fmt: skip
BORDER = 32
#: Least IoU at which a nucleus of one CSV is that of the other.
SAME_IOU = 0.8

Probs = dict[str, NDArray[np.float32]]


def predict(inputs: Inputs) -> Row:
    images = inputs.folder / "loose"
    images.mkdir()
    for record in inputs.records:
        (images / f"{record.id}{record.image.suffix}").symlink_to(record.image)
    shapes = {record.id: labels.shape for record, labels in zip(inputs.records, inputs.labels, strict=True)}
    n_pixels = sum(height * width for height, width in shapes.values())

    def same(theirs: Mapping[str, Sequence[str]], ours: Mapping[str, Sequence[str]]) -> float:
        maps = [[decode_rle(rows[name], shape) for rows in (theirs, ours)] for name, shape in shapes.items()]
        shares = [agree.same_nuclei(a, b, SAME_IOU) for a, b in maps]
        return agree.mean_of(shares, [int(a.max(initial=0)) for a, _ in maps])

    return Row(
        f"{len(shapes)} images, {n_pixels / 1e6:.1f} megapixels, four views each, random walker, to result.csv",
        plain=lambda: _plain_csv(images, inputs.folder / "plain.csv"),
        ours=lambda: _our_csv(images, inputs.folder / "ours"),
        agree=same,
        wanted=3.0,
        same=0.98,
        floor=Floor(n_operations=4 * n_pixels * _operations_a_pixel()),
        cores=0,
        rounds=1,
        note=f"with the weights that ship, loaded anew; same is the share of nuclei that agree at IoU {SAME_IOU}; the "
        "floor is the network's operations in float32; these rules read no contour, so ours computes none",
    )


def _our_csv(images: Path, folder: Path) -> dict[str, list[str]]:
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        code = valid.main([str(DEFAULT_WEIGHTS), "--input", str(images), "--csv", "--output", str(folder), *settings])
    if code:
        raise RuntimeError(f"valid.py ended with {code}")
    return read_csv(folder / "result.csv")


def _plain_csv(images: Path, path: Path) -> dict[str, list[str]]:
    """Float32, contiguous, eager; one view and one image at a time, and every step on the whole image."""
    checkpoint = load_checkpoint(DEFAULT_WEIGHTS)
    network = load_model(checkpoint).to(memory_format=torch.contiguous_format)
    policy = load_config(folder=path.parent).inherit(checkpoint["config"], CHECKPOINT_KEYS).pre.policy
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("ImageId", "EncodedPixels"))
        for source in sorted(images.iterdir()):
            probs = _plain_probs(read_image(source, *policy), network)
            labels = plain.separate(probs, THRESHOLDS, POST.min_object_size, POST.policy)
            writer.writerows((source.stem, text) for text in plain.scan_masks(labels) or [""])
    return read_csv(path)


@torch.inference_mode()
def _plain_probs(image: NDArray[np.uint8], network: nn.Module) -> Probs:
    """The mean of the image, its two mirror images, and both mirrored."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((BORDER, BORDER + -height % 32), (BORDER, BORDER + -width % 32), (0, 0)), mode="reflect")
    seen: dict[str, list[NDArray[np.float32]]] = {}
    for axes in ((), (0,), (1,), (0, 1)):
        view = np.ascontiguousarray(np.flip(padded, axes).transpose(2, 0, 1)[None])
        for head, logits in network(torch.from_numpy(view)).items():
            seen.setdefault(head, []).append(np.flip(torch.sigmoid(logits[0, 0]).numpy(), axes))
    inside = np.s_[BORDER : BORDER + height, BORDER : BORDER + width]
    return {head: np.mean(maps, axis=0)[inside] for head, maps in seen.items()}


def _operations_a_pixel() -> float:
    from torch.utils.flop_counter import FlopCounterMode

    network = load_model(load_checkpoint(DEFAULT_WEIGHTS))
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.zeros(1, 3, 256, 256, dtype=torch.uint8))
    return counter.get_total_flops() / 256**2
