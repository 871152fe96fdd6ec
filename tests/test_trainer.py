"""The trainer room: steps that do what they should, and a resume that is exact."""

from __future__ import annotations

import copy
import json
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import parallel
from config import Config, Train
from dataset import Loader, NucleiDataset, open_cache
from helper import load_checkpoint, read_current
from model import build_model, load_model, place
from predict import Segmenter
from record import find_records
from schedule import Stretch
from synthetic import write_dataset
from trainer import (
    Meters,
    Trainer,
    adapt,
    autotuned_convolutions,
    count_pixels,
    encoder_rate,
    group_parameters,
    log_graph,
    norm_statistics,
    pick_rules,
    refuse_infinite,
    thaw_epoch,
    update_average,
)
from transform import AUGMENTATIONS

CPU = torch.device("cpu")


class Log:
    """What the trainer reports, by tag."""

    def __init__(self):
        self.scalars: dict[str, list[tuple[int, float]]] = {}

    def add_scalar(self, tag, value, step):
        self.scalars.setdefault(tag, []).append((step, value))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four tiny images."""
    path = tmp_path_factory.mktemp("data")
    write_dataset(path / "train", 4, seed=1, shape=(48, 40))
    return path


def settings(**sections) -> Config:
    train = {"n_batch": 2, "n_worker": 0, "n_ckpt_epoch": 2, "n_cv_epoch": 1, "n_image_log": 0, "print_freq": 100}
    base = {"default": {"width": 32}, "param": {"model": "unet", "learn_rate": 0.01}, "train": train}
    names = base.keys() | sections.keys()
    return Config.model_validate({name: {**base.get(name, {}), **sections.get(name, {})} for name in names})


def make(
    folder: Path, out: Path, config: Config, evaluate=None, seed: int = 0, loader=Loader, teacher=None, **options
) -> Trainer:
    torch.manual_seed(seed)
    model = build_model(config.param.model, **options)
    cache = open_cache(config, folder)
    dataset = NucleiDataset(find_records(folder / "train"), cache, config, model.heads)
    batches = loader(dataset, config.train.n_batch, config.train.n_worker, config.train.accumulate)
    return Trainer(model, batches, config, out, CPU, torch.float32, evaluate, teacher)


def same(a, b) -> bool:
    """Equal to the bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# Parts


def test_average_moves_a_step_and_counters_are_copied():
    average, model = (nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1)) for _ in range(2))
    average[0].weight.data.fill_(1.0)
    model[0].weight.data.fill_(5.0)
    model[1].running_mean.fill_(8.0)
    model[1].num_batches_tracked.fill_(9)
    update_average(average, model, 0.75)
    assert average[0].weight.item() == 2.0
    assert average[1].running_mean.item() == 2.0
    assert average[1].num_batches_tracked.item() == 9
    assert model[0].weight.item() == 5.0


def test_rules_are_of_the_heads_that_are_wanted():
    heads = ("semantic", "contour", "marker")
    config = settings(loss={"contour": "focal"})
    assert pick_rules(config, heads) == {"semantic": "wbce + dice", "contour": "focal", "marker": "bce + dice"}
    assert pick_rules(config, ("semantic",)).keys() == {"semantic"}
    assert pick_rules(settings(contour={"detect": False}), heads).keys() == {"semantic", "marker"}
    assert pick_rules(settings(contour={"exclusive": True}), heads).keys() == {"contour"}
    with pytest.raises(ValueError, match=r"exclusive = True trains the contour alone, unet does not"):
        pick_rules(settings(contour={"exclusive": True}), ("semantic",))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_head(value):
    losses = {"semantic/bce": torch.tensor(1.0), "contour/dice": torch.tensor(2.5)}
    refuse_infinite(losses)
    with pytest.raises(ValueError, match="the loss contour/dice is not finite"):
        refuse_infinite({**losses, "contour/dice": torch.tensor(value)})


def test_pixels_of_a_batch():
    truth = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 2, 2)
    assert count_pixels(torch.tensor([3.0, -3.0, 3.0, -3.0]).view(1, 1, 2, 2), truth).tolist() == [1, 3]
    assert count_pixels(2 * truth - 1, truth).tolist() == [2, 2]
    colors = torch.stack([truth[0, 0] - 2, truth[0, 0] - 0.5])[None]  # nothing of the first, all of the second
    assert count_pixels(colors, 7 * truth).tolist() == [2, 2]
    assert count_pixels(-1 - truth, 0 * truth).tolist() == [0, 0]


def test_meters_of_two_steps():
    meters = Meters({"semantic": None})
    meters.note(torch.tensor([1, 0.5, 1, 3]))
    meters.note(torch.tensor([3, 0.6, 2, 2]))
    meters.tick(0.25)
    assert meters.settle().means() == pytest.approx({"loss": 0.275, "iou/semantic": (1 / 3 + 3) / 4})
    line = meters.settle().line(3, 7, 20)
    assert line.startswith("Epoch: [3][7/20]    Time: ")
    assert "(io: 0.250)" in line
    assert line.endswith("Loss: 0.2000 (0.2750)    IoU(Semantic): 1.000 (0.833)")


# Training


def test_a_resumed_run_equals_one_that_was_never_cut(folder, tmp_path):
    class CutOff(Loader):
        def epoch(self, epoch):
            if epoch == 2:
                raise KeyboardInterrupt
            yield from super().epoch(epoch)

    config = settings(train={"schedule": "cosine", "warm_up": 0.3})
    straight = make(folder, tmp_path / "a", config, dropout=0.2)
    straight.stretch = Stretch(0, 4)
    straight.run(Log())

    cut = make(folder, tmp_path / "b", config, dropout=0.2, loader=CutOff)
    cut.stretch = Stretch(0, 4)
    with pytest.raises(KeyboardInterrupt):
        cut.run(Log())

    resumed = make(folder, tmp_path / "b", config, dropout=0.2, seed=77)
    resumed.restore(load_checkpoint(read_current(tmp_path / "b")))
    assert (resumed.epoch, resumed.step, resumed.stretch.target) == (2, 4, 4)
    resumed.run(Log())

    expected, found = straight.state(), resumed.state()
    assert (found["epoch"], found["step"]) == (4, 8)
    for part in ("weights", "average", "optimizer", "random", "step", "best"):
        assert same(found[part], expected[part]), part
    stored = load_checkpoint(tmp_path / "b" / "latest.pkl")
    assert same(stored["weights"], expected["weights"])
    assert not same(expected["weights"], load_checkpoint(tmp_path / "a" / "2.pkl")["weights"])


def test_checkpoints_of_a_run(folder, tmp_path):
    seen, answers = [], iter([0.2, 0.5, 0.3])

    def evaluate(model):
        seen.append(model)
        return {"score": next(answers), "iou": 0.9}

    trainer, log = make(folder, tmp_path, settings(), evaluate), Log()
    trainer.stretch = Stretch(0, 3)
    trainer.run(log)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2.pkl", "best.pkl", "current.json", "latest.pkl"]
    epochs = {path.stem: load_checkpoint(path)["epoch"] for path in tmp_path.glob("*.pkl")}
    assert epochs == {"2": 2, "best": 2, "latest": 3}
    assert json.loads((tmp_path / "current.json").read_text()) == {"checkpoint": "latest.pkl", "epoch": 3}
    assert all(model is trainer.average for model in seen)
    assert load_checkpoint(tmp_path / "best.pkl")["scores"] == {"score": 0.5, "iou": 0.9}
    assert load_checkpoint(tmp_path / "latest.pkl")["best"] == 0.5
    assert log.scalars["valid/score"] == [(1, 0.2), (2, 0.5), (3, 0.3)]
    assert [step for step, _ in log.scalars["train/loss"]] == [1, 2, 3]
    assert same(load_model(load_checkpoint(tmp_path / "latest.pkl")).state_dict(), trainer.average.state_dict())


def test_validation_comes_every_so_often_and_at_the_end(folder, tmp_path):
    epochs = []

    def evaluate(model):
        epochs.append(trainer.epoch)
        return {"score": 0.0}

    trainer = make(folder, tmp_path, settings(train={"n_cv_epoch": 2}), evaluate)
    trainer.stretch = Stretch(0, 3)
    trainer.run(Log())
    assert epochs == [2, 3]


def test_training_lowers_the_loss(folder, tmp_path):
    still = dict.fromkeys((row.switch for row in AUGMENTATIONS.values()), False)
    config = settings(train={"n_batch": 4, "schedule": "constant"}, pre=still)
    trainer, log = make(folder, tmp_path, config), Log()
    trainer.stretch = Stretch(0, 12)
    trainer.run(log)
    losses = [value for _, value in log.scalars["train/loss"]]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])


def test_a_network_learns_of_its_teacher_and_the_teacher_stays_as_it_is(folder, tmp_path):
    """One that sees nothing anywhere, beside a truth that counts a hundredth."""
    teacher = build_model("caunet")
    nn.init.zeros_(teacher.outputs["semantic"].weight)
    nn.init.constant_(teacher.outputs["semantic"].bias, -9.0)
    before = copy.deepcopy(teacher.state_dict())
    config = settings(
        param={"learn_rate": 0.1}, train={"schedule": "constant", "n_batch": 4}, loss={"semantic": "0.01*bce"}
    )
    trainer = make(folder, tmp_path, config, teacher=teacher)
    image = torch.from_numpy(trainer.loader.dataset.item(0, 0)["image"])[None]
    first = torch.sigmoid(trainer.model(image)["semantic"]).mean().item()
    trainer.stretch = Stretch(0, 10)
    trainer.run(Log())
    last = torch.sigmoid(trainer.model(image)["semantic"]).mean().item()
    assert last < 0.2 < 0.4 < first
    assert same(dict(teacher.state_dict()), dict(before))
    assert not any("teacher" in name for name in load_checkpoint(tmp_path / "latest.pkl")["weights"])


def test_the_schedule_sets_the_learn_rate(folder, tmp_path):
    trainer, log = make(folder, tmp_path, settings(train={"n_batch": 4, "schedule": "onecycle", "warm_up": 0.5})), Log()
    trainer.stretch = Stretch(0, 4)
    trainer.run(log)
    assert [rate for _, rate in log.scalars["train/learn_rate"]] == pytest.approx([0, 0.005, 0.01, 0.005])


def test_the_clock_ends_a_stretch(folder, tmp_path):
    trainer = make(folder, tmp_path, settings())
    trainer.stretch = Stretch(0, 0, minutes=0.01)
    trainer.run(Log())
    assert 0.6 <= trainer.stretch.elapsed < 5
    assert load_checkpoint(tmp_path / "latest.pkl")["span"]["elapsed"] == trainer.stretch.elapsed


@pytest.mark.parametrize(
    ("contour", "trained"),
    [({}, {"semantic", "contour"}), ({"exclusive": True}, {"contour"}), ({"detect": False}, {"semantic"})],
    ids=["both", "exclusive", "undetected"],
)
def test_only_the_wanted_heads_are_trained(folder, tmp_path, contour, trained):
    trainer = make(folder, tmp_path, settings(param={"model": "caunet"}, contour=contour))
    parts = {"semantic": (trainer.model.decoders[0], trainer.model.outputs["semantic"]),
             "contour": (trainer.model.decoders[1], trainer.model.outputs["contour"])}  # fmt: skip
    before = {head: [p.detach().clone() for part in own for p in part.parameters()] for head, own in parts.items()}
    trainer.stretch = Stretch(0, 1)
    trainer.run(Log())
    for head, own in parts.items():
        moved = [not torch.equal(p, old) for p, old in zip(
            [p for part in own for p in part.parameters()], before[head], strict=True)]  # fmt: skip
        assert all(moved) if head in trained else not any(moved), head


def test_training_stops_where_a_head_is_not_finite(folder, tmp_path):
    trainer = make(folder, tmp_path, settings(param={"model": "caunet"}))
    with torch.no_grad():
        trainer.model.outputs["contour"].bias.fill_(math.nan)
    with pytest.raises(ValueError, match="the loss contour/wbce, contour/dice is not finite"):
        trainer.run(Log())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("optimizer", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_optimizer_is_the_settings_choice(folder, tmp_path, optimizer, kind):
    trainer = make(folder, tmp_path, settings(train={"optimizer": optimizer, "weight_decay": 0.05}))
    assert type(trainer.optimizer) is kind
    assert trainer.optimizer.param_groups[0]["weight_decay"] == (0.05 if optimizer == "adamw" else 0.0)


def test_unknown_schedule_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="unknown schedule 'cosin'; did you mean 'cosine'"):
        make(folder, tmp_path, settings(train={"schedule": "cosin"}))


# Encoders, heads with several channels, detectors


@pytest.mark.parametrize(
    ("name", "param", "expected"),
    [
        ("unet", {}, 0),
        ("lite_camunet", {}, None),
        ("lite_camunet", {"freeze_epochs": 0}, 0),
        ("res_unet", {}, math.inf),
        ("res_unet", {"freeze_epochs": 0}, 0),
        ("res_unet", {"freeze_epochs": 3}, 3),
        ("lite_camunet", {"freeze_epochs": "forever"}, math.inf),
        ("res_unet", {"encoder_weights": "none"}, 0),
        ("res_unet", {"encoder_weights": "none", "freeze_epochs": "forever"}, 0),
        ("camunet", {"freeze_epochs": 5}, 0),
        ("res_unet", {"encoder": "plain"}, 0),
    ],
)
def test_when_the_encoder_is_thawed(name, param, expected):
    model = build_model(name, **({"encoder": param.get("encoder", "resnet18")} if name == "res_unet" else {}))
    assert thaw_epoch(settings(param=param), model) == expected


@pytest.mark.parametrize(
    ("name", "param", "expected"),
    [
        ("lite_camunet", {}, 0.5),
        ("lite_camunet", {"encoder_weights": "none"}, 1.0),
        ("camunet", {}, 1.0),
        ("camunet", {"encoder_rate": 0.1}, 0.1),
        ("lite_camunet", {"encoder_rate": 0}, 0.0),
    ],
)
def test_how_fast_the_encoder_learns(name, param, expected):
    assert encoder_rate(settings(param=param), build_model(name)) == expected


def test_parameters_in_two_groups_in_the_order_of_the_model():
    model = build_model("unet")
    groups = group_parameters(model, 0.1)
    assert [group["rate"] for group in groups] == [0.1, 1.0]
    both = [p for group in groups for p in group["params"]]
    assert all(a is b for a, b in zip(both, model.parameters(), strict=True))
    assert len(groups[0]["params"]) == len(list(model.encoder.parameters()))
    assert [group["rate"] for group in group_parameters(build_model("msdnet", depth=2), 0.1)] == [1.0]


def test_the_encoder_is_frozen_then_thawed_then_trained_at_its_own_rate(folder, tmp_path):
    param = {"model": "lite_camunet", "freeze_epochs": 1, "encoder_rate": 0.5}
    config = settings(default={"width": 64}, param=param, train={"n_epoch": 2, "schedule": "constant"})
    trainer = make(folder, tmp_path, config)
    start = {name: value.clone() for name, value in trainer.model.encoder.state_dict().items()}
    trainer.stretch = Stretch(0, 1)
    trainer.run(Log())
    assert all(torch.equal(value, start[name]) for name, value in trainer.model.encoder.state_dict().items())
    trainer.stretch = Stretch(1, 2)
    trainer.run(Log())
    assert not any(torch.equal(p, start[name]) for name, p in trainer.model.encoder.named_parameters())
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.005, 0.01]


def test_the_encoder_is_thawed_when_the_learning_rate_has_risen(folder, tmp_path):
    """Within an epoch, where that is long: a training of a single one trains all of the network."""
    config = settings(default={"width": 64}, param={"model": "lite_camunet"}, train={"warm_up": 0.5, "n_batch": 1})
    trainer = make(folder, tmp_path, config)
    start = {name: value.clone() for name, value in trainer.model.encoder.state_dict().items()}
    trainer.stretch = Stretch(0, 1)
    seen, learn = [], trainer._train_step
    trainer._train_step = lambda parts, meters: seen.append(trainer.model.frozen) or learn(parts, meters)
    assert trainer.frozen
    trainer.run(Log())
    n = len(trainer.loader.steps())
    assert seen == [i / n < 0.5 for i in range(n)] and set(seen) == {True, False}
    assert not any(torch.equal(p, start[name]) for name, p in trainer.model.encoder.named_parameters())
    assert not trainer.frozen


@pytest.mark.parametrize(("elapsed", "expected"), [(0, True), (14.9, True), (15, False), (60, False)])
def test_by_the_clock_the_encoder_is_thawed_in_time(elapsed, expected, folder, tmp_path):
    trainer = make(folder, tmp_path, settings(param={"model": "lite_camunet"}, train={"warm_up": 0.25}))
    trainer.stretch = Stretch(0, 0, 1, elapsed)
    assert trainer.frozen == expected


def test_a_state_with_one_group_of_parameters_is_taken_up(folder, tmp_path):
    """As checkpoints were before encoders had a rate of their own."""
    trainer = make(folder, tmp_path / "a", settings(train={"n_epoch": 1}))
    trainer.stretch = Stretch(0, 1)
    trainer.run(Log())
    state = trainer.state()
    groups = state["optimizer"]["param_groups"]
    one = {**groups[0], "params": [number for group in groups for number in group["params"]]}
    state["optimizer"] = {**state["optimizer"], "param_groups": [one]}
    again = make(folder, tmp_path / "b", settings(train={"n_epoch": 1}), seed=1)
    again.restore(state)
    assert same(again.optimizer.state_dict()["state"], trainer.optimizer.state_dict()["state"])


@pytest.mark.parametrize("name", ["colorunet", "distunet", "dcan", "msdnet", "maskrcnn"])
def test_every_family_trains_and_resumes(name, folder, tmp_path):
    config = settings(default={"width": 64}, param={"model": name, "learn_rate": 1e-3}, train={"n_epoch": 2})
    log, trainer = Log(), make(folder, tmp_path, config)
    trainer.stretch = Stretch(0, 2)
    trainer.run(log)
    assert all(math.isfinite(value) for values in log.scalars.values() for _, value in values)
    state = load_checkpoint(tmp_path / "latest.pkl")
    again = make(folder, tmp_path, config, seed=1)
    for one in (again, trainer):
        one.restore(copy.deepcopy(state))  # with the state of torch's generator, by which a detector draws its samples
        one.stretch = Stretch(2, 3)
        one.run(Log())
    assert same(again.model.state_dict(), trainer.model.state_dict())
    state = load_checkpoint(tmp_path / "latest.pkl")
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    assert same(load_model(state)(image), trainer.average(image))


@pytest.mark.parametrize(
    ("name", "part"), [("unet", "ConvTranspose2d"), ("lite_camunet", "LibraryEncoder"), ("maskrcnn", "RoIHeads")]
)
def test_the_graph_of_a_network_is_logged(name, part, tmp_path):
    with SummaryWriter(str(tmp_path)) as log:
        log_graph(log, build_model(name).eval())
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert any(part in node.name for node in events.Graph().node)


# Options of a step


@pytest.mark.parametrize("clip_norm", [0.0, 0.2])
def test_a_step_of_smaller_batches_is_the_large_step(folder, tmp_path, clip_norm):
    """Where no norm looks at the rest of the batch; in double precision, or Adam would make steps of rounding."""
    trainers, logs = [], []
    for accumulate in (1, 3):
        train = {"n_batch": 3, "accumulate": accumulate, "clip_norm": clip_norm}
        config = settings(train=train, loss={"semantic": "bce + dice"})
        trainer, log = make(folder, tmp_path / str(accumulate), config, norm="group"), Log()
        trainer.model.double()
        trainer.average.double()
        trainer.stretch = Stretch(0, 2)
        trainer.run(log)
        trainers.append(trainer)
        logs.append(log.scalars)
    one, three = (trainer.state() for trainer in trainers)
    assert one["step"] == three["step"] == 4  # of 3 images and 1, for which two of three batches stand in
    for part in ("weights", "average"):
        for name, value in one[part].items():
            torch.testing.assert_close(three[part][name], value, rtol=1e-5, atol=1e-6, msg=name)
    for tag, values in logs[0].items():
        assert [value for _, value in logs[1][tag]] == pytest.approx([value for _, value in values], rel=1e-5), tag


@pytest.mark.parametrize("name", ["unet", "maskrcnn"])
def test_a_compiled_network_learns_the_same_under_the_same_names(name, folder, tmp_path, monkeypatch):
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend=backend))
    states = []
    for wanted in (False, True):
        config = settings(default={"width": 64}, param={"model": name}, train={"compile": wanted})
        trainer = make(folder, tmp_path / str(wanted), config)
        trainer.stretch = Stretch(0, 1)
        assert not traced
        trainer.run(Log())
        states.append(load_checkpoint(tmp_path / str(wanted) / "latest.pkl"))
    assert traced
    plain, compiled = states
    assert compiled["weights"].keys() == plain["weights"].keys()
    for part in ("weights", "average"):
        for key, value in plain[part].items():
            torch.testing.assert_close(compiled[part][key], value, msg=key)
    load_model(compiled)


@pytest.mark.parametrize("share, expected", [(0.0, [False] * 4), (0.5, [False, False, True, True]), (1.0, [True] * 4)])
def test_the_last_epochs_are_calm(folder, tmp_path, share, expected):
    trainer = make(folder, tmp_path, settings(train={"calm_share": share}))
    seen, epoch = [], trainer.loader.epoch
    trainer.loader.epoch = lambda number: seen.append(trainer.loader.dataset.calm) or epoch(number)
    trainer.stretch = Stretch(0, 4)
    trainer.run(Log())
    assert seen == expected


def test_never_calm_is_never(folder, tmp_path):
    """Not in the last epoch of a stretch by the clock either, most of which is beyond its end."""
    trainer = make(folder, tmp_path, settings(train={"calm_share": 0.0}))
    trainer.stretch, trainer.lasted = Stretch(0, 0, minutes=1, elapsed=55), 20.0
    trainer._start_epoch()
    assert not trainer.loader.dataset.calm


def test_a_stretch_makes_one_step_at_least(folder, tmp_path):
    trainer = make(folder, tmp_path, settings())
    trainer.stretch = Stretch(0, 0, minutes=1e-9)
    trainer.run(Log())
    assert trainer.step == 1 and trainer.epoch == 1


def test_a_short_training_ends_calm_too(folder, tmp_path):
    """A tenth of six epochs is an epoch, to the nearest; of four it is none."""
    seen = []
    trainer = make(folder, tmp_path, settings(train={"calm_share": 0.1}))
    for n in (6, 4):
        trainer.stretch = Stretch(0, n)
        for trainer.epoch in range(n):
            trainer._start_epoch()
            seen.append(trainer.loader.dataset.calm)
    assert seen == [False] * 5 + [True] + [False] * 4


def test_a_step_takes_care_of_grouped_convolutions(folder, tmp_path, monkeypatch):
    asked = set()
    monkeypatch.setattr("trainer.grouped_gradients", lambda *args: asked.add(args) or nullcontext())
    trainer = make(folder, tmp_path, settings())
    trainer.stretch = Stretch(0, 1)
    trainer.run(Log())
    assert asked == {(CPU, torch.float32)}


def test_norms_over_processes_want_gpus(monkeypatch):
    train = Train(sync_batchnorm=True)
    model = build_model("unet")
    assert adapt(model, train, CPU) is model
    monkeypatch.setattr(parallel, "world", lambda: 2)
    with pytest.raises(ValueError, match="sync_batchnorm = True: PyTorch has it on GPUs, this is cpu"):
        adapt(model, train, CPU)
    names = list(model.state_dict())
    synced = adapt(model, train, torch.device("cuda"))  # which is not asked for anything yet
    assert any(isinstance(part, nn.SyncBatchNorm) for part in synced.modules())
    assert list(synced.state_dict()) == names


def test_the_statistics_of_norms_are_found():
    model = build_model("unet")
    buffers = dict(model.named_buffers())
    found = norm_statistics(model)
    assert len(found) == sum(name.endswith(("running_mean", "running_var")) for name in buffers) > 0
    assert all(any(value is buffer for buffer in buffers.values()) for value in found)
    assert norm_statistics(build_model("unet", norm="group")) == []


def test_convolutions_are_tuned_for_a_while():
    before = torch.backends.cudnn.benchmark
    with autotuned_convolutions():
        assert torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark == before


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["camunet", "lite_camunet", "colorunet", "dcan", "msdnet", "maskrcnn"])
def test_every_family_trains_and_predicts_on_a_gpu(name, precision, folder, tmp_path):
    device = torch.device("cuda")
    config = settings(default={"width": 64}, param={"model": name})
    loader = make(folder, tmp_path, config).loader
    trainer = Trainer(place(build_model(name), device), loader, config, tmp_path, device, precision)
    trainer.stretch = Stretch(0, 1)
    trainer.run(Log())
    labels = Segmenter([trainer.average], config, device, precision)(np.zeros((50, 70, 3), np.uint8))
    assert labels.shape == (50, 70)


@pytest.mark.gpu
def test_a_gradient_beyond_float16_is_passed_over_on_a_gpu(folder, tmp_path):
    """The scaler finds it, leaves the weights alone and scales less."""
    device = torch.device("cuda")
    config = settings(train={"accumulate": 2})
    loader = make(folder, tmp_path, config).loader
    trainer = Trainer(place(build_model("unet"), device), loader, config, tmp_path, device, torch.float16)
    trainer.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.stretch = Stretch(0, 1)
    trainer.run(Log())
    assert trainer.scaler.get_scale() < 2.0**40
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())
