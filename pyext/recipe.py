"""The recipe of a press run: a YAML file checked against these models, with errors that name file, line and key."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn
from torch.utils.data import DataLoader

__all__ = ["CompressPass", "DataSection", "PruneChannels", "Recipe", "RecipeError", "TrainSection", "load_recipe"]

Fraction = Annotated[float, Field(ge=0, le=1)]
Peer = Literal["eager", "channels_last", "compile", "emitted"]


LARGEST = 1 << 18
"""Bytes of a recipe file."""
MOST_VALUES, LONGEST_VALUE = 10_000, 4_000


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the file, the line and the key."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSection(_Section):
    """Where images come from: `digits`, or a folder with a sub-folder of images for each class."""

    source: str = "digits"
    test_folder: Path | None = None
    """Images to test on; without it, `test_fraction` of those in the source folder."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    image_size: Annotated[int, Field(ge=1)] = 32
    batch_size: Annotated[int, Field(ge=1)] = 64
    workers: Annotated[int, Field(ge=0)] = 0
    shift: Annotated[int, Field(ge=0)] = 0
    """Training images are moved by up to this many pixels."""


class ModelSection(_Section):
    """A network of `kernelpress.models` by name; classes and input channels follow from the data unless given."""

    name: str
    options: dict[str, Any] = {}
    weights: Path | None = None
    """A safetensors file to start from."""


class TrainSection(_Section):
    """Settings of `kernelpress.compress.finetune`."""

    epochs: Annotated[int, Field(ge=0)]
    lr: Annotated[float, Field(gt=0)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0


class PruneChannels(_Section):
    """`kernelpress.compress.prune_channels`; `ratio` is the share of FLOPs to remove."""

    ratio: Annotated[float, Field(gt=0, lt=1)]
    criterion: Literal["l1", "l2"] = "l2"
    round_to: Annotated[int, Field(ge=1)] = 8

    def apply(self, model: nn.Module, example_inputs: tuple[Tensor, ...], loader: DataLoader[Any]) -> nn.Module:
        """The pruned model; `model` stays as it is."""
        from kernelpress import compress

        return compress.prune_channels(model, example_inputs, **self.model_dump())


class CompressPass(_Section):
    """One compression pass: exactly one of these keys. A new pass is a new key here."""

    prune_channels: PruneChannels | None = None

    @model_validator(mode="after")
    def _is_one(self) -> CompressPass:
        if len(self._given()) != 1:
            raise ValueError(f"expected one pass per list item, got {', '.join(self._given()) or 'none'}")
        return self

    def _given(self) -> dict[str, PruneChannels]:
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}

    @property
    def name(self) -> str:
        """The key that was given."""
        return next(iter(self._given()))

    def apply(self, model: nn.Module, example_inputs: tuple[Tensor, ...], loader: DataLoader[Any]) -> nn.Module:
        """The compressed model; `model` stays as it is."""
        return self._given()[self.name].apply(model, example_inputs, loader)


class EmitSection(_Section):
    """What the pressed model is emitted and measured for."""

    batch: Annotated[int, Field(ge=1)] = 1
    threads: Annotated[int, Field(ge=1)] | None = None
    """Torch's number of threads; as it is unless given."""


class MeasureSection(_Section):
    """How contestants are measured: the dense model in these ways, and the pressed one."""

    rounds: Annotated[int, Field(ge=1)] = 5
    budget_seconds: Annotated[float, Field(gt=0)] = 1.0
    peers: tuple[Peer, ...] = get_args(Peer)

    @model_validator(mode="after")
    def _has_baseline(self) -> MeasureSection:
        if "eager" not in self.peers:
            raise ValueError("peers: expected eager among them, the dense model as it stands")
        return self


class RequireSection(_Section):
    """What the run must reach, or fail."""

    min_accuracy: Fraction | None = None
    """Test accuracy of the dense model."""
    max_drop: Fraction | None = None
    """Accuracy lost between the dense and the pressed model, as a fraction: 0.01 is one point."""
    min_flops_ratio: Annotated[float, Field(ge=1)] | None = None
    """FLOPs of the dense model ÷ those of the pressed one."""
    faster_than_baseline: Annotated[float, Field(gt=0)] | bool = False
    """Lower latency than the dense model's fastest way in PyTorch; a number asks for at least that speed-up."""


class Recipe(_Section):
    """A whole run: train → compress → finetune → emit → measure → report."""

    title: str = ""
    seed: int = 0
    data: DataSection = DataSection()
    model: ModelSection
    train: TrainSection | None = None
    compress: tuple[CompressPass, ...] = ()
    finetune: TrainSection | None = None
    emit: EmitSection = EmitSection()
    measure: MeasureSection = MeasureSection()
    require: RequireSection = RequireSection()
    output: Path = Path("results/press")

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, raw: Any) -> Any:
        """`data: digits` and `model: resnet20` stand for their mappings."""
        if not isinstance(raw, dict):
            return raw
        forms = {"data": "source", "model": "name"}
        return {**raw, **{key: {forms[key]: raw[key]} for key in forms if isinstance(raw.get(key), str)}}

    @model_validator(mode="after")
    def _has_weights(self) -> Recipe:
        if self.model.weights is None and (self.train is None or self.train.epochs == 0):
            raise ValueError("train: expected this section with epochs above zero, or model.weights to start from")
        return self


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read and check a recipe.

    Raises `RecipeError` for a file that is missing or is no YAML, an unknown or duplicate key, a value not allowed.
    """
    file = Path(path)
    try:
        with file.open("rb") as stream:
            content = stream.read(LARGEST + 1)
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(f"{file}: the recipe cannot be read: {reason}") from error
    if len(content) > LARGEST:
        raise RecipeError(f"{file}: expected a recipe of at most {LARGEST} bytes, got more")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_size(node, file)
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}" if mark else str(file)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{place}: this is not YAML: {problem}") from error
    except RecipeError:
        raise
    except (ValueError, TypeError, AttributeError, ArithmeticError, LookupError, RecursionError) as error:
        # Dates that no calendar has, numbers without end, nests without bottom.
        raise RecipeError(f"{file}: this is not YAML as recipes use it: {error}") from error
    if not isinstance(raw, dict):
        kind = "nothing" if raw is None else type(raw).__name__
        raise RecipeError(f"{file}: expected a mapping with the keys {', '.join(Recipe.model_fields)}, got {kind}")
    lines = _lines(node, file)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(detail, lines, file) for detail in error.errors())) from error


def _check_size(node: yaml.Node | None, file: Path) -> None:
    """Raises `RecipeError` for a recipe of too many values once its aliases are written out, or of too long ones."""
    sizes: dict[int, int] = {}

    def size_of(node: yaml.Node, above: tuple[int, ...]) -> int:
        line = node.start_mark.line + 1
        if id(node) in above or len(above) > 20:
            raise RecipeError(f"{file}:{line}: expected a nest of at most 20 levels")
        if id(node) not in sizes:
            parts = node.value if isinstance(node, yaml.CollectionNode) else ()
            flat = [part for item in parts for part in (item if isinstance(item, tuple) else (item,))]
            sizes[id(node)] = 1 + sum(size_of(part, (*above, id(node))) for part in flat)
        if sizes[id(node)] > MOST_VALUES or (isinstance(node, yaml.ScalarNode) and len(node.value) > LONGEST_VALUE):
            raise RecipeError(
                f"{file}:{line}: expected at most {MOST_VALUES} values, aliases written out, "
                f"of {LONGEST_VALUE} characters"
            )
        return sizes[id(node)]

    if node is not None:
        size_of(node, ())


def _lines(node: yaml.Node | None, file: Path, at: tuple[str | int, ...] = ()) -> dict[tuple[str | int, ...], int]:
    """Line number of every key and list item below `node`."""
    lines: dict[tuple[str | int, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            place = (*at, str(key.value))
            line = key.start_mark.line + 1
            if place in lines:
                raise RecipeError(f"{file}:{line}: {_dotted(place)}: this key stands twice")
            lines[place] = line
            lines |= _lines(value, file, place)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            place = (*at, index)
            lines[place] = value.start_mark.line + 1
            lines |= _lines(value, file, place)
    return lines


def _dotted(place: tuple[str | int, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")


def _suggestion(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def _known_keys(place: tuple[str | int, ...]) -> list[str]:
    """The keys allowed beside `place`."""
    section: type[BaseModel] = Recipe
    for part in place[:-1]:
        if isinstance(part, str):
            section = _section_in(section.model_fields[part].annotation) or section
    return list(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation such as `tuple[Section, ...]` or `Section | None` speaks of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part)) is not None), None)


def _explain(detail: Mapping[str, Any], lines: Mapping[tuple[str | int, ...], int], file: Path) -> str:
    """One line for one of pydantic's errors."""
    place: tuple[str | int, ...] = tuple(detail["loc"])
    while place and place not in lines and detail["type"] != "missing":
        place = place[:-1]
    line = next((lines[place[:n]] for n in range(len(place), 0, -1) if place[:n] in lines), None)
    where = f"{file}:{line}" if line else str(file)
    if detail["type"] == "extra_forbidden":
        known = _known_keys(place)
        return f"{where}: {_dotted(place)}: unknown key{_suggestion(str(place[-1]), known)}; known: {', '.join(known)}"
    if detail["type"] == "missing":
        return f"{where}: {_dotted(place)}: this key is required"
    message = str(detail["msg"]).removeprefix("Value error, ")
    label = f"{_dotted(place)}: " if place else ""
    got = "" if detail["type"] == "value_error" else f", got {detail['input']!r}"
    return f"{where}: {label}{message[0].lower()}{message[1:]}{got}"
