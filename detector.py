"""A network that finds nuclei one by one: a box, a score and a mask each, painted into a label map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from network import Network

#: Maps finer than this are left out: they cost most and see least.
FINEST_STRIDE = 4
#: Side (px) of the anchors of the finest map; those of each further map are twice as large.
ANCHOR = 12
RATIOS = (0.5, 1.0, 2.0)
GROUPS = 8
N_CLASSES = 2  # background and nucleus

#: torchvision's name of a loss -> ours.
LOSSES = {
    "loss_classifier": "instance/classifier",
    "loss_box_reg": "instance/box",
    "loss_mask": "instance/mask",
    "loss_objectness": "instance/objectness",
    "loss_rpn_box_reg": "instance/rpn_box",
}

#: What is found in one image, or is to be: boxes (N, 4), labels (N,), masks, and when found scores (N,).
Detections = dict[str, Tensor]
FloatMap = NDArray[np.float32]


class MaskRCNN(Network):
    """Mask R-CNN (He et al. 2017, doi:10.1109/ICCV.2017.322) for many small nuclei.

    torchvision's parts on a feature pyramid (Lin et al. 2017, doi:10.1109/CVPR.2017.106). Unlike torchvision's network
    it never resizes the image, starts from anchors of a few pixels, and has narrow heads: two classes ask for little.

    Parameters
    ----------
    encoder : module
        With `channels` and `strides` (powers of two), finest first; its `forward` returns the list of maps.
    mean, std : three floats
        Normalisation of RGB in [0, 1].
    channels : int
        Of each map of the pyramid, a multiple of 16; the layers that draw a mask have half as many.
    width : int
        Of the two hidden layers that judge a box.
    samples : int
        Boxes an image that the heads learn from in a training step, up to half of them on nuclei.
    detections : int
        The most nuclei found in an image.

    Raises
    ------
    ValueError
        The encoder has no map of stride `FINEST_STRIDE` or coarser.
    """

    encoder: nn.Module

    def __init__(
        self,
        encoder: nn.Module,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        channels: int = 128,
        width: int = 256,
        samples: int = 128,
        detections: int = 600,
    ) -> None:
        strides: tuple[int, ...] = tuple(encoder.strides)  # type: ignore[arg-type]
        widths: tuple[int, ...] = tuple(encoder.channels)  # type: ignore[arg-type]
        super().__init__(("instance",), max(strides), mean, std)
        self.encoder = encoder
        self.levels = [i for i, stride in enumerate(strides) if stride >= FINEST_STRIDE]
        if not self.levels:
            raise ValueError(f"encoder of strides {strides}: Mask R-CNN wants a map of stride {FINEST_STRIDE} or more")
        # Normed, since the heads have no norms of their own and the maps of encoders differ in scale a hundredfold.
        norm = partial(nn.GroupNorm, GROUPS)
        self.pyramid = FeaturePyramidNetwork([widths[i] for i in self.levels], channels, norm_layer=norm)
        self.rpn = _proposal_network(channels, len(self.levels), samples, detections)
        self.roi_heads = _roi_heads(channels, len(self.levels), width, samples, detections)

    def losses(self, image: Tensor, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a training step minimises the sum of.

        Parameters
        ----------
        image : (B, 3, H, W) uint8, or float in [0, 1]
            RGB.
        targets : mapping
            "instance" -> (B, 1, H, W) label maps of any dtype; 0 is background, ids need not be sequential, and an
            image may be without nuclei.

        Returns
        -------
        dict
            Scalars, float32, named as in `LOSSES`; torch's generator draws which anchors and boxes are learned from.

        Raises
        ------
        RuntimeError
            The network is in evaluation mode.
        """
        if not self.training:
            raise RuntimeError("MaskRCNN.losses needs training mode; call model.train() first")
        # What the padding repeats, nuclei too, is padded alike, so that what is seen and what is told agree.
        truth = [_make_target(labels) for labels in self.pad(targets["instance"].float())[:, 0]]
        _, losses = self._run(image, truth)
        return {name: losses[theirs] for theirs, name in LOSSES.items()}

    @torch.no_grad()
    def instances(self, image: Tensor, score: float = 0.5, threshold: float = 0.5) -> tuple[Tensor, Tensor]:
        """Label map of one image, in evaluation mode.

        Parameters
        ----------
        image : (3, H, W) uint8, or float in [0, 1]
            RGB, any size from one pixel.
        score : float
            Detections of a lower score are not painted.
        threshold : float
            Mask probability above which a pixel belongs to a nucleus; where several claim it, to the best of them.

        Returns
        -------
        labels : (H, W) int32
            0 is background, nuclei are 1..N from the highest score down. A nucleus of which better ones hold more than
            half is left out.
        foreground : (H, W) float32 in [0, 1]
            The greatest product of score and mask probability of all detections, weak ones too.
        """
        (found,) = self._detect(image[None])
        labels, foreground = _paint(found, image.shape[-2:], score, threshold)
        return torch.from_numpy(labels).to(image.device), torch.from_numpy(foreground).to(image.device)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) images -> "instance": (B, 1, H, W) float32 logits of the foreground, in evaluation mode.

        No gradient flows through them; `losses` is what trains.
        """
        maps = [torch.from_numpy(_paint(found, image.shape[-2:])[1]) for found in self._detect(image)]
        return {"instance": torch.logit(torch.stack(maps)[:, None].to(image.device), eps=1e-6)}

    def _detect(self, image: Tensor) -> list[Detections]:
        """Of each image, boxes (N, 4), scores (N,) and masks (N, 1, M, M), the best first."""
        if self.training:
            raise RuntimeError("MaskRCNN predicts in evaluation mode (model.eval()); train it through MaskRCNN.losses")
        return self._run(image)[0]

    def _run(self, image: Tensor, truth: list[Detections] | None = None) -> tuple[list[Detections], dict[str, Tensor]]:
        """Detections in evaluation mode, losses in training mode."""
        x = self.pad(self.normalize(image))
        maps = self.encoder(x)
        features = self.pyramid({str(level): maps[i] for level, i in enumerate(self.levels)})
        # Anchors take the dtype of the maps, and at 1000 px bfloat16 has steps of 4: as wide as a small nucleus.
        with torch.autocast(x.device.type, enabled=False):
            features = {level: feature.float() for level, feature in features.items()}
            # The padded size: torchvision tells a map's stride from the ratio of the sizes.
            sizes = [(x.shape[-2], x.shape[-1])] * len(x)
            proposals, rpn_losses = self.rpn(ImageList(x, sizes), features, truth)
            found, roi_losses = self.roi_heads(features, proposals, sizes, truth)
        return found, {**rpn_losses, **roi_losses}


def _proposal_network(channels: int, n_levels: int, samples: int, detections: int) -> RegionProposalNetwork:
    anchors = AnchorGenerator(tuple((ANCHOR * 2**level,) for level in range(n_levels)), (RATIOS,) * n_levels)
    return RegionProposalNetwork(
        anchors,
        RPNHead(channels, len(RATIOS)),
        # One size an octave: a square nucleus between two sizes meets neither anchor with an IoU above 0.5.
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.3,
        batch_size_per_image=2 * samples,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 1000, "testing": 3 * detections},
        post_nms_top_n={"training": 1000, "testing": 2 * detections},
        nms_thresh=0.7,
    )


def _roi_heads(channels: int, n_levels: int, width: int, samples: int, detections: int) -> RoIHeads:
    levels = [str(level) for level in range(n_levels)]
    side, depth = 7, channels // 2
    mask_predictor = MaskRCNNPredictor(depth, depth, N_CLASSES)
    # torchvision's start is sized for eighty classes: with two, mask losses of about five would drown the others.
    nn.init.normal_(mask_predictor.mask_fcn_logits.weight, std=0.05)
    return RoIHeads(
        box_roi_pool=MultiScaleRoIAlign(levels, side, sampling_ratio=2),
        box_head=TwoMLPHead(channels * side**2, width),
        box_predictor=FastRCNNPredictor(width, N_CLASSES),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=samples,
        positive_fraction=0.5,
        bbox_reg_weights=None,
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=detections,
        mask_roi_pool=MultiScaleRoIAlign(levels, 2 * side, sampling_ratio=2),
        mask_head=MaskRCNNHeads(channels, (depth,) * 3, dilation=1),
        mask_predictor=mask_predictor,
    )


def _make_target(labels: Tensor) -> Detections:
    """Boxes, classes and masks of a label map (H, W), in order of increasing id, as torchvision wants them.

    Boxes are (N, 4) float32, (x1, y1, x2, y2) with the far sides exclusive, so that one pixel has an area of 1; labels
    are (N,) int64, all 1; masks are (N, H, W) bool.
    """
    ids = labels.unique()
    ids = ids[ids > 0]
    masks = labels == ids[:, None, None]
    (x1, x2), (y1, y2) = _span(masks.any(dim=1)), _span(masks.any(dim=2))
    boxes = torch.stack([x1, y1, x2, y2], dim=1).float()
    return {"boxes": boxes, "labels": torch.ones_like(ids, dtype=torch.int64), "masks": masks}


def _span(hit: Tensor) -> tuple[Tensor, Tensor]:
    """First True of each row of (N, L) bool, and one behind the last."""
    steps = hit.byte()  # argmax gives the first of equals
    return steps.argmax(dim=1), hit.shape[1] - steps.flip(1).argmax(dim=1)


def _paint(
    found: Detections, shape: Sequence[int], score: float = 0.5, threshold: float = 0.5
) -> tuple[NDArray[np.int32], FloatMap]:
    """Label map and foreground probability, see `MaskRCNN.instances`; box by box, so that many need no more memory."""
    labels, foreground = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    boxes, scores, masks = (found[name].detach().cpu().numpy() for name in ("boxes", "scores", "masks"))
    n_nuclei = 0
    for i in np.argsort(-scores, kind="stable"):
        window, probs = _paste(masks[i, 0], boxes[i], shape)
        np.maximum(foreground[window], scores[i] * probs, out=foreground[window])
        claimed = probs > threshold
        free = claimed & (labels[window] == 0)
        if scores[i] >= score and free.any() and 2 * free.sum() >= claimed.sum():
            n_nuclei += 1
            labels[window][free] = n_nuclei
    return labels, foreground


def _paste(mask: FloatMap, box: FloatMap, shape: Sequence[int]) -> tuple[tuple[slice, slice], FloatMap]:
    """Rows and columns that a mask (M, M) takes up in an image of `shape`, and its probability at their centres.

    The box is not rounded: half a pixel matters to a nucleus of five.
    """
    start, stop = box[1::-1].astype(float), box[:1:-1].astype(float)  # (y, x)
    first = np.minimum(start, shape).astype(int)
    height, width = size = np.minimum(np.ceil(stop), shape).astype(int) - first
    window = slice(first[0], first[0] + height), slice(first[1], first[1] + width)
    if not size.all():  # in the padding
        return window, np.zeros(size, np.float32)
    zoom_y, zoom_x = zoom = mask.shape[0] / (stop - start)
    y, x = (first + 0.5 - start) * zoom - 0.5
    to_mask = np.array([[zoom_x, 0, x], [0, zoom_y, y]])
    return window, cv2.warpAffine(mask, to_mask, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
