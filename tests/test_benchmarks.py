"""The table of ratios: what it says of a row, and that the contenders of cheap rows agree. Nothing is timed here."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks import (
    agree,
    inputs,
    label_rows,
    plain,
    prediction_rows,
    reading_rows,
    sample_rows,
    separation_rows,
    table,
    training_rows,
)
from benchmarks.machine import Machine
from benchmarks.row import Floor, Row, measure, optional
from config import load_config

MACHINE = Machine(1, 1e9, {torch.float32: 1e9, torch.bfloat16: 1e9})


def row(**changes) -> Row:
    def job():
        return [1, 2]

    given = {"plain": job, "ours": job, "agree": agree.equal, "wanted": 0.0, "floor": Floor(), "rounds": 1}
    return Row("some work", **{**given, **changes})


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Two images of each of two shapes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "DRAWN", {(256, 256): 2, (256, 320): 2})
        patch.delenv("NUCLEI_DATA", raising=False)
        yield inputs.open_inputs(tmp_path_factory.mktemp("bench"), MACHINE)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (reading_rows, "decode"),
        (reading_rows, "cache"),
        (sample_rows, "targets"),
        (sample_rows, "sample"),
        (separation_rows, "walker"),
        (separation_rows, "watershed"),
        (label_rows, "precision"),
        (label_rows, "runlength"),
    ],
)
def test_contenders_agree(drawn, module, name):
    made = getattr(module, name)(drawn)
    shares = [made.agree(made.plain(), made.ours())]
    assert min(shares) >= made.same
    assert made.floor.seconds(MACHINE) > 0


@pytest.mark.parametrize(
    ("module", "name"), [(training_rows, "step"), (training_rows, "rate"), (prediction_rows, "predict")]
)
def test_contenders_with_networks_agree(tmp_path, monkeypatch, module, name):
    monkeypatch.setattr(inputs, "DRAWN", {(64, 80): 2})
    monkeypatch.delenv("NUCLEI_DATA", raising=False)
    few = inputs.open_inputs(tmp_path, MACHINE)
    few.__dict__["config"] = load_config(overrides=["train.n_batch=1", "DEFAULT.width=32"], folder=tmp_path)
    made = getattr(module, name)(few)
    assert made.agree(made.plain(), made.ours()) >= made.same
    assert made.floor.seconds(MACHINE) > 0


def test_contenders_take_turns():
    calls = []
    made = row(
        plain=lambda: calls.append("plain"),
        ours=lambda: calls.append("ours"),
        libraries={"there": lambda: calls.append("there"), "missing": None},
        rounds=2,
    )
    found = measure("name", made, MACHINE, least=0)
    assert calls == ["plain", "there", "ours"] * 2
    assert found.best_library == "there"
    assert not found.failures or "there" in found.failures[0]


def test_what_is_not_as_wanted_is_named():
    result = measure("name", row(wanted=1e9), MACHINE, least=0)
    assert len(result.failures) == 1 and "wanted 1e+09" in result.failures[0]
    result = measure("name", row(plain=lambda: [1, 3]), MACHINE, least=0)
    assert result.failures == ["name: 0.000 % as plain has it, wanted 100"]


def test_a_missing_library_is_said_and_not_asked_for():
    made = row(libraries={"fastest": optional("no_such_module", lambda module: module.run)})
    result = measure("name", made, MACHINE, least=0)
    assert not result.failures
    assert "no fastest" in table.format_result(result)


def test_the_table_ends_with_one_where_something_falls_short(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(table, "ROWS", {"good": lambda inputs: row(), "bad": lambda inputs: row(wanted=1e9)})
    monkeypatch.setattr(table, "measure_machine", lambda cores: MACHINE)
    monkeypatch.setattr(table, "open_inputs", lambda folder, machine: "nothing")
    monkeypatch.setattr(table, "prepare_process", lambda: None)
    assert table.run_rows(["good"]) == 0
    assert table.run_rows(["good", "bad"], to=tmp_path / "table.json") == 1
    assert [each["row"] for each in json.loads((tmp_path / "table.json").read_text())] == ["good", "bad"]
    assert "bad: " in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "text"), [(12.34, "12.3 s"), (0.0123, "12.3 ms"), (12.3e-6, "12.3 us")])
def test_seconds_in_their_unit(seconds, text):
    assert table.format_seconds(seconds) == text


def test_floors_are_the_slower_of_bytes_and_operations():
    assert Floor(n_bytes=2e9, n_operations=1e9).seconds(MACHINE) == 2
    assert Floor(n_bytes=1e9, n_operations=3e9, dtype=torch.bfloat16).seconds(MACHINE) == 3


def test_same_pieces_does_not_mind_numbers():
    a = np.array([[1, 1, 2, 2, 0, 3]])
    assert agree.same_pieces(a, np.array([[7, 7, 4, 4, 0, 1]])) == 1
    assert agree.same_pieces(a, np.array([[7, 7, 7, 7, 0, 1]])) == 3 / 5
    assert agree.same_pieces(a, 0 * a) == 0 and agree.same_pieces(0 * a, 0 * a) == 1


def test_the_plain_walker_minds_lone_pixels():
    """scikit-image shifts its answer by each; found on a real image."""
    mask = np.zeros((5, 12), bool)
    mask[0, 0] = mask[2:4, 1:11] = True
    markers = np.zeros(mask.shape, np.int32)
    markers[0, 0], markers[2:4, 1], markers[2:4, 10] = 1, 2, 3
    expected = np.where(mask, 2, 0)
    expected[:, 6:] *= 3
    expected[:, 6:] //= 2
    expected[0, 0] = 1
    assert np.array_equal(plain.walk(np.where(mask, 0.9, 0.1).astype(np.float32), mask, markers), expected)


def test_one_marker_has_all_of_the_mask_by_the_plain_walker():
    mask = np.zeros((12, 16), bool)
    mask[2:10, 3:14] = True
    markers = np.zeros(mask.shape, np.int32)
    markers[5:7, 6:9] = 7
    assert np.array_equal(plain.walk(mask.astype(np.float32), mask, markers), 7 * mask)
