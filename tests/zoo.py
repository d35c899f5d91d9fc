"""One model of every architecture family of timm and torchvision, emitted onto our kernels and compared with float64.

`make zoo` writes the table into docs/zoo.md. What was done before an interruption is kept in build/zoo.json; a model
during which the process died counts as a fault. Weights are random; nothing is downloaded but the two packages.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import importlib
import inspect
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from emitting import prefer
from torch import Tensor, nn

import kernelpress as kp
from kernelpress.bench.twins import import_torchvision
from kernelpress.emit.tolerance import relative_error
from kernelpress.files import write_atomically
from kernelpress.runtime.torch_private import pytree

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ROOT / "build" / "zoo"
STATE = ROOT / "build" / "zoo.json"
PAGE = ROOT / "docs" / "zoo.md"

SIDES = (96, 128)
"""Of square inputs, tried before the model's own."""
LARGEST = 150_000_000
"""Parameters of a whole model; larger ones are made two blocks deep."""
FACTOR = 4
"""How much further from float64 than the original in float32 an emitted model may be."""
EXACT = 1e-6
"""A relative error that is never too large."""
ROUNDING = 2.0**-24
"""Of one float32 operation; a sum of n products is off by √n times that (Higham and Mary 2019, DOI 10.1137/18M1226312,
probabilistic rounding errors), and n is the size of a layer's filter."""


INTRODUCTION = """\
# The zoo: one model of every architecture family

Written by `make zoo`. The smallest model of each family of timm and torchvision, with random weights, is emitted with
our CPU kernels wherever they can run, and compared with the original in float64: at one image and, where any batch
goes, at two; its plan at one. *Error* is ‖y − y₆₄‖ / ‖y₆₄‖ of the emitted model, *original's* that of the original in
float32. *Ours* counts places that run a layer of ours, *places* all that one was weighed for; *plan* its native steps
and torch's."""


@dataclass(frozen=True)
class Family:
    """A family of a library, and how its smallest model is made from further keyword arguments."""

    library: str
    name: str
    model: str
    create: Callable[..., nn.Module]
    side: int

    def inputs(self, side: int) -> tuple[Any, ...]:
        """One random image, clip, pair or list of images, as the model takes it."""
        if "optical_flow" in self.name:
            return torch.randn(1, 3, side, side), torch.randn(1, 3, side, side)
        if "detection" in self.name:
            return ([torch.rand(3, side, side)],)
        return (torch.randn(1, 3, 16, side, side) if "video" in self.name else torch.randn(1, 3, side, side),)


@dataclass(frozen=True)
class Row:
    """What became of one model; `fault` is empty where it is right, or refused with a reason."""

    library: str
    family: str
    model: str
    side: int = 0
    ours: int = 0
    places: int = 0
    error: float | None = None
    original_error: float | None = None
    batch: str = ""
    native_steps: int = 0
    torch_steps: int = 0
    refusal: str = ""
    fault: str = ""
    seconds: float = 0.0


def import_packages() -> None:
    """Makes timm and torchvision importable from where `make zoo` puts them."""
    sys.path.insert(0, str(PACKAGES))
    try:
        import_torchvision()
        importlib.import_module("timm")
    except ImportError as missing:
        sys.exit(f"{missing}: `make zoo` installs timm and torchvision into {PACKAGES}")


def all_models() -> dict[tuple[str, str], list[str]]:
    """The models of every family, by library and family."""
    timm, vision = importlib.import_module("timm.models"), importlib.import_module("torchvision.models")
    found = {
        ("timm", family): timm.list_models(module=family, exclude_filters="test_*") for family in timm.list_modules()
    }
    for model in vision.list_models():
        family = vision.get_model_builder(model).__module__.removeprefix("torchvision.models.")
        found.setdefault(("torchvision", family), []).append(model)
    return {key: models for key, models in found.items() if models}


def family_of(library: str, name: str, model: str) -> Family:
    """How `model` is made, and the side of the images that it was made for."""
    if library == "timm":
        timm = importlib.import_module("timm")
        side = timm.models.get_pretrained_cfg(model).input_size[-1]
        return Family(library, name, model, functools.partial(timm.create_model, model), side)
    return Family(library, name, model, functools.partial(_vision_model, model), 224)


def _vision_model(name: str, **options: Any) -> nn.Module:
    vision = importlib.import_module("torchvision.models")
    parameters = inspect.signature(vision.get_model_builder(name)).parameters
    options |= {"weights_backbone": None} if "weights_backbone" in parameters else {}
    options |= {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return vision.get_model(name, weights=None, **options)


def smallest(library: str, name: str, models: Sequence[str]) -> str:
    """The model with the fewest parameters, of those that say how many before they are made."""
    sizes = {model: _parameters(family_of(library, name, model).create) for model in models}
    return min(models, key=lambda model: sizes[model] or sys.maxsize)


def _parameters(create: Callable[[], nn.Module]) -> int | None:
    try:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in create().parameters())
    except Exception:  # some look at values while they are made
        return None


def make(family: Family) -> tuple[nn.Module, tuple[Any, ...], int]:
    """The model in eval mode with random weights, inputs of the smallest side that it takes, and that side."""
    is_large = (_parameters(family.create) or 0) > LARGEST
    depth = {"depth": 2} if is_large else {}
    sides = [side for side in SIDES if side < family.side]
    attempts = [({}, side) for side in sides] + [({"img_size": side}, side) for side in sides] + [({}, family.side)]
    for options, side in attempts:
        torch.manual_seed(0)
        try:
            model = family.create(**depth, **options).eval()
            inputs = family.inputs(side)
            with torch.no_grad():
                model(*inputs)
        except Exception:  # whatever a model says of a size that it does not take
            if (options, side) == attempts[-1]:
                raise
        else:
            state = randomized(model, inputs)
            # Another one, as some keep what they have computed from their weights.
            model = family.create(**depth, **options).eval()
            model.load_state_dict(state)
            return model, inputs, side
    raise AssertionError("the last attempt returns or raises")


def randomized(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """The state with values that matter where all are alike (norms, layer scales, projections that begin at zero), as
    long as the outputs stay finite."""
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
                positive = name.endswith("running_var") or float(tensor.flatten()[0]) == 1
                tensor.uniform_(0.7, 1.3) if positive else tensor.normal_(std=0.1)
        is_finite = all(bool(t.isfinite().all()) for t in tensors(model(*inputs)))
    return model.state_dict() if is_finite else before


def tensors(value: Any) -> list[Tensor]:
    """The tensors in any structure."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def visit(family: Family) -> Row:
    """Emits one model and compares it and its plan with float64, at one image and at two."""
    row = Row(family.library, family.name, family.model)
    try:
        model, inputs, side = make(family)
    except Exception as error:
        return replace(row, refusal=f"the original does not run here: {first_line(error)}")
    row = replace(row, side=side)
    try:
        emitted = kp.emit(model, inputs, cost=prefer("cpu"), cache=False, progress=False)
    except ValueError as refusal:
        return replace(row, refusal=first_line(refusal))
    except Exception as error:
        return replace(row, fault=f"emit: {type(error).__name__}: {first_line(error)}")
    try:
        return measured(row, model, emitted, inputs)
    except Exception as error:
        traceback.print_exc()
        return replace(row, fault=f"{type(error).__name__}: {first_line(error)}")


def measured(row: Row, model: nn.Module, emitted: Any, inputs: tuple[Any, ...]) -> Row:
    """`row` with the emitted model's places, errors and plan."""
    record = emitted.record
    ours = sum(not place.choice.startswith("aten") for place in record.places)
    row = replace(row, places=len(record.places), ours=ours, batch="any" if emitted.dynamic_batch else "1")
    if record.kept_original:
        row = replace(row, fault=record.reason)
    exact = copy.deepcopy(model).double()
    longest_sum = max((weight[0].numel() for weight in model.parameters() if weight.dim() > 1), default=1)
    exact_enough = max(EXACT, ROUNDING * longest_sum**0.5)
    with torch.no_grad():
        plan = kp.capture(emitted, *inputs, stream=False, cache=False)
        row = replace(row, native_steps=plan.native_steps, torch_steps=len(plan) - plan.native_steps)
        for images in (1, 2) if emitted.dynamic_batch else (1,):
            given = pytree.tree_map(lambda *x: torch.cat(x), inputs, flipped(inputs)) if images > 1 else inputs
            truth = truth_of(exact, model, given)
            original_error = error_of(model(*given), truth)
            bound = max(FACTOR * original_error, exact_enough)
            runs = {"emitted": emitted} | ({"plan": plan} if images == 1 else {})
            for name, run in runs.items():
                error = error_of(run(*given), truth)
                if not error <= bound:
                    # The original's algorithms, and so its errors, are others in the other format and by single images.
                    original_error = max(original_error, error_of(model(*channels_last(given)), truth))
                    for alone in (inputs, flipped(inputs)) if images > 1 else ():
                        original_error = max(original_error, error_of(model(*alone), truth_of(exact, model, alone)))
                    bound = max(FACTOR * original_error, exact_enough)
                if not error <= bound:
                    return replace(
                        row, fault=f"{name}: relative error {error:.1e} at {images} images, bound {bound:.1e}"
                    )
                row = replace(row, error=max(row.error or 0.0, error))
            row = replace(row, original_error=max(row.original_error or 0.0, original_error))
    return row


def truth_of(exact: nn.Module, model: nn.Module, given: tuple[Any, ...]) -> Any:
    """The outputs in float64, or the original's in float32 where it cannot run in anything else."""
    try:
        return exact(*pytree.tree_map(lambda x: x.double(), given))
    except RuntimeError as error:
        if "expected scalar type" not in str(error):
            raise
        return model(*given)


def flipped(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Every image from right to left."""
    return pytree.tree_map(lambda x: x.flip(-1), given)


def channels_last(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Images in channels_last memory."""
    return pytree.tree_map(lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x, given)


def error_of(result: Any, truth: Any) -> float:
    """The largest relative error of a tensor in the outputs; infinite where their number differs."""
    results, truths = tensors(result), tensors(truth)
    if len(results) != len(truths):
        return float("inf")
    return max(relative_error(a.double(), b.double()) for a, b in zip(results, truths, strict=True))


def first_line(error: Exception) -> str:
    """Of its message, or its type's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0][:200]


def page(rows: Sequence[Row], versions: str) -> str:
    """docs/zoo.md."""
    refused, faulty = (sum(bool(getattr(row, kind)) for row in rows) for kind in ("refusal", "fault"))
    lines = [
        *INTRODUCTION.splitlines(),
        "",
        f"{len(rows)} models: {len(rows) - refused - faulty} right, {refused} refused, {faulty} faults. {versions}.",
        "",
        "| family | model | side | batch | ours / places | error | original's | plan: native / torch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row.library} {row.family} | {row.model} | {row.side} |"
        if row.fault or row.refusal:
            reason = f"**fault**: {row.fault}" if row.fault else f"refused: {row.refusal}"
            lines.append(f"{start} {row.batch} | {row.ours} / {row.places} | {cell(reason)} | | |")
        else:
            lines.append(
                f"{start} {row.batch} | {row.ours} / {row.places} | {row.error:.1e} | {row.original_error:.1e} | "
                f"{row.native_steps} / {row.torch_steps} |"
            )
    return "\n".join(lines) + "\n"


def verdict(row: Row) -> str:
    """One line on one model."""
    if row.fault or row.refusal:
        return f"FAULT {row.fault}" if row.fault else f"refused: {row.refusal}"
    return f"{row.ours} of {row.places} places ours, error {row.error:.1e}, original's {row.original_error:.1e}"


def cell(text: str) -> str:
    """`text` as a cell of a table."""
    return text.replace("|", "\\|")


def load_state() -> dict[str, Any]:
    """What an interrupted run has left."""
    fresh: dict[str, Any] = {"chosen": {}, "rows": {}, "visiting": None}
    return json.loads(STATE.read_text()) if STATE.exists() else fresh


def main() -> int:
    """Visits the families that are not yet done; 1 if any is at fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="FAMILY", help="visit this family alone and print its row")
    only = parser.parse_args().only
    warnings.simplefilter("ignore")
    import_packages()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    state = load_state()
    found = {key: models for key, models in all_models().items() if only in (None, key[1])}
    for i, ((library, name), models) in enumerate(found.items(), 1):
        key = f"{library} {name}"
        if key in state["rows"] and not only:
            continue
        if key not in state["chosen"]:
            state["chosen"][key] = smallest(library, name, models)
        family = family_of(library, name, state["chosen"][key])
        begin = time.perf_counter()
        if state["visiting"] == key:
            row = Row(library, name, family.model, fault="the process died")
        else:
            save(state | {"visiting": key})
            row = visit(family)
        row = replace(row, seconds=round(time.perf_counter() - begin, 1))
        state = state | {"visiting": None, "rows": state["rows"] | {key: asdict(row)}}
        save(state)
        gc.collect()
        print(f"[{i}/{len(found)}] {key} {row.model}: {verdict(row)} ({row.seconds:.0f} s)", flush=True)
    if only:
        return 0
    rows = [Row(**state["rows"][f"{library} {name}"]) for library, name in found]
    packages = {name: importlib.import_module(name).__version__ for name in ("torch", "timm", "torchvision")}
    versions = ", ".join(f"{name} {version}" for name, version in packages.items())
    write_atomically(PAGE, page(rows, versions).encode())
    faults = [row for row in rows if row.fault]
    print(f"{len(rows)} models, {len(faults)} faults; the table is in {PAGE.relative_to(ROOT)}")
    # What was right need not be visited again while faults are mended; the next run after a clean one starts anew.
    kept = {} if not faults else {k: r for k, r in state["rows"].items() if not r["fault"]}
    save(state | {"rows": kept})
    return bool(faults)


def save(state: dict[str, Any]) -> None:
    """Keeps `state` for the next run."""
    STATE.parent.mkdir(exist_ok=True)
    write_atomically(STATE, json.dumps(state, indent=1).encode())


if __name__ == "__main__":
    sys.exit(main())
