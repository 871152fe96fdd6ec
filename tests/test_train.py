"""The script that trains: what it writes, how it fails, and how it survives being killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from helper import load_checkpoint
from scripting import ROOT, SMALL, choose, run_script

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_train_writes_its_checkpoints_and_log(trained):
    state = load_checkpoint(trained / "latest.pkl")
    assert state["epoch"] == 2
    assert json.loads((trained / "current.json").read_text()) == {"checkpoint": "latest.pkl", "epoch": 2}
    assert (trained / "best.pkl").is_file()
    assert list((trained / "log").glob("events*"))


def test_train_prints_the_progress_line(data, tmp_path, capsys):
    train.main(["--data", str(data), "--checkpoint-dir", str(tmp_path / "c"), "--epoch", "1", *SMALL])
    printed = capsys.readouterr().out
    assert "Grand new training ..." in printed
    assert "Epoch: [1][0/2]    Time: " in printed and "(io: " in printed
    assert "training  an epoch  each  validation" in printed
    assert "IoU(Semantic): " in printed and "Loss: " in printed


def test_a_trained_run_says_so(data, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "c")
    command = ["--data", str(data), "--checkpoint-dir", str(tmp_path / "c"), *SMALL]
    for options in ([], ["--set", "train.n_epoch=2"]):
        assert train.main([*command, *options]) == 0
        assert "already" in capsys.readouterr().out
    assert train.main([*command, "--epoch", "1"]) == 0
    assert load_checkpoint(tmp_path / "c" / "latest.pkl")["epoch"] == 3


def test_starting_anew_sets_the_last_run_aside(data, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "c")
    command = ["--data", str(data), "--checkpoint-dir", str(tmp_path / "c"), "--no-resume", "--epoch", "1", *SMALL]
    assert train.main(command) == 0
    assert load_checkpoint(tmp_path / "c" / "latest.pkl")["epoch"] == 1
    assert load_checkpoint(tmp_path / "c" / "previous" / "latest.pkl")["epoch"] == 2


def test_fine_tuning_starts_from_the_weights(data, trained, tmp_path, capsys):
    command = ["--data", str(data), "--checkpoint-dir", str(tmp_path / "c"), "--epoch", "1", "--lr", "1e-9", *SMALL]
    assert train.main([*command, "--init", str(trained / "latest.pkl")]) == 0
    before = load_checkpoint(trained / "latest.pkl")["average"]
    after = load_checkpoint(tmp_path / "c" / "latest.pkl")["weights"]
    name = "outputs.semantic.weight"
    torch.testing.assert_close(after[name], before[name], atol=1e-5, rtol=0)


def test_fine_tuning_another_network_takes_what_fits(data, trained, tmp_path, capsys):
    command = ["--data", str(data), "--checkpoint-dir", str(tmp_path / "c"), "--epoch", "1", *SMALL]
    assert train.main([*command, "--set", "param.model=caunet", "--init", str(trained / "latest.pkl")]) == 0
    assert "outputs.contour" in capsys.readouterr().out


def test_a_resumed_run_keeps_the_settings_it_began_with(data, tmp_path):
    command = ["--data", str(data), "--checkpoint-dir", str(tmp_path / "c")]
    assert train.main([*command, *SMALL, "--epoch", "1", "--set", "pre.stretch=False"]) == 0
    assert train.main([*command, "--epoch", "1", "--set", "train.weight_decay=0.5"]) == 0
    state = load_checkpoint(tmp_path / "c" / "latest.pkl")
    assert (state["epoch"], state["model"], state["config"]["pre"]["stretch"]) == (2, "unet", False)
    assert state["optimizer"]["param_groups"][0]["weight_decay"] == 0.5


def test_a_teacher_is_heard(data, trained, tmp_path, capsys):
    command = ["--data", str(data), "--checkpoint-dir", str(tmp_path / "c"), "--epoch", "1", *SMALL]
    assert train.main([*command, "--set", f"train.teacher={trained / 'latest.pkl'}"]) == 0
    printed = capsys.readouterr().out
    assert train.main([*command, "--no-resume"]) == 0
    taught, alone = (_first_loss(text) for text in (printed, capsys.readouterr().out))
    assert taught > alone + 0.1  # one term more


def _first_loss(printed: str) -> float:
    return float(re.search(r"Loss: ([\d.]+)", printed)[1])


def test_a_teacher_does_not_teach_what_it_never_learned(data, tmp_path, capsys):
    start = ["--data", str(data), "--epoch", "1", *SMALL, "--set", "param.model=caunet"]
    assert train.main([*start, "--checkpoint-dir", str(tmp_path / "a"), "--set", "contour.detect=False"]) == 0
    learn = [*start, "--checkpoint-dir", str(tmp_path / "b"), "--set", "contour.exclusive=True"]
    assert train.main([*learn, "--set", f"train.teacher={tmp_path / 'a' / 'latest.pkl'}"]) == 2
    assert "a caunet learned no head that caunet is to learn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("pre.color_space=gray", "reads images by Policy("),
        ("param.model=maskrcnn", "a unet learned no head that maskrcnn is to learn"),
        ("contour.exclusive=True", "a unet learned no head that caunet is to learn"),
    ],
)
def test_a_teacher_of_something_else_is_refused(data, trained, tmp_path, capsys, option, words):
    model = option if option.startswith("param") else "param.model=caunet"
    command = ["--data", str(data), "--checkpoint-dir", str(tmp_path / "c"), *SMALL, "--set", model, "--set", option]
    assert train.main([*command, "--set", f"train.teacher={trained / 'latest.pkl'}"]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_another_network_does_not_resume(data, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "c")
    command = ["--data", str(data), "--checkpoint-dir", str(tmp_path / "c"), *SMALL, "--set", "param.model=caunet"]
    assert train.main(command) == 2
    assert "--no-resume" in capsys.readouterr().err


def test_a_run_killed_in_its_last_validation_still_owes_its_scores(data, tmp_path, monkeypatch):
    command = ["--data", str(data), "--checkpoint-dir", str(tmp_path / "c"), *SMALL]

    def killed(model):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "_make_evaluate", lambda *args: killed)
        assert train.main([*command, "--epoch", "1"]) != 0
    assert (tmp_path / "c" / "latest.pkl").is_file() and not (tmp_path / "c" / "best.pkl").is_file()
    assert train.main(command) == 0
    best = load_checkpoint(tmp_path / "c" / "best.pkl")
    assert best["epoch"] == load_checkpoint(tmp_path / "c" / "latest.pkl")["epoch"] == 1
    assert best["best"] == best["scores"]["score"]


def test_a_killed_run_resumes_to_the_same_end(data, tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    command = ["--data", str(data), "--epoch", "6", *SMALL, "--set", "param.dropout=0.2"]
    assert run_script("train.py", *command, "--checkpoint-dir", str(straight)).returncode == 0

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, str(ROOT / "train.py"), *command, "--checkpoint-dir", str(broken)]
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (broken / "current.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = load_checkpoint(broken / "latest.pkl")["epoch"]
    assert 1 <= done < 6, "killed too late to show anything"
    resumed = run_script("train.py", *command, "--checkpoint-dir", str(broken))
    assert resumed.returncode == 0 and f"Resuming after epoch {done}" in resumed.stdout
    a, b = (load_checkpoint(folder / "latest.pkl") for folder in (straight, broken))
    assert b["epoch"] == a["epoch"] == 6
    for name, value in a["weights"].items():
        assert torch.equal(value, b["weights"][name]), name


def _corrupt(folder: Path) -> None:
    image = next(folder.glob("train/*/images/*.png"))
    image.write_bytes(image.read_bytes()[:100])


def _resize_mask(folder: Path) -> None:
    mask = next(folder.glob("train/*/masks/*.png"))
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(mask)


def _empty(folder: Path) -> None:
    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()


@pytest.mark.parametrize(
    ("spoil", "options", "words"),
    [
        (_empty, [], "no image"),
        (_corrupt, [], "not a readable image"),
        (_resize_mask, [], "shape (9, 9), image is (48, 56)"),
        (None, ["--set", "train.n_epok=3"], "did you mean 'n_epoch'"),
        (None, ["--set", "param.model=camunett"], "did you mean 'camunet'"),
        (None, ["--set", "loss.semantic=bec"], "did you mean 'bce'"),
        (None, ["--set", "param.weight=bordr"], "did you mean 'border'"),
        (_corrupt, ["--set", "post.policy=wss"], "did you mean 'ws'"),  # before any image is read
        (_corrupt, ["--set", "loss.semantic=dise"], "did you mean 'dice'"),
        (_corrupt, ["--set", "train.schedule=cosin"], "did you mean 'cosine'"),
        (_corrupt, ["--minutes", "-1"], "wanted more than 0"),
        (None, ["--set", "post.marker=contour"], "no head 'contour'"),
        (None, ["--set", "valid.test_time_augment=flip"], "did you mean 'flips'"),
        (None, ["--epoch", "-2"], "wanted more than 0"),
        (None, ["--set", "train.device=cuda:99"], "cuda:99"),
        (None, ["--config", "nowhere.ini"], "nowhere.ini: no such file"),
        (None, ["--init", "nowhere.pkl"], "no such checkpoint"),
        (None, ["--set", "train.teacher=nowhere.pkl"], "no such checkpoint"),
        (None, ["--set", "dataset.valid_ids=nowhere.txt"], "no such file"),
        (None, ["--set", "dataset.sub_category=Moon"], "no image passes the filter"),
        (None, ["--set", "unett.width=64"], "did you mean 'unet'"),
    ],
)
def test_train_refuses_in_one_line(spoil, options, words, data, tmp_path, capsys):
    folder = shutil.copytree(data, tmp_path / "data")
    if spoil:
        spoil(folder)
    status = train.main(["--data", str(folder), "--checkpoint-dir", str(tmp_path / "c"), *SMALL, *options])
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert status == 2
    assert len(lines) == 1 and words in lines[0]
    assert not (tmp_path / "c").exists()


def test_a_typo_in_the_ini_names_file_section_and_key(data, tmp_path, capsys):
    (tmp_path / "config.ini").write_text("[train]\nn_epok = 3\n")
    assert train.main(["--data", str(data)]) == 2
    error = capsys.readouterr().err
    assert "config.ini" in error and "'n_epok' in section [train]" in error and "'n_epoch'" in error


def test_train_skips_bad_images_when_told_to(data, tmp_path, capsys):
    folder = shutil.copytree(data, tmp_path / "data")
    _corrupt(folder)
    command = ["--data", str(folder), "--checkpoint-dir", str(tmp_path / "c"), "--epoch", "1", *SMALL]
    assert train.main([*command, "--set", "dataset.on_bad=skip"]) == 3
    captured = capsys.readouterr()
    assert "5 training images" in captured.out and "skipped: " in captured.err


def test_fine_tuning_another_family(data, trained, tmp_path, capsys):
    start = ["--data", str(data), "--init", str(trained / "latest.pkl"), "--epoch", "1"]
    folder = ["--checkpoint-dir", str(tmp_path / "checkpoint")]
    assert train.main([*start, *folder, *choose("param.model=maskrcnn")]) == 2
    assert "none of its weights fits maskrcnn" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint").exists()
    assert train.main([*start, *folder, *choose("param.model=colorunet")]) == 0
    assert "fresh: decoders.1" in capsys.readouterr().out


def test_fine_tuning_leaves_a_fitting_encoder_alone(data, tmp_path, capsys):
    small = [*choose("param.model=lite_camunet"), "--data", str(data), "--epoch", "1"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert train.main([*small, "--checkpoint-dir", str(first), "--set", "param.encoder_weights=none"]) == 0
    assert "Encoder weights" not in capsys.readouterr().out
    assert train.main([*small, "--checkpoint-dir", str(second), "--init", str(first / "latest.pkl")]) == 0
    printed = capsys.readouterr().out
    assert "Initialised" in printed and "Encoder weights" not in printed


def test_without_a_connection_nothing_is_begun(data, tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    options = [*SMALL, "--set", "param.model=res_unet", "--checkpoint-dir", str(tmp_path / "checkpoint")]
    assert train.main(["--data", str(data), *options]) == 2
    assert "There are three choices" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint").exists()
