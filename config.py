"""INI text in, frozen and validated sections out.

Every script reads its settings once, through `load_config`, and hands them down; no other room opens an INI file.
What wins, from the weakest: the defaults below (``config_default.ini`` explains them, a test keeps the two alike),
``config.ini`` of the current folder, ``--config FILE``, ``--set section.key=value``.
"""

from __future__ import annotations

import argparse
import configparser
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

logger = logging.getLogger(__name__)

DEFAULT_FILE = Path(__file__).with_name("config_default.ini")
#: What decides which images a network was trained on.
SPLIT_KEYS = tuple(
    f"dataset.{key}"
    for key in (
        "csv_file", "source", "major_category", "sub_category", "blacklist", "train_source", "train_major_category",
        "train_sub_category", "train_blacklist", "valid_source", "valid_major_category", "valid_sub_category",
        "valid_blacklist", "cv_ratio", "cv_seed", "cv_group", "cv_folds", "cv_fold", "leave_out", "valid_ids",
    )
)  # fmt: skip
#: What a checkpoint knows better than the defaults: how its network wants to see images, and what was tuned for it.
CHECKPOINT_KEYS = (
    "default.width", "param.threshold", "param.threshold_edge", "param.threshold_mark", "param.threshold_distance",
    "param.threshold_color", "pre.channels", "pre.mean", "pre.std", "pre.percentile_low", "pre.percentile_high",
    "pre.stretch", "pre.color_space", "pre.stain_normalize", "pre.nucleus_diameter", "contour.detect",
    "contour.exclusive", "post.min_score",
)  # fmt: skip

T = TypeVar("T")


class Policy(NamedTuple):
    """How images are read, as `image.read_image` takes it."""

    channels: tuple[int, ...] = ()
    percentiles: tuple[float, float] = (0.1, 99.9)
    stretch: bool = False
    color_space: str = "rgb"
    stain_normalize: str = "none"

    @property
    def stored(self) -> Policy:
        """The same, with 8-bit intensities and colours as they are in the file."""
        return Policy(self.channels, self.percentiles)

    @property
    def shown(self) -> Policy:
        """The same, in the colours of a screen."""
        return self._replace(color_space="rgb")


def _split_list(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _weights(value: Any) -> Any:
    """ "HE: 3, IHC: 0.5" -> name -> number."""
    if not isinstance(value, str):
        return value
    pairs = [part.rpartition(":") for part in _split_list(value)]
    lacking = [weight for name, _, weight in pairs if not name.strip()]
    if lacking:
        raise ValueError(f"'{lacking[0].strip()}' has no weight; wanted name: number, as in HE: 3, IHC: 0.5")
    return {name.strip(): weight.strip() for name, _, weight in pairs}


def _parse_json(value: Any) -> Any:
    """A JSON value; nothing is what the default is made of."""
    return (json.loads(value) if value.strip() else None) if isinstance(value, str) else value


def _some_weight(value: tuple[float, ...]) -> tuple[float, ...]:
    if value and not any(value):
        raise ValueError("wanted at least one weight above 0")
    return value


def _truth_as_number(value: Any) -> Any:
    """True is 1 and False 0, as they stood in files before the setting became a number."""
    words = {"true": 1.0, "yes": 1.0, "on": 1.0, "false": 0.0, "no": 0.0, "off": 0.0}
    return words.get(value.strip().lower(), value) if isinstance(value, str) else value


def _freeze_epochs(value: Any) -> Any:
    if isinstance(value, str) and value not in ("auto", "forever") and not value.isdecimal():
        raise ValueError("wanted a number of epochs, auto or forever")
    return value


def _encoder_rate(value: Any) -> Any:
    if isinstance(value, str) and value != "auto":
        try:
            return float(value)
        except ValueError:
            raise ValueError("wanted a number, or auto") from None
    return value


def _empty_to_none(value: Any) -> Any:
    return None if isinstance(value, str) and not value.strip() else value


def _views(value: Any) -> Any:
    """Old files say True or False, new ones name the views."""
    if isinstance(value, str) and value.strip().lower() in {"true", "yes", "on", "1"}:
        return ("flips",)
    if isinstance(value, str) and value.strip().lower() in {"false", "no", "off", "0", "none"}:
        return ()
    return _split_list(value)


Names = Annotated[tuple[str, ...], BeforeValidator(_split_list)]
Weights = Annotated[dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]], BeforeValidator(_weights)]
Views = Annotated[tuple[str, ...], BeforeValidator(_views)]
Channels = Annotated[tuple[int, ...], BeforeValidator(_split_list), Field(max_length=3)]
OptionalTriple = Annotated[tuple[float, float, float] | None, BeforeValidator(_parse_json)]
Options = Annotated[dict[str, Any], BeforeValidator(lambda value: _parse_json(value) or {})]
FreezeEpochs = Annotated[Literal["auto", "forever"] | Annotated[int, Field(ge=0)], BeforeValidator(_freeze_epochs)]
EncoderRate = Annotated[Annotated[float, Field(ge=0)] | Literal["auto"], BeforeValidator(_encoder_rate)]
OptionalBool = Annotated[bool | None, BeforeValidator(_empty_to_none)]
OptionalInt = Annotated[int | None, BeforeValidator(_empty_to_none)]
OptionalPath = Annotated[Path | None, BeforeValidator(_empty_to_none)]
MemberWeights = Annotated[
    tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...],
    BeforeValidator(_split_list),
    AfterValidator(_some_weight),
]
Share = Annotated[float, Field(ge=0, le=1), BeforeValidator(_truth_as_number)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Default(Section):
    width: int = Field(256, ge=16)
    branch_marker: OptionalBool = None
    branch_contour: OptionalBool = None


class Param(Section):
    model: str = "lite_camunet"
    encoder: str = "auto"
    encoder_weights: str = "imagenet"
    freeze_epochs: FreezeEpochs = "auto"
    encoder_rate: EncoderRate = "auto"
    heads: Names = ()
    options: Options = {}
    conv_order: str = "can"
    activation: Literal["relu", "leaky_relu", "elu", "silu"] = "relu"
    norm: Literal["batch", "instance", "group", "none"] = "batch"
    dropout: float = Field(0.0, ge=0, lt=1)
    learn_rate: float = Field(0.002, gt=0)
    weight_map: bool = True
    weight: str = "border"
    threshold: Fraction = 0.5
    threshold_edge: Fraction = 0.5
    threshold_mark: Fraction = 0.5
    threshold_distance: Fraction = 0.5
    threshold_color: Fraction = 0.5
    gcd_depth: OptionalInt = None


class Contour(Section):
    detect: bool = True
    exclusive: bool = False
    precise: bool = False
    adjacent_boundary_only: bool = False
    touching_only: bool = False


class Loss(Section):
    semantic: str = "wbce + dice"
    contour: str = "wbce + dice"
    marker: str = "bce + dice"
    distance: str = "bce + mse"
    color: str = "bce + dice"


class Train(Section):
    n_epoch: int = Field(100, ge=1)
    minutes: float = Field(0, ge=0)
    n_ckpt_epoch: int = Field(10, ge=1)
    n_cv_epoch: int = Field(5, ge=1)
    n_batch: int = Field(6, ge=1)
    n_worker: int = Field(2, ge=0)
    print_freq: int = Field(10, ge=1)
    balance_group: Share = 0.5
    category_weights: Weights = {}
    drawn_share: float = Field(0.4, ge=0, le=1)
    log_name: str = ""
    seed: int = Field(1, ge=0)
    optimizer: Literal["adam", "adamw"] = "adamw"
    weight_decay: float = Field(0.01, ge=0)
    schedule: str = "cosine"
    warm_up: Fraction = 0.1
    calm_share: Fraction = 0.35
    step_epochs: int = Field(300, ge=1)
    step_factor: float = Field(0.3, gt=0, le=1)
    clip_norm: float = Field(1.0, ge=0)
    ema: float = Field(0.998, ge=0, lt=1)
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    n_image_log: int = Field(4, ge=0)
    accumulate: int = Field(1, ge=1)
    teacher: OptionalPath = None
    sync_batchnorm: bool = False
    compile: bool = False


class Valid(Section):
    figure_pos_x: OptionalInt = None
    figure_pos_y: OptionalInt = None
    pred_orig_size: bool = True
    padding: Literal["reflect", "replicate", "black", "white"] = "reflect"
    border: int = Field(32, ge=0)
    tile: int = Field(1024, ge=0)
    tile_overlap: int = Field(0, ge=0)
    slide_size: float = Field(64.0, gt=0)
    slide_block: int = Field(2048, ge=64)
    slide_halo: int = Field(128, ge=1)
    slide_labels: Literal["tif", "zarr"] = "tif"
    view_color_equalize: bool = False
    print_table: bool = False
    test_time_augment: Views = ("flips",)
    ensemble: Literal["avg", "vote"] = "avg"
    ensemble_weights: MemberWeights = ()
    engine: Literal["auto", "torch", "openvino"] = "auto"

    @model_validator(mode="after")
    def _room_in_a_tile(self) -> Valid:
        if self.tile and self.tile <= 2 * self.tile_overlap:
            raise ValueError(f"tile {self.tile} is not above twice tile_overlap {self.tile_overlap}")
        return self

    @property
    def figure_position(self) -> tuple[int, int] | None:
        """Where a figure window opens, (x, y) pixels; None where the system may choose."""
        x, y = self.figure_pos_x, self.figure_pos_y
        return None if x is None and y is None else (x or 0, y or 0)


class Pre(Section):
    mean: OptionalTriple = None
    std: OptionalTriple = None
    channels: Channels = ()
    percentile_low: float = Field(0.1, ge=0, lt=100)
    percentile_high: float = Field(99.9, gt=0, le=100)
    stretch: bool = True
    color_space: Literal["rgb", "lab", "hed", "gray"] = "rgb"
    stain_normalize: Literal["none", "macenko", "reinhard"] = "none"
    label_to_binary: bool = True
    random_crop: bool = True
    flip: bool = True
    rotate: bool = True
    min_scale: float = Field(0.75, gt=0)
    max_scale: float = Field(1.4, gt=0)
    nucleus_diameter: float = Field(28.0, ge=0)
    equal_size: bool = False
    aspect: float = Field(0.25, ge=0, lt=1)
    elastic_distortion: bool = True
    color_invert: bool = True
    color_jitter: bool = True
    color_equalize: bool = False
    gray: bool = True
    color_space_shift: bool = True
    channel_shuffle: bool = True
    paste_nuclei: bool = False
    fade_nuclei: bool = True
    stain_shift: bool = True
    recolor: bool = True
    style_mix: bool = False
    illumination: bool = True
    blur: bool = True
    add_noise: bool = True
    compress: bool = True
    fill_holes: bool = False
    min_object_size: int = Field(0, ge=0)

    @property
    def policy(self) -> Policy:
        """How images are read."""
        percentiles = self.percentile_low, self.percentile_high
        return Policy(self.channels, percentiles, self.stretch, self.color_space, self.stain_normalize)

    @model_validator(mode="after")
    def _ordered(self) -> Pre:
        if self.min_scale > self.max_scale:
            raise ValueError(f"min_scale {self.min_scale} is above max_scale {self.max_scale}")
        if self.percentile_low >= self.percentile_high:
            raise ValueError(
                f"percentile_low {self.percentile_low} is not below percentile_high {self.percentile_high}"
            )
        if any(s <= 0 for s in self.std or ()):
            raise ValueError(f"std {list(self.std or ())} must be positive")
        return self


#: How images are read where nobody says otherwise.
DEFAULT_POLICY = Pre().policy


class Post(Section):
    segmentation: bool = True
    policy: str = "auto"
    marker: str = "auto"
    marker_contour: float = Field(0.0, ge=0)
    min_score: Fraction = 0.5
    min_confidence: Fraction = 0.0
    min_quality: Fraction = 0.25
    seg_ratio: float = Field(0.8, gt=0, le=1)
    seg_scale: float = Field(0.3, gt=0)
    remove_objects: bool = True
    min_object_size: int = Field(12, ge=0)
    min_object_share: Fraction = 0.1
    grow: int = Field(0, ge=0)
    fill_holes: bool = True
    filter_fiber: bool = False


class Dataset(Section):
    csv_file: OptionalPath = None
    source: Names = ()
    major_category: Names = ()
    sub_category: Names = ()
    blacklist: Names = ()
    train_source: Names = ()
    train_major_category: Names = ()
    train_sub_category: Names = ()
    train_blacklist: Names = ()
    valid_source: Names = ()
    valid_major_category: Names = ()
    valid_sub_category: Names = ()
    valid_blacklist: Names = ()
    cv_ratio: float = Field(0.1, ge=0, lt=1)
    cv_seed: int = 1
    cv_group: Literal["patient", "image"] = "patient"
    cv_folds: int = Field(0, ge=0)
    cv_fold: int = Field(1, ge=1)
    leave_out: Names = ()
    valid_ids: OptionalPath = None
    on_bad: Literal["refuse", "skip"] = "refuse"
    cache_dir: OptionalPath = None

    @property
    def divides(self) -> bool:
        """Whether the settings say how to divide data/train, so that a folder data/valid is passed over."""
        return bool(self.valid_ids or self.cv_folds or self.leave_out)

    @model_validator(mode="after")
    def _one_way_to_divide(self) -> Dataset:
        chosen = [name for name in ("valid_ids", "cv_folds", "leave_out") if getattr(self, name)]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} are set, and each says which images validate; keep one")
        if self.cv_folds == 1:
            raise ValueError("cv_folds = 1 leaves nothing to train on; wanted 2 or more, or 0 for none")
        if self.cv_folds and self.cv_fold > self.cv_folds:
            raise ValueError(f"cv_fold = {self.cv_fold} is not among the cv_folds = {self.cv_folds}")
        return self


class Download(Section):
    url: str = "https://data.broadinstitute.org/bbbc/BBBC038/stage1_train.zip"
    sha256: str = Field("", pattern="^([0-9a-fA-F]{64})?$")
    max_files: int = Field(200_000, ge=1)
    max_gigabytes: float = Field(20.0, gt=0)
    max_ratio: float = Field(200.0, gt=1)


#: What checkpoints that do not know a setting were trained with, where that is not its default.
_BEFORE: dict[str, Any] = {
    "pre.nucleus_diameter": 0.0,
    "train.drawn_share": 0.0,
    **dict.fromkeys(("pre.stain_shift", "pre.recolor", "pre.illumination"), False),
}


class Config(Section):
    """All settings of a run.

    Attributes
    ----------
    widths : dict of str to int
        Input size of the networks that have a section of their own.
    user_set : frozenset of str
        ``section.key`` of everything the user chose; the rest may give way to what a checkpoint knows.
    """

    default: Default = Default()
    param: Param = Param()
    contour: Contour = Contour()
    loss: Loss = Loss()
    train: Train = Train()
    valid: Valid = Valid()
    pre: Pre = Pre()
    post: Post = Post()
    dataset: Dataset = Dataset()
    download: Download = Download()
    widths: Mapping[str, int] = {}
    user_set: frozenset[str] = frozenset()

    @property
    def width(self) -> int:
        """Side of the square the network is trained on, in pixels."""
        return self.widths.get(self.param.model, self.default.width)

    @property
    def thresholds(self) -> dict[str, float]:
        """Probability above which a pixel belongs, per head."""
        return {
            "semantic": self.param.threshold,
            "contour": self.param.threshold_edge,
            "marker": self.param.threshold_mark,
            "distance": self.param.threshold_distance,
            "color": self.param.threshold_color,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain nested types only, as a checkpoint holds them."""
        return self.model_dump(mode="json", exclude={"user_set"})

    def inherit(self, saved: Mapping[str, Any], keys: Iterable[str] | None = None) -> Config:
        """This configuration with `keys` (all, where not given) taken from `saved`, except where the user chose.

        Parameters
        ----------
        saved : mapping
            As `to_dict` made it.
        keys : iterable of str, optional
            ``section.key`` each.
        """
        keys = ALL_KEYS if keys is None else tuple(keys)
        dump = self.model_dump()
        for key in keys:
            section, name = key.split(".")
            if key in self.user_set:
                continue
            if name in saved.get(section, {}):
                dump[section][name] = saved[section][name]
            elif section in saved and key in _BEFORE:
                dump[section][name] = _BEFORE[key]
        if "default.width" in keys and not any(key.endswith(".width") for key in self.user_set):
            model = saved["param"]["model"]
            dump["default"]["width"] = saved["widths"].get(model, saved["default"]["width"])
            dump["widths"] = {}
        return Config.model_validate(dump)

    def suggest(self, values: Mapping[str, Any]) -> Config:
        """This configuration with other values, ``section.key`` -> value, except where the user chose."""
        nested: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            section, name = key.split(".")
            nested.setdefault(section, {})[name] = value
        return self.inherit(nested, values)


def look_up(dump: Mapping[str, Any], key: str) -> Any:
    """The value of ``section.key`` in a configuration as nested types."""
    section, name = key.split(".")
    return dump[section][name]


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}
ALL_KEYS = tuple(f"{section}.{key}" for section, model in SECTIONS.items() for key in model.model_fields)
_DEPRECATED = {
    "default.branch_marker": "the heads are a fact of the network now",
    "default.branch_contour": "the heads are a fact of the network now",
    "param.gcd_depth": "the stride is a fact of the network now",
}


def pick(table: Mapping[str, T], name: str, what: str = "name") -> T:
    """Look `name` up in `table`; an unknown name is a ValueError that lists the table and the nearest entry."""
    if name in table:
        return table[name]
    raise ValueError(f"unknown {what} '{name}'{_nearest(name, table)}; there are: {', '.join(table)}")


def load_config(path: str | Path | None = None, overrides: Sequence[str] = (), folder: str | Path = ".") -> Config:
    """Read the layers of settings and validate them.

    Parameters
    ----------
    path : path, optional
        An INI file of the user (``--config``); it must exist.
    overrides : sequence of str
        ``section.key=value`` each (``--set``).
    folder : path
        Where a ``config.ini`` is looked for.

    Raises
    ------
    FileNotFoundError
        `path` does not exist.
    ValueError
        An unknown section or key, or a value of the wrong type; the message names file, section, key and the
        nearest known one.
    """
    layers = [_read_ini(file) for file in (DEFAULT_FILE, Path(folder) / "config.ini") if file.is_file()]
    n_shipped = int(DEFAULT_FILE.is_file())
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"--config {path}: no such file")
        layers.append(_read_ini(Path(path)))
    layers.append(_read_overrides(overrides))
    values: dict[str, dict[str, str]] = {}
    origin: dict[str, str] = {}
    for layer in layers:
        for (section, key), (value, source) in layer.items():
            values.setdefault(section, {})[key] = value
            origin[f"{section}.{key}"] = source
    user_set = frozenset(f"{section}.{key}" for layer in layers[n_shipped:] for section, key in layer)
    for key in sorted(user_set):
        section, _, name = key.rpartition(".")
        if reason := _DEPRECATED.get(key if section in SECTIONS else f"default.{name}"):
            logger.warning("%s: %s is ignored: %s", origin[key], key, reason)
    sections = {name: values.pop(name, {}) for name in SECTIONS}
    widths = {name: keys["width"] for name, keys in values.items() if "width" in keys}
    try:
        return Config.model_validate({**sections, "widths": widths, "user_set": user_set})
    except ValidationError as error:
        raise ValueError(_explain(error, origin)) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options every script shares."""
    parser.add_argument("--config", metavar="FILE", help="settings read over config_default.ini and config.ini")
    parser.add_argument(
        "--set", metavar="SECTION.KEY=VALUE", action="append", default=[], help="one setting; repeatable"
    )
    parser.add_argument("--data", metavar="DIR", type=Path, default=Path("data"), help="data folder (default: data)")
    parser.add_argument(
        "--checkpoint-dir", metavar="DIR", type=Path, default=Path("checkpoint"), help="default: checkpoint"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def edit_ini(text: str, section: str, values: Mapping[str, str]) -> str:
    """Set keys of one section in the text of an INI file and leave every other line, comments too, as it is.

    A key that is there gets the new value where it stands, others come at the end of the section, and a section that
    is missing at the end of the file.
    """
    lines = text.splitlines()
    heads = [i for i, line in enumerate(lines) if re.match(r"\[.+\]", line)] + [len(lines)]
    begin = next((i for i in heads[:-1] if lines[i].startswith(f"[{section}]")), None)
    if begin is None:
        lines += [*([""] if lines else []), f"[{section}]"]
        begin, end = len(lines) - 1, len(lines)
    else:
        end = next(i for i in heads if i > begin)
    body = lines[begin + 1 : end]
    for key, value in values.items():
        place = next((i for i, line in enumerate(body) if re.match(rf"{re.escape(key)}\s*[=:]", line, re.I)), None)
        if place is None:
            place = max((i + 1 for i, line in enumerate(body) if line.strip()), default=0)
            body.insert(place, f"{key} = {value}")
            continue
        comment = re.search(r"\s;.*$", body[place])
        body[place] = f"{key} = {value}" + (comment.group() if comment else "")
        while place + 1 < len(body) and re.match(r"\s+[^\s;#]", body[place + 1]):  # an old value of several lines
            del body[place + 1]
    return "\n".join([*lines[: begin + 1], *body, *lines[end:]]) + "\n"


def _read_ini(path: Path) -> dict[tuple[str, str], tuple[str, str]]:
    # No interpolation (a % is a %), no leaking default section, and a comment behind a value is a comment.
    parser = configparser.ConfigParser(default_section="\0", interpolation=None, inline_comment_prefixes=(";",))
    try:
        parser.read_string(path.read_text(encoding="utf-8-sig"), source=str(path))
    except (configparser.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    layer = {}
    for section in parser.sections():
        for key, value in parser.items(section):
            layer[_known(section, key, str(path))] = (value, str(path))
    return layer


def _read_overrides(overrides: Sequence[str]) -> dict[tuple[str, str], tuple[str, str]]:
    layer = {}
    for text in overrides:
        name, equals, value = text.partition("=")
        section, dot, key = name.strip().partition(".")
        if not (equals and dot):
            raise ValueError(f"--set {text}: wanted section.key=value, such as train.n_epoch=20")
        layer[_known(section, key, f"--set {text}")] = (value.strip(), f"--set {text}")
    return layer


def _known(section: str, key: str, source: str) -> tuple[str, str]:
    """Check one key. A section of another name is a network's own and may hold what [DEFAULT] may."""
    name = "default" if section == "DEFAULT" else section
    fields = SECTIONS.get(name, Default).model_fields
    if key in fields:
        return name, key
    if name not in SECTIONS and (near := _nearest(name, SECTIONS)):
        raise ValueError(f"{source}: unknown section [{section}]{near}")
    elsewhere = [
        f"[{other.replace('default', 'DEFAULT')}] {key}"
        for other, model in SECTIONS.items()
        if key in model.model_fields
    ]
    hint = f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else _nearest(key, fields)
    raise ValueError(f"{source}: unknown key '{key}' in section [{section}]{hint}")


def _nearest(name: str, names: Iterable[str]) -> str:
    near = get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def _explain(error: ValidationError, origin: Mapping[str, str]) -> str:
    """The first complaint of pydantic, with the place the value came from."""
    first = error.errors()[0]
    section, *rest = (str(part) for part in first["loc"])
    key = rest[0] if rest else ""
    if section == "widths":
        section, key = key, "width"
    message = first["msg"].removeprefix("Value error, ")
    if not key:
        return f"[{section}]: {message}"
    return f"{origin.get(f'{section}.{key}', 'defaults')}: [{section}] {key} = {first['input']}: {message}"
