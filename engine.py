"""Networks compiled for a CPU by OpenVINO (https://docs.openvino.ai): the same answers, in two thirds of the time.

A compiled network has norms and activations folded into the convolutions before them, and the views of an image are
run side by side, each by a part of the threads. What it answers is compared with the network itself first: not every
operation is understood.
"""

from __future__ import annotations

import logging
import warnings
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from columns import one_line
from network import Network

logger = logging.getLogger(__name__)

#: Images from which on compiling (about three seconds) is worth it.
LEAST_IMAGES = 4
#: Most requests side by side, and most views of each: every one holds maps of its own.
MOST_STREAMS, MOST_VIEWS = 4, 2
#: Precision -> OpenVINO's name, and how far a probability may be from the network's own.
PRECISIONS = {torch.float32: ("f32", 1e-3), torch.bfloat16: ("bf16", 0.1)}


def is_installed() -> bool:
    """Whether OpenVINO is there."""
    return find_spec("openvino") is not None


class CompiledNetwork:
    """A network that is called as the one it was made of: (B, 3, H, W) uint8 to a dict of float32 logits.

    Parameters
    ----------
    network : Network
        In evaluation mode, on the CPU; of its heads the active ones answer.
    precision : torch.dtype
        Row of `PRECISIONS`.

    Attributes
    ----------
    active, stride
        Those of the network.
    """

    def __init__(self, network: Network, precision: torch.dtype = torch.float32) -> None:
        self.active, self.stride = network.active, network.stride
        self._n_threads = torch.get_num_threads()
        self._hint = PRECISIONS[precision][0]
        self._graph = _read_graph(network)
        self._requests = cache(self._compile)

    def _compile(self, n_streams: int) -> list[Any]:
        import openvino

        settings = {
            "INFERENCE_PRECISION_HINT": self._hint,
            "INFERENCE_NUM_THREADS": self._n_threads,
            "NUM_STREAMS": n_streams,
            "ENABLE_CPU_PINNING": False,  # other processes may work here, and threads that separate nuclei do
        }
        compiled = openvino.Core().compile_model(self._graph, "CPU", settings)
        return [compiled.create_infer_request() for _ in range(n_streams)]

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of each active head, (B, C, H, W) float32.

        Parameters
        ----------
        images : (B, 3, H, W) uint8
            RGB, any size from one pixel.
        """
        height, width = images.shape[-2:]
        gap = ((0, 0), (0, 0), (0, -height % self.stride), (0, -width % self.stride))
        padded = np.pad(images.numpy(), gap, mode="edge")
        # One view alone has all threads; several have a part of them each, which is faster than all for one at a time.
        requests = self._requests(1 if len(images) == 1 else min(self._n_threads, MOST_STREAMS))
        each = min(-(-len(padded) // len(requests)), MOST_VIEWS)
        parts = [padded[start : start + each] for start in range(0, len(padded), each)]
        found: list[list[NDArray[np.float32]]] = []
        for start in range(0, len(parts), len(requests)):
            busy = list(zip(requests, parts[start : start + len(requests)], strict=False))
            for request, views in busy:
                request.start_async([views])
            for request, _ in busy:
                request.wait()
                found.append([output.data[..., :height, :width].copy() for output in request.output_tensors])
        maps = (torch.from_numpy(np.concatenate(of_head)) for of_head in zip(*found, strict=True))
        return dict(zip(self.active, maps, strict=True))


def compile_network(network: Network, precision: torch.dtype = torch.float32) -> CompiledNetwork | None:
    """The network, compiled; None, and a line in the log, where it cannot be, or would answer differently."""
    if precision not in PRECISIONS:
        logger.info("not compiled: OpenVINO does not compute in %s", precision)
        return None
    try:
        compiled = CompiledNetwork(network, precision)
        error = _difference(compiled, network)
    except (ImportError, RuntimeError) as reason:
        logger.info("not compiled: %s", one_line(reason))
        return None
    if not error <= PRECISIONS[precision][1]:
        logger.info("not compiled: OpenVINO's answers differ by %.2g", error)
        return None
    return compiled


class _Answers(nn.Module):
    """A network whose logits are a tuple, as a graph has them."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        logits = self.network(image)
        return tuple(logits[head] for head in self.network.active)


def _read_graph(network: Network) -> Any:
    """The network as OpenVINO's graph, for images of any number and size."""
    # Not openvino.convert_model, which does the same and reports its use to a server.
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    example = torch.zeros(1, 3, 2 * network.stride, 2 * network.stride, dtype=torch.uint8)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # of what a trace takes for constant, and that torch.export will replace it
        traced = torch.jit.trace(_Answers(network).eval(), example, check_trace=False)
    decoder = TorchScriptPythonDecoder(traced)  # by this name kept alive until it is read
    frontend = FrontEndManager().load_by_framework("pytorch")
    graph = frontend.convert(frontend.load(decoder))
    graph.reshape([-1, 3, -1, -1])
    return graph


@torch.inference_mode()
def _difference(compiled: CompiledNetwork, network: Network) -> float:
    """The greatest difference of their probabilities, on two views of noise, of another size than was traced."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 3 * network.stride + 1, 4 * network.stride)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    ours, theirs = compiled(images), network(images)
    return max(float((ours[h].sigmoid() - theirs[h].float().sigmoid()).abs().max()) for h in network.active)
