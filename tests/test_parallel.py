"""The parallel room, and the scripts as torchrun starts them: two processes come to what one comes to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import crop
import parallel
import prepare
import split
import stitch
import tune
import valid
from config import Config
from dataset import build_loader, open_cache
from helper import DEFAULT_WEIGHTS, is_restarted, load_checkpoint, pick_device, write_current
from model import build_model, place
from record import find_records
from schedule import Stretch
from synthetic import write_dataset
from trainer import Trainer

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SMALL = [
    "--set", "param.model=unet", "--set", "DEFAULT.width=32", "--set", "train.n_batch=3", "--set", "train.n_cv_epoch=1",
    "--set", "train.n_worker=1", "--set", "train.precision=float32", "--set", "train.print_freq=1",
]  # fmt: skip
#: Two processes learn what one learns where nothing in the network looks at the rest of the batch, and losses are means
#: over images.
ALIKE = {
    "default": {"width": 32},
    "param": {"model": "caunet", "learn_rate": 0.01, "norm": "group"},
    "loss": {"semantic": "bce + dice", "contour": "focal + 0.5*iou"},
    "train": {"n_batch": 3, "n_worker": 0, "clip_norm": 0.5, "n_image_log": 0, "print_freq": 1, "seed": 5},
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Work in an empty folder, where no config.ini of a developer lies."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Seven small labelled images for training, so that the last step of three is short; three for validation."""
    folder = tmp_path_factory.mktemp("data")
    for name, n, seed in (("train", 7, 0), ("valid", 3, 1)):
        write_dataset(folder / name, n, seed, shape=(48, 40))
    return folder


def start(script: Path, *args: object, n: int = 2, restarts: int = 0) -> subprocess.CompletedProcess:
    """Run a script by `n` processes, as ``torchrun --nproc-per-node`` does."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    command = [sys.executable, *torchrun, "--max-restarts", str(restarts), str(script), *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def worker(folder: Path, text: str) -> Path:
    """A script for the processes of one test, which finds the rooms and this file."""
    file = folder / "worker.py"
    file.write_text(f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n{text}")
    return file


# One process


def test_one_process_is_alone():
    assert (parallel.n_started(), parallel.world(), parallel.rank(), parallel.local_rank()) == (1, 1, 0, 0)
    assert parallel.is_main() and parallel.bar_off() is None and parallel.launch() == ""
    assert parallel.merge(parallel.share([3, 1, 2])) == [3, 1, 2]
    assert parallel.to_main("all") == ["all"]
    assert parallel.from_main(lambda: 7) == 7
    assert parallel.sums([1.5, 2.0]) == [1.5, 2.0]
    value = torch.tensor([1.0, 2.0])
    parallel.average([value])
    assert value.tolist() == [1.0, 2.0]
    with parallel.joined():
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("script", [tune, split, crop, stitch, prepare])
def test_other_scripts_refuse_to_run_many_times(script, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = {crop: ["x", "--step", "8", "--width", "8"], split: ["x"], stitch: ["x"], prepare: ["verify"]}
    assert script.main(arguments.get(script, [])) == 2
    assert "runs as one process, torchrun started 2; start it with python" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cuda:1", "mps"])
def test_many_processes_do_not_share_a_device(name, monkeypatch):
    monkeypatch.setattr(parallel, "world", lambda: 2)
    with pytest.raises(ValueError, match=f"device = {name}: 2 processes; wanted cuda, cpu or auto"):
        pick_device(name)


def test_a_training_belongs_to_the_launch_that_began_it(tmp_path, monkeypatch):
    write_current(tmp_path, "latest.pkl", 3)
    assert not is_restarted(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    assert not is_restarted(tmp_path)
    write_current(tmp_path, "latest.pkl", 3)
    assert is_restarted(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "b")
    assert not is_restarted(tmp_path)
    (tmp_path / "current.json").write_text("{")
    assert not is_restarted(tmp_path)


def test_each_start_has_a_name_of_its_own():
    """On one store, which keeps what processes wrote that died in the middle of an earlier start."""
    store = torch.distributed.HashStore()
    for key in ("hello/1", "welcome/1", "hello/2", "welcome/2"):
        store.set(key, "left over")
    names = []
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            names.append(set(pool.map(lambda number: parallel._agree(store, number, 3), (2, 0, 1))))
    assert [len(each) for each in names] == [1, 1, 1]
    assert len(set.union(*names)) == 3


# Two processes

TALK = """
import json, sys, torch
import parallel

with parallel.joined():
    me = parallel.rank()
    print("said by", me)
    tensors = [torch.full((2, 1), 1.0 + me), torch.tensor(3.0 * me)]
    parallel.average(tensors)
    found = {
        "place": [me, parallel.world(), parallel.local_rank(), parallel.is_main(), parallel.bar_off()],
        "merged": [parallel.merge([10 * x for x in parallel.share(range(n))]) for n in (0, 1, 5)],
        "to_main": parallel.to_main(chr(97 + me)),
        "from_main": parallel.from_main(lambda: [me, "answer"]),
        "sums": parallel.sums([1, 10 * me]),
        "average": [t.tolist() for t in tensors],
        "launch": parallel.launch(),
    }
    with open(f"{sys.argv[1]}/{me}.json", "w") as file:
        json.dump(found, file)
"""


def test_processes_share_and_bring_together(tmp_path):
    done = start(worker(tmp_path, TALK), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "said by 0\n"
    main, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert main.pop("place") == [0, 2, 0, True, None]
    assert other.pop("place") == [1, 2, 1, False, True]
    assert (main.pop("to_main"), other.pop("to_main")) == (["a", "b"], [])
    assert main == other and main.pop("launch")
    expected = {"merged": [[], [0], [0, 10, 20, 30, 40]], "from_main": [0, "answer"], "sums": [2, 10]}
    assert main == expected | {"average": [[[1.5], [1.5]], 1.5]}


def make(folder: Path, out: Path, sections: dict, device: torch.device = CPU) -> Trainer:
    """A trainer of this process, as `train.py` makes it."""
    config = Config.model_validate(sections)
    torch.manual_seed(3)
    model = build_model(config.param.model)
    if config.param.norm == "group":  # in double precision, or Adam would make steps of rounding errors
        model = build_model(config.param.model, norm="group").double()
    loader = build_loader(find_records(folder / "train"), open_cache(config, folder), config, model.heads)
    return Trainer(place(model, device), loader, config, out, device, torch.float32)


def merged(base: dict, **sections: dict) -> dict:
    return {name: {**base.get(name, {}), **sections.get(name, {})} for name in base.keys() | sections.keys()}


#: name -> settings, epochs
RUNS: dict[str, tuple[dict, int]] = {
    "alike": (ALIKE, 2),
    "accumulated": (merged(ALIKE, train={"n_batch": 5, "accumulate": 2}), 2),
    "thawed": (
        merged(
            ALIKE, default={"width": 64}, param={"model": "lite_camunet", "norm": "batch", "freeze_epochs": 1}, loss={}
        ),
        2,
    ),
    "half": (merged(ALIKE, param={"norm": "batch"}, contour={"detect": False}), 1),
    "maskrcnn": (merged(ALIKE, default={"width": 64}, param={"model": "maskrcnn", "norm": "batch"}), 1),
}


class Log:
    """What the trainer reports, by tag."""

    def __init__(self):
        self.scalars: dict[str, list[float]] = {}

    def add_scalar(self, tag, value, step):
        self.scalars.setdefault(tag, []).append(value)


def learn(folder: Path, out: Path, name: str) -> None:
    """Train as `RUNS` says, in this process's part, and keep what came of it."""
    sections, n_epoch = RUNS[name]
    trainer, log = make(folder, out / name, sections), Log()
    trainer.stretch = Stretch(0, n_epoch)
    trainer.run(log)  # type: ignore[arg-type]
    kept = {"weights": trainer.model.state_dict(), "average": trainer.average.state_dict(), "scalars": log.scalars}
    torch.save(kept | {"step": trainer.step}, out / f"{name}-{parallel.rank()}.pt")


@pytest.fixture(scope="module")
def learned(data, tmp_path_factory) -> Path:
    """What two processes learned in each of `RUNS`."""
    folder = tmp_path_factory.mktemp("learned")
    text = """
from pathlib import Path
import parallel, test_parallel
with parallel.joined():
    for name in sys.argv[3:]:
        test_parallel.learn(Path(sys.argv[1]), Path(sys.argv[2]), name)
"""
    done = start(worker(folder, text), data, folder, *RUNS)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_processes_hold_one_network(name, learned):
    main, other = (torch.load(learned / f"{name}-{rank}.pt") for rank in (0, 1))
    assert main["step"] == other["step"] > 0
    for part in ("weights", "average"):
        assert all(torch.equal(value, other[part][key]) for key, value in main[part].items()), part
    assert main["scalars"] == other["scalars"]
    stored = load_checkpoint(learned / name / "latest.pkl")
    assert all(torch.equal(value, stored["average"][key]) for key, value in main["average"].items())


@pytest.mark.parametrize("name", ["alike", "accumulated"])
def test_two_processes_learn_what_one_learns(name, data, learned, tmp_path, monkeypatch):
    """The same steps of the same images, the last of which has an image for one of the two alone."""
    monkeypatch.setitem(RUNS, name, (merged(RUNS[name][0], train={"accumulate": 1}), RUNS[name][1]))
    start_weights = make(data, tmp_path, RUNS[name][0]).model.state_dict()
    learn(data, tmp_path, name)
    one, two = torch.load(tmp_path / f"{name}-0.pt"), torch.load(learned / f"{name}-0.pt")
    assert one["step"] == two["step"]
    for part in ("weights", "average"):
        for key, value in one[part].items():
            torch.testing.assert_close(two[part][key], value, rtol=1e-5, atol=1e-6, msg=f"{part} {key}")
    moved = max(float((value - start_weights[key]).abs().max()) for key, value in one["weights"].items())
    assert moved > 0.01
    for tag, values in one["scalars"].items():
        assert two["scalars"][tag] == pytest.approx(values, rel=1e-5), tag


def test_an_encoder_is_thawed_under_many_processes(data, learned, tmp_path):
    """It stayed for the first of two epochs; its gradients, exchanged from then on, moved it in the second."""
    before = make(data, tmp_path, RUNS["thawed"][0]).model.encoder.state_dict()
    after = load_checkpoint(learned / "thawed" / "latest.pkl")["weights"]
    assert not torch.equal(after["encoder.body.conv_stem.weight"], before["body.conv_stem.weight"])
    optimizer = load_checkpoint(learned / "thawed" / "latest.pkl")["optimizer"]["state"]
    n_steps = {int(state["step"]) for state in optimizer.values()}
    assert n_steps == {3, 6}  # the encoder's parameters, and the others'


# Clocks, restarts, and the scripts

CLOCKS = """
from pathlib import Path
from types import SimpleNamespace
import time, parallel, trainer, test_parallel
def race():  # the trainer must be gone before its processes part: what is left of it may abort them at their end
    rate = 1 + 4 * parallel.rank()
    trainer.time = SimpleNamespace(monotonic=lambda: rate * time.monotonic())
    sections = test_parallel.merged(test_parallel.ALIKE, param={"model": "unet"})
    one = test_parallel.make(Path(sys.argv[1]), Path(sys.argv[2]) / "clock", sections)
    one.stretch = test_parallel.Stretch(0, 0, minutes=0.05)
    one.run(None)
    Path(sys.argv[2], f"{parallel.rank()}.txt").write_text(f"{one.step} {one.stretch.elapsed}")
with parallel.joined():
    race()
"""


def test_the_main_clock_ends_a_stretch_for_all(data, tmp_path):
    """The other's runs five times as fast; it must neither stop early nor let the main process wait."""
    done = start(worker(tmp_path, CLOCKS), data, tmp_path)
    assert done.returncode == 0, done.stderr
    main, other = ((tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))
    assert main == other
    assert 3 <= float(main.split()[1]) < 15


KILLED = """
import os, signal, parallel, train, trainer
step = trainer.Trainer._train_step
def die(self, parts, meters):
    if (parallel.rank(), self.epoch, os.environ["TORCHELASTIC_RESTART_COUNT"]) == (1, 1, "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, parts, meters)
trainer.Trainer._train_step = die
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_killed_worker_is_started_again_and_training_ends_as_it_should(data, tmp_path):
    """Killed in the second epoch: both go on after the first, though the command says to start anew."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "0.pkl").write_bytes(b"of an earlier run")
    arguments = ["--data", data, "--checkpoint-dir", folder, "--no-resume", "--epoch", "3", *SMALL]
    done = start(worker(tmp_path, KILLED), *arguments, restarts=1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Grand new training ...") == 1
    assert "Resuming after epoch 1 ..." in done.stdout
    assert "Training finished after epoch 3" in done.stdout
    assert [line.split("Epoch: ")[1][:8] for line in done.stdout.splitlines() if "[0/3]" in line].count("[1][0/3]") == 1
    state = load_checkpoint(folder / "latest.pkl")
    assert (state["epoch"], state["step"]) == (3, 9)
    assert (folder / "previous" / "0.pkl").read_bytes() == b"of an earlier run"
    assert not (folder / "previous-2").exists()
    events = EventAccumulator(str(folder / "log"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert [event.step for event in events.Scalars("valid/score")] == [1, 2, 3]


def test_two_processes_predict_what_one_predicts(data, tmp_path, capsys, monkeypatch, one_thread):
    """To the byte at one thread each, with an image refused; torchrun ends with 1 and tells of the script's 3."""
    images = tmp_path / "images"
    shutil.copytree(data / "train", images)
    masks = next(images.iterdir()) / "masks"
    next(masks.iterdir()).write_bytes(b"no image")
    options = ["--input", images, "--csv", "--iou", "--label", "--set", "valid.print_table=True",
               "--set", "train.precision=float32"]  # fmt: skip
    monkeypatch.chdir(make_folder(tmp_path / "one"))
    assert valid.main([str(DEFAULT_WEIGHTS), *map(str, options), "--output", "out"]) == 3
    one = capsys.readouterr()
    monkeypatch.chdir(make_folder(tmp_path / "two"))
    two = start(ROOT / "valid.py", DEFAULT_WEIGHTS, *options, "--output", "out")
    assert two.returncode == 1 and "exitcode  : 3" in two.stderr
    assert refused(two.stderr) == refused(one.err) != []
    assert two.stdout.splitlines()[:-1] == one.out.splitlines()[:-1]
    assert "6 images in" in two.stdout and ", 1 refused" in two.stdout
    files = sorted(path.name for path in (tmp_path / "one" / "out").iterdir())
    assert len(files) == 2 + 6 and files == sorted(path.name for path in (tmp_path / "two" / "out").iterdir())
    for name in files:
        assert (tmp_path / "one" / "out" / name).read_bytes() == (tmp_path / "two" / "out" / name).read_bytes(), name
    assert len((tmp_path / "one" / "out" / "result.csv").read_text().splitlines()) > 7


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


def refused(text: str) -> list[str]:
    return [line.partition(" object at ")[0] for line in text.splitlines() if line.startswith("refused: ")]


@pytest.fixture
def one_thread():
    """As many as `start` gives each process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# GPUs

SYNCED = """
import parallel, test_parallel
from pathlib import Path
from helper import pick_device
from model import place
with parallel.joined():
    device = pick_device("auto")
    assert device.index == parallel.rank()
    one = test_parallel.make(Path(sys.argv[1]), Path(sys.argv[2]), test_parallel.SYNCED_NORMS, device)
    one.stretch = test_parallel.Stretch(0, 1)
    one.run(None)
"""
SYNCED_NORMS = merged(ALIKE, param={"norm": "batch"}, train={"n_batch": 4, "sync_batchnorm": True})


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_norms_over_two_gpus_are_those_of_one(data, tmp_path):
    done = start(worker(tmp_path, SYNCED), data, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    one = make(data, tmp_path / "one", SYNCED_NORMS, torch.device("cuda"))
    one.stretch = Stretch(0, 1)
    one.run(None)
    found, expected = (load_checkpoint(tmp_path / name / "latest.pkl")["weights"] for name in ("two", "one"))
    for key, value in expected.items():
        if "running_mean" in key:
            torch.testing.assert_close(found[key], value, rtol=0.05, atol=0.05, msg=key)
