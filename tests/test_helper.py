"""The helper room: checkpoints survive crashes and refuse strangers; scripts fail in one line."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import helper
from helper import (
    CHECKPOINT_FORMAT,
    Meter,
    autocast,
    find_checkpoint,
    grouped_gradients,
    load_checkpoint,
    make_parser,
    pick_device,
    pick_precision,
    read_current,
    run_script,
    save_checkpoint,
    set_aside,
    write_current,
)

CPU = torch.device("cpu")


def state(**more) -> dict:
    weights = {"a": torch.arange(6.0).view(2, 3), "n": torch.tensor(7)}
    return {"model": "unet", "options": {"mean": [0.5, 0.5, 0.5]}, "weights": weights, "epoch": 3, "config": {}, **more}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Checkpoints


def test_checkpoint_round_trip(tmp_path):
    path = tmp_path / "new" / "folder" / "1.pkl"
    save_checkpoint(path, state(best=-float("inf"), span={"start": 0, "minutes": 1.5}))
    found = load_checkpoint(str(path))
    assert found["format"] == CHECKPOINT_FORMAT
    assert found["span"] == {"start": 0, "minutes": 1.5}
    assert found["best"] == -float("inf")
    assert torch.equal(found["weights"]["a"], torch.arange(6.0).view(2, 3))
    assert found["weights"]["n"].dtype == torch.int64
    assert names(path.parent) == ["1.pkl"]


def half_written(state, file):
    file.write(b"half a checkpoint")
    raise KeyboardInterrupt


@pytest.mark.parametrize("there", [True, False])
def test_a_crash_while_saving_leaves_the_old_file(tmp_path, monkeypatch, there):
    path = tmp_path / "latest.pkl"
    if there:
        save_checkpoint(path, state())
    before = names(tmp_path)
    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, state(epoch=4))
    assert names(tmp_path) == before
    assert not there or load_checkpoint(path)["epoch"] == 3


def test_what_cannot_be_saved_leaves_the_old_file(tmp_path):
    save_checkpoint(tmp_path / "latest.pkl", state())
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(tmp_path / "latest.pkl", state(epoch=4, callback=lambda: None))
    assert names(tmp_path) == ["latest.pkl"]
    assert load_checkpoint(tmp_path / "latest.pkl")["epoch"] == 3


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_others_may_read_what_is_saved(tmp_path):
    """A container trains as root; its user reads the weights."""
    (tmp_path / "plain").touch()
    save_checkpoint(tmp_path / "1.pkl", state())
    write_current(tmp_path, "1.pkl", 1)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


class Stranger:
    pass


def test_only_tensors_and_plain_types_are_loaded(tmp_path):
    torch.save({"format": 1, **state(evil=Stranger())}, tmp_path / "1.pkl")
    with pytest.raises(ValueError, match="1.pkl: not a readable checkpoint"):
        load_checkpoint(tmp_path / "1.pkl")


@pytest.mark.parametrize("n_bytes", [0, 10, 700])
def test_a_truncated_checkpoint_is_refused(tmp_path, n_bytes):
    save_checkpoint(tmp_path / "1.pkl", state())
    whole = (tmp_path / "1.pkl").read_bytes()
    assert len(whole) > 700
    (tmp_path / "1.pkl").write_bytes(whole[:n_bytes])
    with pytest.raises(ValueError, match="1.pkl: not a readable checkpoint"):
        load_checkpoint(tmp_path / "1.pkl")


@pytest.mark.parametrize("foreign", [{"state_dict": {}}, [1, 2], torch.zeros(3)])
def test_a_foreign_checkpoint_is_refused(tmp_path, foreign):
    torch.save(foreign, tmp_path / "1.pkl")
    with pytest.raises(ValueError, match="1.pkl: not a checkpoint of this toolkit"):
        load_checkpoint(tmp_path / "1.pkl")


def test_a_checkpoint_without_a_part_names_it(tmp_path):
    part = state()
    del part["options"]
    save_checkpoint(tmp_path / "1.pkl", part)
    with pytest.raises(ValueError, match=r"without options\)"):
        load_checkpoint(tmp_path / "1.pkl")


def test_a_later_format_is_refused(tmp_path):
    torch.save(state(format=CHECKPOINT_FORMAT + 1), tmp_path / "1.pkl")
    with pytest.raises(ValueError, match=f"format {CHECKPOINT_FORMAT + 1}, this version reads up to"):
        load_checkpoint(tmp_path / "1.pkl")


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pkl: no such checkpoint"):
        load_checkpoint(tmp_path / "none.pkl")


def test_find_checkpoint_takes_best_then_newest_then_what_ships(tmp_path, monkeypatch):
    folder, shipped = tmp_path / "checkpoint", tmp_path / "default.pkl"
    folder.mkdir()
    monkeypatch.setattr(helper, "DEFAULT_WEIGHTS", shipped)
    with pytest.raises(FileNotFoundError, match="no checkpoint; train one"):
        find_checkpoint(folder)
    shipped.touch()
    assert find_checkpoint(folder) == shipped
    for name, age in (("9.pkl", 300), ("latest.pkl", 100), ("best.pkl", 200)):
        (folder / name).touch()
        os.utime(folder / name, (1e9 - age, 1e9 - age))
    assert find_checkpoint(folder) == folder / "best.pkl"
    (folder / "best.pkl").unlink()
    assert find_checkpoint(folder) == folder / "latest.pkl"


def test_current_points_to_a_checkpoint(tmp_path):
    assert read_current(tmp_path) is None
    write_current(tmp_path, "latest.pkl", 5)
    assert read_current(tmp_path) == tmp_path / "latest.pkl"
    assert json.loads((tmp_path / "current.json").read_text()) == {"checkpoint": "latest.pkl", "epoch": 5}
    assert names(tmp_path) == ["current.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"epoch": 3}', "3"])
def test_a_broken_note_is_named(tmp_path, text):
    (tmp_path / "current.json").write_text(text)
    with pytest.raises(ValueError, match="current.json: broken"):
        read_current(tmp_path)


def test_an_earlier_run_is_set_aside(tmp_path):
    assert set_aside(tmp_path) is None
    for run, place in (("first", "previous"), ("second", "previous-2")):
        for name in ("latest.pkl", "best.pkl", "current.json"):
            (tmp_path / name).write_text(run)
        (tmp_path / "log").mkdir()
        (tmp_path / "log" / run).touch()
        (tmp_path / "notes.txt").touch()
        assert set_aside(tmp_path) == tmp_path / place
        assert names(tmp_path / place) == ["best.pkl", "current.json", "latest.pkl", "log"]
        assert (tmp_path / place / "latest.pkl").read_text() == run
        assert names(tmp_path / place / "log") == [run]
    assert names(tmp_path) == ["notes.txt", "previous", "previous-2"]
    with pytest.raises(FileNotFoundError, match="an earlier one is .*previous-2.latest.pkl"):
        load_checkpoint(tmp_path / "latest.pkl")
    (tmp_path / "log").mkdir()
    assert set_aside(tmp_path) is None and (tmp_path / "log").is_dir()  # without a checkpoint nothing is at stake


# Scripts


def script(monkeypatch, tmp_path, main, *argv) -> int:
    monkeypatch.chdir(tmp_path)
    parser = make_parser("What it does.\n\n    python tool.py --set train.n_epoch=2")
    parser.prog = "tool.py"
    return run_script(main, parser, argv)


@pytest.mark.parametrize("code", [0, 3])
def test_script_returns_what_main_does(monkeypatch, tmp_path, code):
    def main(config, args: argparse.Namespace) -> int:
        assert config.train.n_epoch == 7
        assert (args.data, args.checkpoint_dir) == (Path("data"), Path("elsewhere"))
        return code

    options = ("--set", "train.n_epoch=7", "--checkpoint-dir", "elsewhere")
    assert script(monkeypatch, tmp_path, main, *options) == code


@pytest.mark.parametrize("error", [ValueError("bad\n  value"), FileNotFoundError("bad value"), OSError("bad value")])
def test_the_users_error_is_one_line(monkeypatch, tmp_path, capsys, error):
    def main(config, args):
        raise error

    assert script(monkeypatch, tmp_path, main) == 2
    assert capsys.readouterr() == ("", "tool.py: error: bad value\n")
    with pytest.raises(type(error)):
        script(monkeypatch, tmp_path, main, "--debug")


def test_a_bad_setting_is_one_line(monkeypatch, tmp_path, capsys):
    assert script(monkeypatch, tmp_path, lambda config, args: 0, "--set", "train.n_epok=3") == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "n_epoch" in err


def test_an_error_of_the_program_shows_its_traceback(monkeypatch, tmp_path):
    with pytest.raises(KeyError):
        script(monkeypatch, tmp_path, lambda config, args: {}["x"])


def test_an_interrupted_script_says_so(monkeypatch, tmp_path, capsys):
    def main(config, args):
        raise KeyboardInterrupt

    assert script(monkeypatch, tmp_path, main) == 130
    assert capsys.readouterr() == ("", "tool.py: interrupted\n")


def test_help_shows_the_docstring(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        script(monkeypatch, tmp_path, None, "--help")
    assert stop.value.code == 0
    assert "    python tool.py --set train.n_epoch=2" in capsys.readouterr().out


# Device


def test_cpu_is_always_there():
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("name", ["gpu0", "cuda:99", ""])
def test_a_device_that_is_not_there_is_one_line(name):
    with pytest.raises(ValueError, match=rf"\[train\] device = {name}: ") as error:
        pick_device(name)
    assert "\n" not in str(error.value)


def test_precision(monkeypatch):
    assert pick_precision("float16", CPU) == torch.float16
    times = {torch.float32: 1.0, torch.bfloat16: 0.5}
    monkeypatch.setattr(helper, "_convolution_time", times.get)
    assert pick_precision("auto", CPU) == torch.bfloat16
    times[torch.bfloat16] = 0.9
    assert pick_precision("auto", CPU) == torch.float32
    assert pick_precision("auto", torch.device("mps")) == torch.float32


def test_depthwise_convolutions_are_predicted_in_float32_on_a_cpu(monkeypatch):
    times = {torch.bfloat16: 1.0, torch.float32: 2.0}
    monkeypatch.setattr(helper, "_convolution_time", times.get)
    plain, depthwise = (torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=groups)) for groups in (1, 4))
    assert pick_precision("auto", torch.device("cpu"), [plain]) is torch.bfloat16
    assert pick_precision("auto", torch.device("cpu"), [plain, depthwise]) is torch.float32


def test_what_is_known_is_not_measured_again(monkeypatch):
    monkeypatch.setattr(helper, "_convolution_time", None)
    plain, depthwise = (torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=groups)) for groups in (1, 4))
    for known in (torch.float32, torch.bfloat16):
        assert pick_precision("auto", CPU, [plain], known) is known
        assert pick_precision("auto", CPU, [depthwise], known) is torch.float32


class Gradients(TorchDispatchMode):
    """Notes the types in which gradients of convolutions are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.types: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.types.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size, stride, groups", [(3, 1, 4), (5, 2, 4), (3, 1, 2)])
def test_gradients_of_grouped_convolutions_are_computed_in_float32(size, stride, groups, bias):
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(4, 8, size, stride, padding=size // 2, groups=groups, bias=bias)
    image = torch.randn(2, 4, 12, 12, requires_grad=True)

    def gradients(mode):
        with Gradients() as seen:
            with autocast(CPU, torch.bfloat16), mode:
                made = layer(image)
            assert made.dtype == torch.bfloat16
            found = torch.autograd.grad((made.float() ** 2).sum(), [image, *layer.parameters()])
        return seen.types, found

    types, as_ever = gradients(contextlib.nullcontext())
    types_now, now = gradients(grouped_gradients(CPU, torch.bfloat16))
    assert (types, types_now) == ([torch.bfloat16], [torch.float32])
    for a, b in zip(as_ever, now, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


def test_a_frozen_grouped_convolution_hands_gradients_on():
    layer = torch.nn.Conv2d(4, 4, 3, groups=4).requires_grad_(False)
    image = torch.randn(1, 4, 6, 6, requires_grad=True)
    with autocast(CPU, torch.bfloat16), grouped_gradients(CPU, torch.bfloat16):
        layer(image).sum().backward()
    assert image.grad is not None and layer.weight.grad is None


def test_other_convolutions_are_left_alone(monkeypatch):
    monkeypatch.setattr(helper._GroupedConvolution, "apply", None)
    image = torch.randn(1, 4, 6, 6)
    layers = torch.nn.Conv2d(4, 4, 3), torch.nn.Conv2d(4, 4, 3, padding="same", groups=4)
    for layer in layers:
        with autocast(CPU, torch.bfloat16), grouped_gradients(CPU, torch.bfloat16):
            layer(image)
    for device, precision in ((CPU, torch.float32), (torch.device("cuda"), torch.bfloat16)):
        with grouped_gradients(device, precision):
            torch.nn.Conv2d(4, 4, 3, groups=4)(image)


def test_autocast_is_off_for_float32():
    a = torch.ones(2, 2)
    with autocast(CPU, torch.float32):
        assert (a @ a).dtype == torch.float32
    with autocast(CPU, torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16


def test_importing_touches_no_gpu_and_no_file(tmp_path):
    code = "import helper, model, loss, trainer, predict, torch; print(torch.cuda.is_initialized())"
    root = Path(helper.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("False\n", "")
    assert names(tmp_path) == []


# Meters


def test_meter_weighs_by_count():
    meter = Meter()
    assert (meter.value, meter.mean) == (0.0, 0.0)
    meter.update(2.0, 3)
    meter.update(6.0)
    assert (meter.value, meter.mean, meter.count) == (6.0, 3.0, 4)
    meter.reset()
    assert (meter.value, meter.mean, meter.count) == (0.0, 0.0, 0)
