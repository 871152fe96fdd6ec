"""The config room: layers, validation, messages that help, and what a checkpoint may add."""

from __future__ import annotations

import argparse
import configparser
import json
import logging
from pathlib import Path

import pytest
from pydantic import ValidationError

from config import (
    CHECKPOINT_KEYS,
    DEFAULT_FILE,
    SECTIONS,
    SPLIT_KEYS,
    Config,
    add_arguments,
    edit_ini,
    load_config,
    pick,
)

#: Settings of old files, with a value other than the default and what becomes of it.
OLD_KEYS = {
    "DEFAULT": {"width": ("512", 512)},
    "param": {
        "model": ("unet", "unet"),
        "learn_rate": ("1e-4", 1e-4),
        "weight_map": ("false", False),
        "threshold": ("0.4", 0.4),
        "threshold_edge": ("0.3", 0.3),
        "threshold_mark": ("0.2", 0.2),
        "encoder": ("timm/convnext_tiny", "timm/convnext_tiny"),
        "encoder_weights": ("none", "none"),
        "freeze_epochs": ("3", 3),
        "encoder_rate": ("0.1", 0.1),
        "heads": ("semantic, color", ("semantic", "color")),
        "options": ('{"depth": 80}', {"depth": 80}),
    },
    "contour": {
        "detect": ("no", False),
        "exclusive": ("yes", True),
        "precise": ("True", True),
        "adjacent_boundary_only": ("on", True),
        "touching_only": ("on", True),
    },
    "train": {
        "n_epoch": ("7", 7),
        "n_ckpt_epoch": ("3", 3),
        "n_cv_epoch": ("2", 2),
        "n_batch": ("4", 4),
        "n_worker": ("0", 0),
        "print_freq": ("1", 1),
        "balance_group": ("True", 1.0),
        "category_weights": ("HE: 3, Purple tissue: 0.5", {"HE": 3.0, "Purple tissue": 0.5}),
        "log_name": ("first", "first"),
    },
    "valid": {
        "figure_pos_x": ("30", 30),
        "figure_pos_y": ("-5", -5),
        "pred_orig_size": ("False", False),
        "view_color_equalize": ("True", True),
        "print_table": ("True", True),
        "test_time_augment": ("False", ()),
        "ensemble": ("vote", "vote"),
    },
    "pre": {
        "mean": ("[0.1, 0.2, 0.3]", (0.1, 0.2, 0.3)),
        "std": ("[1, 2, 3]", (1.0, 2.0, 3.0)),
        "label_to_binary": ("False", False),
        "color_invert": ("True", True),
        "color_jitter": ("False", False),
        "elastic_distortion": ("False", False),
        "color_equalize": ("True", True),
        "min_scale": ("0.8", 0.8),
        "max_scale": ("1.2", 1.2),
        "fill_holes": ("True", True),
        "min_object_size": ("9", 9),
        "add_noise": ("True", True),
        "channel_shuffle": ("False", False),
    },
    "post": {
        "segmentation": ("False", False),
        "policy": ("rw", "rw"),
        "seg_ratio": ("0.5", 0.5),
        "seg_scale": ("0.7", 0.7),
        "remove_objects": ("False", False),
        "fill_holes": ("False", False),
        "min_object_size": ("20", 20),
        "filter_fiber": ("True", True),
    },
    "dataset": {
        "csv_file": ("stage1.csv", "stage1.csv"),
        "source": ("Kaggle, TCGA", ("Kaggle", "TCGA")),
        "major_category": ("Histology", ("Histology",)),
        "sub_category": ("HE,Purple tissue", ("HE", "Purple tissue")),
        "cv_ratio": ("0", 0.0),
        "cv_seed": ("5", 5),
        "blacklist": ("noisy.txt, 0a7d", ("noisy.txt", "0a7d")),
        "valid_sub_category": ("HE", ("HE",)),
    },
}
ALL_OLD_KEYS = [(section, key, *pair) for section, keys in OLD_KEYS.items() for key, pair in keys.items()]


@pytest.fixture
def load(tmp_path):
    """Reads INI text as ``--config``, with `overrides`, in a folder that has no config.ini."""

    def read(text="", overrides=()):
        file = tmp_path / "mine.ini"
        file.write_text(text, encoding="utf-8")
        return load_config(file, overrides, folder=tmp_path)

    return read


# The shipped file


def shipped_keys():
    """(line number, section, key) of each setting in the shipped file, read by eye rather than by configparser."""
    section, found = "", []
    for number, line in enumerate(DEFAULT_FILE.read_text(encoding="utf-8").splitlines()):
        if line.startswith("["):
            section = line.strip("[] ")
        elif "=" in line and not line.startswith(";"):
            found.append((number, section, line.split("=")[0].strip()))
    return found


def test_shipped_file_and_defaults_are_alike(load):
    assert load().to_dict() == Config().to_dict()
    assert load().user_set == frozenset()


def test_shipped_file_has_every_key_once_and_no_other():
    expected = [
        ("DEFAULT" if name == "default" else name, key)
        for name, model in SECTIONS.items()
        for key in model.model_fields
    ]
    assert sorted((section, key) for _, section, key in shipped_keys()) == sorted(expected)


def test_every_shipped_key_has_a_comment_right_above():
    lines = DEFAULT_FILE.read_text(encoding="utf-8").splitlines()
    bare = [f"[{section}] {key}" for number, section, key in shipped_keys() if not lines[number - 1].startswith("; ")]
    assert not bare


# Layers


def test_layers_override_in_order(tmp_path):
    (tmp_path / "config.ini").write_text("[train]\nn_epoch = 2\nn_batch = 2\nn_worker = 9\n")
    (tmp_path / "mine.ini").write_text("[train]\nn_epoch = 3\nn_batch = 3\n")
    config = load_config(tmp_path / "mine.ini", ["train.n_epoch=4"], folder=tmp_path)
    assert (config.train.n_epoch, config.train.n_batch, config.train.n_worker) == (4, 3, 9)
    assert config.train.print_freq == Config().train.print_freq
    assert config.user_set == {"train.n_epoch", "train.n_batch", "train.n_worker"}


def test_the_last_override_wins(load):
    assert load("", ["train.n_epoch=4", "train.n_epoch = 5"]).train.n_epoch == 5


def test_an_override_may_hold_an_equals_sign(load):
    assert load("", ["train.log_name=lr=0.1"]).train.log_name == "lr=0.1"


def test_config_ini_is_looked_for_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "config.ini").write_text("[train]\nn_epoch = 2\n")
    monkeypatch.chdir(tmp_path)
    assert load_config().train.n_epoch == 2


def test_a_missing_config_file_is_an_error_not_silence(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.ini"):
        load_config(tmp_path / "absent.ini", folder=tmp_path)


def test_arguments_feed_the_layers(load):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["--set", "train.n_epoch=3", "--set", "param.model=unet"])
    config = load("", args.set)
    assert (config.train.n_epoch, config.param.model) == (3, "unet")
    assert (str(args.data), str(args.checkpoint_dir), args.config) == ("data", "checkpoint", None)


# Traps of the INI format


def test_default_section_does_not_leak(load):
    config = load("[DEFAULT]\nwidth = 64\n[train]\nn_epoch = 2\n[param]\nmodel = unet\n[pre]\nflip = no\n")
    assert config.width == 64
    assert config.user_set == {"default.width", "train.n_epoch", "param.model", "pre.flip"}
    assert config.widths == {}


@pytest.mark.parametrize(
    ("written", "read"),
    [("run ; the first", "run"), ("100% sure", "100% sure"), ("%(width)s", "%(width)s"), ("a;b", "a;b"), ("", "")],
)
def test_comments_go_and_percent_signs_stay(load, written, read):
    assert load(f"; above\n[train]\nlog_name = {written}\n# below\n").train.log_name == read


def test_a_byte_order_mark_is_no_part_of_the_first_section(tmp_path):
    (tmp_path / "mine.ini").write_bytes(b"\xef\xbb\xbf[train]\r\nn_epoch = 3\r\n")
    assert load_config(tmp_path / "mine.ini", folder=tmp_path).train.n_epoch == 3


def test_lists_and_empty_values(load):
    config = load("[pre]\nchannels = 2, 0\n[dataset]\nsource = A , B,\ncsv_file =\n[valid]\nfigure_pos_x =\n")
    assert config.pre.channels == (2, 0)
    assert config.dataset.source == ("A", "B")
    assert config.dataset.csv_file is None and config.valid.figure_pos_x is None


@pytest.mark.parametrize(
    ("written", "views"),
    [("True", ("flips",)), ("False", ()), ("none", ()), ("", ()), ("rotations", ("rotations",)), ("a, b", ("a", "b"))],
)
def test_views_take_the_old_switch_and_the_new_names(load, written, views):
    assert load(f"[valid]\ntest_time_augment = {written}\n").valid.test_time_augment == views


# Errors


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("[train]\nn_epohc = 3", ["mine.ini", "[train]", "n_epohc", "'n_epoch'"]),
        ("[trian]\nn_epoch = 3", ["mine.ini", "[trian]", "'train'"]),
        ("[unet]\nwidht = 64", ["mine.ini", "[unet]", "widht", "'width'"]),
        ("[post]\ncolor_jitter = no", ["mine.ini", "[post]", "color_jitter", "[pre]"]),
        ("[train]\nn_epoch = three", ["mine.ini", "[train]", "n_epoch", "three", "integer"]),
        ("[train]\nn_epoch = 2.5", ["mine.ini", "[train]", "n_epoch", "2.5", "integer"]),
        ("[train]\nn_epoch = 0", ["mine.ini", "[train]", "n_epoch", "0", "greater"]),
        ("[contour]\ndetect = maybe", ["mine.ini", "[contour]", "detect", "maybe", "boolean"]),
        ("[param]\nfreeze_epochs = soon", ["mine.ini", "[param]", "freeze_epochs", "soon", "epochs, auto or forever"]),
        ("[param]\nencoder_rate = slow", ["mine.ini", "[param]", "encoder_rate", "slow", "number, or auto"]),
        ("[param]\nencoder_rate = -1", ["mine.ini", "[param]", "encoder_rate", "-1", "greater"]),
        ("[param]\nthreshold = 1.5", ["mine.ini", "[param]", "threshold", "1.5"]),
        ("[param]\nthreshold = nan", ["mine.ini", "[param]", "threshold", "nan"]),
        ("[valid]\nensemble = mean", ["mine.ini", "[valid]", "ensemble", "mean", "'vote'"]),
        ("[pre]\nmean = [0.5, 0.5", ["mine.ini", "[pre]", "mean"]),
        ("[pre]\nmean = [0.5, 0.5]", ["mine.ini", "[pre]", "mean"]),
        ("[pre]\nstd = [0, 1, 1]", ["[pre]", "std"]),
        ("[pre]\nchannels = 0, 1, 2, 3", ["mine.ini", "[pre]", "channels"]),
        ("[pre]\nmin_scale = 3", ["[pre]", "min_scale", "3.0", "max_scale"]),
        ("[pre]\npercentile_low = 99.95", ["[pre]", "percentile_low", "percentile_high"]),
        ("[train]\ncategory_weights = HE", ["mine.ini", "[train]", "category_weights", "'HE' has no weight", "HE: 3"]),
        ("[train]\ncategory_weights = HE: much", ["mine.ini", "[train]", "category_weights", "much", "number"]),
        ("[train]\ncategory_weights = HE: -1", ["mine.ini", "[train]", "category_weights", "-1", "greater"]),
        ("[dataset]\ncv_folds = 1", ["[dataset]", "cv_folds = 1", "2 or more"]),
        ("[dataset]\ncv_folds = 3\ncv_fold = 4", ["[dataset]", "cv_fold = 4", "cv_folds = 3"]),
        ("[dataset]\ncv_folds = 3\nleave_out = HE", ["[dataset]", "cv_folds and leave_out", "keep one"]),
        ("[unet]\nwidth = big", ["mine.ini", "[unet]", "width", "big"]),
        ("[train]\nn_epoch = 3\nn_epoch = 4", ["mine.ini", "n_epoch", "already exists"]),
        ("n_epoch = 3", ["mine.ini", "section"]),
    ],
)
def test_an_error_names_file_section_key_and_the_nearest(load, text, facts):
    with pytest.raises(ValueError) as caught:
        load(text)
    assert not isinstance(caught.value, ValidationError)
    message = str(caught.value)
    assert "\n" not in message
    assert [fact for fact in facts if fact not in message] == []


@pytest.mark.parametrize(
    ("override", "facts"),
    [
        ("train.n_epohc=3", ["--set train.n_epohc=3", "[train]", "'n_epoch'"]),
        ("train.n_epoch=x", ["--set train.n_epoch=x", "integer"]),
        ("train.n_epoch", ["--set train.n_epoch", "section.key=value"]),
        ("n_epoch=3", ["--set n_epoch=3", "section.key=value"]),
    ],
)
def test_an_error_names_the_override(load, override, facts):
    with pytest.raises(ValueError) as caught:
        load("[train]\nn_epoch = 2\n", [override])
    assert [fact for fact in facts if fact not in str(caught.value)] == []


def test_pick_names_the_table_and_the_nearest():
    table = {"ws": 1, "rw": 2, "watershed": 3}
    assert pick(table, "rw") == 2
    with pytest.raises(ValueError, match="unknown policy 'watershet'; did you mean 'watershed'.*ws, rw, watershed"):
        pick(table, "watershet", "policy")
    with pytest.raises(ValueError, match="unknown name 'zzz'; there are: ws, rw, watershed"):
        pick(table, "zzz")


# Old files


@pytest.mark.parametrize(("section", "key", "written", "value"), ALL_OLD_KEYS)
def test_old_keys_are_understood(load, section, key, written, value):
    found = getattr(getattr(load(f"[{section}]\n{key} = {written}\n"), section.lower()), key)
    assert (str(found) if key == "csv_file" else found) == value


def test_an_old_file_is_read_whole_without_a_word(tmp_path, caplog):
    parser = configparser.RawConfigParser()
    parser.read_dict({s: {key: written for key, (written, _) in keys.items()} for s, keys in OLD_KEYS.items()})
    with open(tmp_path / "config.ini", "w") as file:
        parser.write(file)
    config = load_config(folder=tmp_path)
    assert len(config.user_set) == len(ALL_OLD_KEYS)
    assert not caplog.records


@pytest.mark.parametrize(
    ("section", "key", "written"),
    [
        ("DEFAULT", "branch_marker", "True"),
        ("DEFAULT", "branch_contour", "False"),
        ("caunet", "branch_contour", "True"),
        ("param", "gcd_depth", "4"),
    ],
)
def test_what_is_a_fact_of_the_network_now_is_warned_about(load, caplog, section, key, written):
    with caplog.at_level(logging.WARNING):
        load(f"[{section}]\n{key} = {written}\n")
    assert len(caplog.records) == 1
    assert all(fact in caplog.text for fact in ("mine.ini", key, "ignored"))


def test_the_shipped_file_warns_of_nothing(load, caplog):
    load()
    assert not caplog.records


# What comes out


def test_the_section_of_a_network_overrides_width(load):
    text = "[DEFAULT]\nwidth = 128\n[unet]\nwidth = 64\n"
    assert load(text).width == 128
    assert load(text, ["param.model=unet"]).width == 64
    assert load(text, ["param.model=unet", "unet.width=32"]).width == 32


def test_thresholds_by_head(load):
    names = {"semantic": "", "contour": "_edge", "marker": "_mark", "distance": "_distance", "color": "_color"}
    expected = {head: 0.1 * i for i, head in enumerate(names)}
    config = load("[param]\n" + "".join(f"threshold{names[head]} = {value}\n" for head, value in expected.items()))
    assert config.thresholds == expected


def test_sections_are_frozen(load):
    config = load()
    with pytest.raises(ValidationError, match="frozen"):
        config.train.n_epoch = 3
    with pytest.raises(ValidationError, match="frozen"):
        config.train = config.train


def test_plain_form_goes_through_json_and_back(load):
    text = "[pre]\nmean = [0.1, 0.2, 0.3]\n[dataset]\ncsv_file = a.csv\nsource = A, B\n[unet]\nwidth = 64\n"
    config = load(text, ["valid.figure_pos_x=3"])
    plain = config.to_dict()
    assert "user_set" not in plain
    back = Config.model_validate(json.loads(json.dumps(plain)))
    assert back == config.model_copy(update={"user_set": frozenset()})


def test_user_beats_checkpoint_beats_default(load):
    text = "[param]\nthreshold = 0.7\nthreshold_edge = 0.6\n[train]\nn_epoch = 3\n"
    text += "[pre]\nstretch = no\ncolor_space = hed\nstain_normalize = macenko\n"
    saved = load(text).to_dict()
    config = load("[param]\nthreshold = 0.2\n").inherit(saved, CHECKPOINT_KEYS)
    assert config.param.threshold == 0.2
    assert config.param.threshold_edge == 0.6
    assert config.pre.stretch is False
    assert (config.pre.color_space, config.pre.stain_normalize) == ("hed", "macenko")
    assert config.param.threshold_mark == Config().param.threshold_mark
    assert config.train.n_epoch == Config().train.n_epoch  # no fact of the network
    assert config.user_set == {"param.threshold"}


def test_without_keys_all_is_inherited(load):
    saved = load(
        "[train]\nn_epoch = 3\n[dataset]\nvalid_ids = ids.txt\n[unet]\nwidth = 64\n[param]\nmodel = unet\n"
    ).to_dict()
    config = load("[param]\nthreshold = 0.2\n").inherit(saved)
    assert config.train.n_epoch == 3 and config.dataset.valid_ids == Path("ids.txt")
    assert config.param.threshold == 0.2
    assert config.width == 64
    assert load("[DEFAULT]\nwidth = 128\n").inherit(saved).width == 128


def test_a_user_who_chose_the_default_is_heard(load):
    saved = load("[param]\nthreshold = 0.7\n").to_dict()
    assert load("[param]\nthreshold = 0.5\n").inherit(saved).param.threshold == 0.5


def test_an_old_checkpoint_may_lack_keys(load):
    config = load().inherit({"param": {"threshold": 0.7}}, keys=("param.threshold", "param.threshold_edge", "pre.flip"))
    assert config.param.threshold == 0.7
    assert config.model_dump(exclude={"param"}) == load().model_dump(exclude={"param"})


def test_a_checkpoint_keeps_all_that_decides_its_split():
    """A key that is forgotten here would let a resumed run train on its validation images."""
    wanted = {f"dataset.{key}" for key in SECTIONS["dataset"].model_fields} - {"dataset.on_bad", "dataset.cache_dir"}
    assert set(SPLIT_KEYS) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "[pre]\nmean = 1\n"),
        ("[train]\nn_epoch = 3\n", "[train]\nn_epoch = 3\n\n[pre]\nmean = 1\n"),
        ("[pre]\n; mean = 7\nmean = 2 ; y\n[post]\nmean = 5\n", "[pre]\n; mean = 7\nmean = 1 ; y\n[post]\nmean = 5\n"),
        ("[pre]\nflip = True\n\n[post]\n", "[pre]\nflip = True\nmean = 1\n\n[post]\n"),
        ("[pre]\nMean: [0.5,\n  0.5,\n  0.5]\n; kept\n", "[pre]\nmean = 1\n; kept\n"),
    ],
)  # fmt: skip
def test_edit_ini_changes_one_value_and_no_other_line(text, wanted):
    assert edit_ini(text, "pre", {"mean": "1"}) == wanted
    assert edit_ini(wanted, "pre", {"mean": "1"}) == wanted


def test_a_checkpoint_from_before_a_setting_keeps_what_it_was_trained_with():
    saved = Config().to_dict()
    del saved["pre"]["nucleus_diameter"], saved["pre"]["recolor"]
    assert Config().inherit(saved).pre.nucleus_diameter == 0
    assert not Config().inherit(saved).pre.recolor
    asked = Config(user_set=frozenset({"pre.recolor"}))
    assert asked.inherit(saved).pre.recolor
    assert Config().suggest({"param.threshold": 0.3}).pre.nucleus_diameter == Config().pre.nucleus_diameter
