"""What a run needs beside its subject: device, precision, meters, checkpoints, and a script that fails in one line."""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import itertools
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import cv2
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

import parallel
from columns import one_line
from config import Config, add_arguments, load_config
from files import replacing

logger = logging.getLogger(__name__)

CHECKPOINT_FORMAT = 1
#: What `find_checkpoint` falls back to: the weights the toolkit ships.
DEFAULT_WEIGHTS = Path(__file__).parent / "weights" / "default.pkl"
#: M_MMAP_MAX: no block is mapped by itself; M_TRIM_THRESHOLD: nothing is given back; M_TOP_PAD: grow by 64 MB.
_MALLOC_OPTIONS = ((-4, 0), (-1, 2**31 - 1), (-2, 2**26))
_CHECKPOINT_KEYS = ("format", "model", "options", "weights", "epoch", "config")


# Scripts


def make_parser(doc: str) -> argparse.ArgumentParser:
    """A parser with the shared options, whose help is the docstring of the script."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    return parser


def run_script(
    main: Callable[[Config, argparse.Namespace], int],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    many: bool = False,
) -> int:
    """Parse, read the settings, run, and turn what the user got wrong into one line.

    Parameters
    ----------
    many : bool
        The script knows to run as several processes that torchrun starts; others refuse.

    Returns
    -------
    int
        The exit code: what `main` returns, 2 for the user's error, 130 when interrupted.
    """
    args = parser.parse_args(argv)
    problem: Exception
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        if parallel.n_started() > 1 and not many:
            raise ValueError(f"runs as one process, torchrun started {parallel.n_started()}; start it with python")
        config = load_config(args.config, args.set)
        with parallel.joined():
            if not parallel.is_main():
                logging.getLogger().setLevel(logging.ERROR)  # warnings are the same in all
            return main(config, args)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    except (MemoryError, torch.OutOfMemoryError) as error:
        problem, cure = error, "; a smaller [train] n_batch or width needs less memory"
    except (ValueError, OSError) as error:
        problem, cure = error, ""
    if args.debug:
        raise problem
    print(f"{parser.prog}: error: {' '.join(str(problem).split())}{cure}", file=sys.stderr)
    return 2


# Device


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; `auto` is cuda, else mps, else cpu. Of many processes each takes a GPU of its own.

    Raises
    ------
    ValueError
        No such device here, or one that many processes cannot share.
    """
    many = parallel.world() > 1
    if name == "auto":
        mps = torch.backends.mps.is_available() and not many
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if many and name not in ("cuda", "cpu"):
        raise ValueError(f"[train] device = {name}: {parallel.world()} processes; wanted cuda, cpu or auto")
    try:
        device = torch.device(name, parallel.local_rank()) if many and name == "cuda" else torch.device(name)
        torch.empty(0, device=device)
        if many and name == "cuda":
            torch.cuda.set_device(device)  # NCCL and what asks for plain "cuda" take the current one
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"[train] device = {name}: {one_line(error)}") from None
    return device


def pick_precision(
    name: str, device: torch.device, networks: Sequence[nn.Module] = (), known: torch.dtype | None = None
) -> torch.dtype:
    """The type of autocast.

    `auto` is bfloat16 on a GPU that computes in it, float16 on other GPUs of CUDA, and on a CPU bfloat16 where a
    convolution is clearly faster in it (many CPUs have the instructions and gain nothing by them), else float32; and
    `networks`, which are to predict, in float32 if they have depthwise convolutions: bfloat16 is no faster then. Of
    many processes the main one chooses for all: two that measure may find two answers. `known` is what was found before
    without `networks`, on this device.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu" and any(_has_depthwise(network) for network in networks):
        return torch.float32
    return known or parallel.from_main(lambda: _fastest_precision(device))


def _fastest_precision(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and _gains_by_bfloat16() else torch.float32


def _has_depthwise(network: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in network.modules())


def _gains_by_bfloat16() -> bool:
    """In turn and by the least of several, so that other work on the machine does not decide."""
    turns = [[_convolution_time(precision) for precision in (torch.bfloat16, torch.float32)] for _ in range(3)]
    half, full = (min(times) for times in zip(*turns, strict=True))
    return 1.2 * half < full


def _convolution_time(precision: torch.dtype) -> float:
    """Seconds that a typical convolution takes on the CPU, forward and backward; the least of a few."""
    layer = nn.Conv2d(32, 32, 3, padding=1, dtype=precision).to(memory_format=torch.channels_last)
    image = torch.zeros(4, 32, 96, 96, dtype=precision).contiguous(memory_format=torch.channels_last).requires_grad_()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        layer(image).sum().backward()
        times.append(time.perf_counter() - began)
    return min(times)


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Mixed precision; does nothing for float32."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def grouped_gradients(device: torch.device, precision: torch.dtype) -> AbstractContextManager:
    """Under autocast on a CPU, gradients of grouped convolutions (depthwise ones among them) in float32.

    In bfloat16 those of depthwise ones are several times slower where the stride is 2 or the kernel 5 wide
    (docs/performance.md); the rest of a step is faster.
    """
    needed = device.type == "cpu" and precision != torch.float32
    return _GroupedGradients() if needed else nullcontext()


class _GroupedGradients(TorchFunctionMode):
    """While it is entered, grouped convolutions go through `_GroupedConvolution`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (_conv2d if func is F.conv2d else func)(*args, **(kwargs or {}))


def _conv2d(input: Tensor, weight: Tensor, bias=None, stride=1, padding=0, dilation=1, groups: int = 1) -> Tensor:
    """`torch.nn.functional.conv2d`; a module hands over tuples, or the name of a padding, which is left alone."""
    if groups == 1 or not isinstance(padding, tuple) or not torch.is_autocast_enabled("cpu"):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    dtype = torch.get_autocast_dtype("cpu")
    tensors = (None if t is None else t.to(dtype) for t in (input, weight, bias))
    return _GroupedConvolution.apply(*tensors, stride, padding, dilation, groups)


class _GroupedConvolution(torch.autograd.Function):
    """A grouped convolution whose gradients are computed in float32."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.geometry, ctx.bias_sizes = geometry, None if bias is None else [len(bias)]
        return F.conv2d(input, weight, bias, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        found = torch.ops.aten.convolution_backward(
            *(t.float() for t in (gradient, input, weight)),
            ctx.bias_sizes,
            stride,
            padding,
            dilation,
            False,
            (0, 0),
            groups,
            ctx.needs_input_grad[:3],
        )
        return *(None if t is None else t.to(input.dtype) for t in found), None, None, None, None


def prepare_process() -> None:
    """Settings of the process that make a run faster and change no result.

    OpenCV gets one thread a call, since the loader's threads already fill the cores. The C library keeps freed
    memory: giving the large tensors of a training step back to the system, and faulting them in again, cost 40
    percent of a step on a CPU.
    """
    cv2.setNumThreads(1)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            for option, value in _MALLOC_OPTIONS:
                libc.mallopt(option, value)


# Meters


class Meter:
    """The last value and the mean of all since `reset`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.value, self.total, self.count = 0.0, 0.0, 0

    def update(self, value: float, n: int = 1) -> None:
        self.value = value
        self.total += value * n
        self.count += n

    @property
    def mean(self) -> float:
        return self.total / max(self.count, 1)


# Checkpoints


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint; a crash at any moment leaves the old file or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*.part"):  # of a run that was killed while it wrote
        left.unlink()
    with replacing(path, sync=True) as stage, open(stage, "wb") as file:
        torch.save({"format": CHECKPOINT_FORMAT, **state}, file)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU; it can hold tensors and plain types only.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        Not a checkpoint of this toolkit, or of a later format.
    """
    path = Path(path)
    if not path.is_file():
        # as `set_aside` leaves it, where `--init checkpoint/latest.pkl` is said once more after a run that was cut off
        moved = sorted(path.parent.glob(f"previous*/{path.name}"), key=lambda file: file.stat().st_mtime)
        raise FileNotFoundError(f"{path}: no such checkpoint" + (f"; an earlier one is {moved[-1]}" if moved else ""))
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch, pickle and zip errors alike, none of which tells a user more
        raise ValueError(f"{path}: not a readable checkpoint; is the file whole?") from None
    missing = [key for key in _CHECKPOINT_KEYS if key not in state] if isinstance(state, dict) else ["everything"]
    if missing:
        raise ValueError(f"{path}: not a checkpoint of this toolkit (without {', '.join(missing)})")
    if state["format"] > CHECKPOINT_FORMAT:
        raise ValueError(
            f"{path}: format {state['format']}, this version reads up to {CHECKPOINT_FORMAT}; update the toolkit"
        )
    return state


def fingerprint(checkpoints: Sequence[Mapping[str, Any]]) -> str:
    """What the weights of one or several checkpoints, in this order, are known by: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for checkpoint in checkpoints:
        for name, tensor in sorted((checkpoint.get("average") or checkpoint["weights"]).items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def slim(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint with what prediction needs alone, its weights (the averaged ones) in half precision.

    Norms and biases stay as they are: a running variance may be beyond the range of half precision. Which images it was
    trained on, and where they lay, is left out.
    """
    weights = checkpoint.get("average") or checkpoint["weights"]
    small = {name: value.half() if value.numel() > 2**12 else value for name, value in weights.items()}
    kept = {key: checkpoint[key] for key in ("model", "options", "epoch", "scores", "config") if key in checkpoint}
    kept["config"] = {name: values for name, values in checkpoint["config"].items() if name != "dataset"}
    found = checkpoint.get("tuned", {}).get(fingerprint([checkpoint]))
    new = {"format": CHECKPOINT_FORMAT, **kept, "weights": small}
    return new | ({"tuned": {fingerprint([new]): found}} if found else {})


def write_current(folder: Path, name: str, epoch: int) -> None:
    """Note in ``current.json`` where training stands, and which launch of torchrun wrote it, if any."""
    note = {"checkpoint": name, "epoch": epoch} | ({"launch": parallel.launch()} if parallel.launch() else {})
    with replacing(folder / "current.json", sync=True) as stage:
        stage.write_text(json.dumps(note))


def is_restarted(folder: Path) -> bool:
    """Whether the training of `folder` was begun by this launch of torchrun, which has started its processes again."""
    note = folder / "current.json"
    if not parallel.launch() or not note.is_file():
        return False
    try:
        return json.loads(note.read_text()).get("launch") == parallel.launch()
    except (json.JSONDecodeError, AttributeError):
        return False


def read_current(folder: Path) -> Path | None:
    """The checkpoint that ``current.json`` points to, None where training has not begun.

    Raises
    ------
    ValueError
        The file is broken.
    """
    note = folder / "current.json"
    if not note.is_file():
        return None
    try:
        return folder / json.loads(note.read_text())["checkpoint"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{note}: broken; delete it, or start anew with --no-resume") from None


def find_checkpoint(folder: Path) -> Path:
    """``best.pkl``, else the newest of the folder, else the weights that ship.

    Raises
    ------
    FileNotFoundError
        There is none.
    """
    if (folder / "best.pkl").is_file():
        return folder / "best.pkl"
    found = sorted(folder.glob("*.pkl"), key=lambda path: path.stat().st_mtime)
    if found:
        return found[-1]
    if DEFAULT_WEIGHTS.is_file():
        return DEFAULT_WEIGHTS
    raise FileNotFoundError(f"{folder}: no checkpoint; train one with train.py, or name one")


def set_aside(folder: Path) -> Path | None:
    """Move an earlier run's checkpoints and log to ``previous``, or ``previous-2``, ...; nothing is ever deleted.

    Returns
    -------
    path or None
        Where they are now; None where there was no checkpoint.
    """
    checkpoints = sorted(folder.glob("*.pkl"))
    if not checkpoints:
        return None
    names = (f"previous-{i}" if i > 1 else "previous" for i in itertools.count(1))
    previous = next(folder / name for name in names if not (folder / name).exists())
    previous.mkdir()
    # The note goes first: without it a run that is cut off here starts anew instead of looking for what has moved.
    for file in [*folder.glob("current.json"), *checkpoints, *folder.glob("log")]:
        file.rename(previous / file.name)
    return previous
