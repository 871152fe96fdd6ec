"""What a network costs, and the graph of its blocks: parameters, multiply-adds, seconds, memory, and who feeds whom."""

from __future__ import annotations

import math
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

#: Layers in a row that make a picture unreadable; an encoder of more is drawn as its maps.
MANY_LAYERS = 12

Loss = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Footprint:
    """What one network costs.

    Attributes
    ----------
    size, n_batch : int
        Side of the image (px) and images a batch: what the rest was measured with.
    parameters, trainable : int
        How many there are, and how many of them want a gradient.
    multiply_adds : int
        Of one image, forward.
    forward, step : float
        Seconds an image, in evaluation and in training (forward, loss, backward; no optimizer).
    memory : int
        Bytes that a training step on a batch adds at its peak to the weights and the batch; gradients included.
    """

    size: int
    n_batch: int
    parameters: int
    trainable: int
    multiply_adds: int
    forward: float
    step: float
    memory: int


#: Columns of `format_table`: heading, field of `Footprint`, unit, decimals.
COLUMNS = (
    ("parameters (M)", "parameters", 1e6, 2),
    ("trainable (M)", "trainable", 1e6, 2),
    ("multiply-adds (G, {size} px)", "multiply_adds", 1e9, 2),
    ("forward (ms)", "forward", 1e-3, 1),
    ("step (ms)", "step", 1e-3, 1),
    ("memory (MB, batch of {n_batch})", "memory", 1e6, 0),
)


class Block(NamedTuple):
    """A box in the picture of a network: one call of one module.

    Attributes
    ----------
    name : str
        Where the module sits in the network, such as ``encoder.stages.0``; called twice, it gives two blocks.
    kind : str
        Its class; of a `Sequential` what it mostly consists of, such as ``3 x BasicBlock``.
    shape : tuple of int
        Of its output without the batch: (C, H, W).
    stride : int
        Pixels of the image to a pixel of the output.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    stride: int


# Cost


def measure(
    build: Callable[[], nn.Module],
    size: int = 256,
    n_batch: int = 2,
    repeats: int = 3,
    step: Loss | None = None,
    device: torch.device | str = "cpu",
) -> Footprint:
    """Build a network and weigh it.

    Parameters
    ----------
    build : callable
        Makes the network: (B, 3, H, W) float in [0, 1] -> dict of logits.
    size, n_batch : int
        Side of the image (px) and images a batch. The images are noise.
    repeats : int
        Timed calls, after one to warm up. The fastest counts: nothing but disturbance makes a call slower.
    step : callable, optional
        ``step(network, image)`` gives the loss of a training step; by default the mean squares of all logits, summed.
    device : torch.device or str
        Where to measure.

    Notes
    -----
    Multiply-adds are those of convolutions, transposed convolutions and matrix products, wherever they are called
    from; elementwise work and torchvision's own operations, such as ``roi_align``, are not counted.
    What a detector does depends on what it finds, here with fresh weights in noise: seed `build` for the same numbers.

    Memory on CUDA is the peak of its allocator. Elsewhere it is the peak of the tensors alive, which is the same in
    every run and on every machine, and leaves out what a kernel borrows while it runs.
    """
    model = build().to(device).eval()
    image = torch.rand(n_batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    train = partial(_train, model, image, step or mean_squares)
    return Footprint(
        size=size,
        n_batch=n_batch,
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        multiply_adds=_multiply_adds(model, image[:1]),
        forward=_seconds(partial(_infer, model, image), repeats, image.device) / n_batch,
        step=_seconds(train, repeats, image.device) / n_batch,
        memory=_peak_memory(model, train, image.device),
    )


@torch.enable_grad()
def measure_reach(network: nn.Module, share: float, size: int = 512) -> int:
    """How far around a pixel a network looks.

    The gradient of its outputs in the middle of a noisy image, by how far away it is: what a network could see is far
    more than what counts.

    Parameters
    ----------
    network : module
        In evaluation mode; (B, 3, H, W) float images in [0, 1] to a dict of maps.
    share : float
        Of the gradient that is to lie within.
    size : int
        Side of the image (px); half of it is the most that can come out.

    Returns
    -------
    int
        Half the side (px) of the square, of all heads the largest; 1 for a network that looks at nothing else.
    """
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, size, size, generator=generator).to(device).requires_grad_()
    middle = slice(size // 2 - 8, size // 2 + 8, 5)  # several pixels: where they lie on the network's grid matters
    far = ((torch.arange(size, device=device) - size // 2).abs() - 8).clamp(min=0)
    distance = torch.maximum(far[:, None], far).flatten()
    reach = 1
    for maps in network(image).values():
        (gradient,) = torch.autograd.grad(maps[..., middle, middle].sum(), image, retain_graph=True)
        weight = gradient.abs().sum((0, 1)).flatten()
        within = torch.zeros(size, device=device).index_add(0, distance, weight).cumsum(0)
        reach = max(reach, int((within < share * within[-1]).sum()))
    return reach


def format_table(rows: Mapping[str, Footprint]) -> str:
    """A Markdown table, one network a line, the numbers flush right; MB are 10^6 bytes.

    Raises
    ------
    ValueError
        No rows, or rows measured with different sizes or batches.
    """
    conditions = {(row.size, row.n_batch) for row in rows.values()}
    if len(conditions) != 1:
        raise ValueError(f"rows of (size, n_batch) {sorted(conditions)}: a table needs one and the same")
    [(size, n_batch)] = conditions
    names = ["network", *rows]
    columns = [_align(names, "<") + ["-" * max(map(len, names))]]
    for title, field, unit, places in COLUMNS:
        numbers = [f"{getattr(row, field) / unit:.{places}f}" for row in rows.values()]
        column = _align([title.format(size=size, n_batch=n_batch), *numbers], ">")
        columns.append(column + ["-" * (len(column[0]) - 1) + ":"])
    head, *body, rule = zip(*columns, strict=True)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *body))


def _align(cells: Sequence[str], side: str) -> list[str]:
    width = max(map(len, cells))
    return [f"{cell:{side}{width}}" for cell in cells]


def mean_squares(model: nn.Module, image: Tensor) -> Tensor:
    """Of all logits, summed over the heads: a loss that asks for no targets."""
    return torch.stack([logits.square().mean() for logits in model(image).values()]).sum()


@torch.inference_mode()
def _infer(model: nn.Module, image: Tensor) -> None:
    model.eval()(image)


def _train(model: nn.Module, image: Tensor, loss: Loss) -> None:
    model.zero_grad(set_to_none=True)
    loss(model.train(), image).backward()


@torch.no_grad()
def _multiply_adds(model: nn.Module, image: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() // 2


def _seconds(call: Callable[[], None], repeats: int, device: torch.device) -> float:
    times = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        call()
        if device.type != "cpu":  # the call comes back while the device still works
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _peak_memory(model: nn.Module, train: Callable[[], None], device: torch.device) -> int:
    """Bytes that a step adds at its peak; `train` has run before, so that libraries hold their workspaces already."""
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        train()
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveTensors() as live:
        train()
    return live.peak


class _LiveTensors(TorchDispatchMode):
    """Adds up the storages that operations make, each until the last tensor or autograd node lets go of it."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}  # a view or in-place result has one of these
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in given | self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())
        return result

    def _drop(self, key: int, n_bytes: int) -> None:
        self.known.discard(key)
        self.now -= n_bytes


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


# Blocks


class _Call(NamedTuple):
    name: str
    kind: str
    shape: tuple[int, ...]
    node: Any  # of autograd, that made the output
    single: bool  # a layer without parts


def trace_blocks(model: nn.Module, size: int = 64) -> tuple[list[Block], list[tuple[int, int]]]:
    """The blocks that an image runs through, and which feeds which.

    A block is the topmost module that turns one tensor into one tensor: a stage of an encoder, a pooling. What handles
    several maps (an encoder, a decoder) is opened; an encoder that then falls into more than `MANY_LAYERS` single
    layers has a block a map. Activations, norms and dropout that stand alone are passed over, as is all that happens
    between blocks: padding, concatenation, addition.

    Parameters
    ----------
    model : nn.Module
        Takes (1, 3, H, W) float images in evaluation mode.
    size : int
        Side of the test image (px); a multiple of the coarsest stride.

    Returns
    -------
    blocks : list of Block
        In the order they ran, the image first.
    edges : list of (int, int)
        Positions in `blocks`, from and to; from is always the smaller.

    Notes
    -----
    Edges are read off autograd's graph: on its way back from a block a gradient meets the blocks that feed it. Where
    the network cuts the gradient there is no edge.
    """
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0), requires_grad=True).clone()
    blocks, edges = [Block("image", "image", (3, size, size), 1)], []
    owners = {image.grad_fn: 0}
    for call in _run(model, image):
        if call.node is None or call.node in owners:  # cut off, or it gave back what it was given
            continue
        edges += [(source, len(blocks)) for source in sorted(_walk(call.node, owners)[0])]
        owners[call.node] = len(blocks)
        blocks.append(Block(call.name, call.kind, call.shape, max(1, round(size / call.shape[-1]))))
    return blocks, edges


def _run(model: nn.Module, image: Tensor) -> list[_Call]:
    """The calls of blocks, in the order they ended."""
    calls: list[_Call] = []
    starts: list[int] = []  # of each module that is running, how many calls there were before it

    def enter(module: nn.Module, args: Any) -> None:
        starts.append(len(calls))

    def leave(name: str, module: nn.Module, args: Any, output: Any) -> None:
        start = starts.pop()
        if _is_block(module, args, output):
            single = not any(module.children())
            calls[start:] = [_Call(name, _kind(module), _plane(output), output.grad_fn, single)]  # and not its parts
        elif not isinstance(output, Tensor) and sum(call.single for call in calls[start:]) > MANY_LAYERS:
            calls[start:] = _maps(name, output, calls[start:])

    handles = []
    for name, module in model.named_modules():
        if module is not model:
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(partial(leave, name))]
    training = model.training
    try:
        with torch.enable_grad():
            model.eval()(image)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return calls


def _is_block(module: nn.Module, args: Sequence[Any], output: Any) -> bool:
    if len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
        return False
    if any(module.children()) and args[0].shape[-1] > 4 * output.shape[-1]:  # an encoder that gives its last map alone
        return False
    return args[0].shape != output.shape or _has_weights(module)


def _has_weights(module: nn.Module) -> bool:
    """Whether it mixes channels; the parameters of a norm, which only scale them, have one dimension."""
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _kind(module: nn.Module) -> str:
    kinds = [_kind(child) for child in module.children() if _has_weights(child)]
    return _most_common(kinds) if type(module) is nn.Sequential and kinds else type(module).__name__


def _most_common(kinds: Sequence[str]) -> str:
    [(kind, count)] = Counter(kinds).most_common(1)
    return f"{count} x {kind}" if count > 1 else kind


def _plane(output: Tensor) -> tuple[int, ...]:
    """(C, H, W) of the output of a square image, whose channels may also come last, as those of transformers do."""
    shape = tuple(output.shape[1:])
    if len(shape) == 2:  # tokens
        shape = (math.isqrt(shape[0]), math.isqrt(shape[0]), shape[1])
    channels_last = len(shape) == 3 and shape[0] == shape[1] != shape[2]
    return (shape[2], *shape[:2]) if channels_last else (*shape, 1, 1)[:3]


def _maps(name: str, output: Any, layers: Sequence[_Call]) -> list[_Call]:
    """One call a map in place of the layers; its kind is that of most layers since the maps before it."""
    calls: list[_Call] = []
    for i, tensor in enumerate(tree_leaves(output)):
        passed = _walk(tensor.grad_fn, {call.node: 0 for call in calls})[1]
        kinds = [layer.kind for layer in layers if layer.node in passed]
        calls.append(_Call(f"{name}.{i}", _most_common(kinds or ["map"]), _plane(tensor), tensor.grad_fn, False))
    return calls


def _walk(node: Any, owners: Mapping[Any, int]) -> tuple[set[int], set[Any]]:
    """The owners that are met first on all ways back from an autograd node, and all nodes before them."""
    found, passed, waiting = set(), {node}, [node]
    while waiting:
        for before, _ in waiting.pop().next_functions:
            if before in owners:
                found.add(owners[before])
            elif before is not None and before not in passed:
                passed.add(before)
                waiting.append(before)
    return found, passed
