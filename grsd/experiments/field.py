"""The experiment ``field``: exact or refused, on transformers' architectures in every setting.

A cell is one tiny model (:mod:`grsd.lab.nets.tiny`) in one setting
(:mod:`grsd.experiments.field_settings`). Its truth is the dense Jacobian: plain autograd, one
backward pass a row, on a copy of the model that the setting has not touched. A cell is *exact*,
*refused* by a sentence of this package that says what to do, or a fault: *wrong* (another number)
or *raw* (the error of a library, or one without a remedy). *Absent* is what does not exist.
"""

from __future__ import annotations

import copy
import re
import traceback
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from grsd import checks
from grsd.experiments.engine import Data, Experiment, Piece, Rows, rounded
from grsd.experiments.field_settings import SETTINGS, Absent, Case, prepare
from grsd.lab.nets.models import quiet
from grsd.lab.nets.tiny import ARCHITECTURES
from grsd.spectrum import NTK
from grsd.spectrum.observables import raw_output

METHODS = ("auto", "graph")
ROUNDINGS = 16  # one after another on the way through a tiny model and back
VERBS = (
    "build call check convert drop give load make move pad pass remove replace restore run set "
    "take turn use wrap write"
).split()
# an order to the reader, at the start of a sentence or of a part of one
REMEDY = re.compile(rf"(?:^|[:;.,] (?:and |or )?)(?:{'|'.join(VERBS)})\b", re.IGNORECASE)


@dataclass(frozen=True)
class Parameters:
    """Which cells; a seed is that of the vectors that are multiplied."""

    architectures: tuple[str, ...] = tuple(ARCHITECTURES)
    settings: tuple[str, ...] = tuple(SETTINGS)
    seeds: int = 1

    def __post_init__(self) -> None:
        checks.whole("seeds", self.seeds, 1)
        for name in self.architectures:
            checks.one_of("architecture", name, ARCHITECTURES)
        for name in self.settings:
            checks.one_of("setting", name, SETTINGS)


def pieces(p: Parameters) -> list[Piece]:
    """One piece per cell."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    return [
        {"architecture": architecture, "setting": setting, "seeds": p.seeds, **versions}
        for architecture in p.architectures
        for setting in p.settings
    ]


class Types(TorchFunctionMode):
    """Which types of numbers carry a gradient in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.requires_grad:
            self.seen.add(out.dtype)
        return out


def truth(case: Case) -> tuple[Tensor, float]:
    """Return J, (T, P) in float64, by plain autograd, and the ε of its coarsest arithmetic."""
    model, inputs = copy.deepcopy((case.plain, case.inputs))
    with case.context(), Types() as types:
        rows = case.observable.rows(raw_output(model(**inputs)))
    parameters = [p for p in model.parameters() if p.requires_grad]
    # one backward pass a row
    J = torch.stack(
        [torch.cat([g.double().reshape(-1) for g in _gradients(row, parameters)]) for row in rows]
    )
    return J, max(torch.finfo(dtype).eps for dtype in types.seen)


def _gradients(row: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(row, parameters, retain_graph=True, materialize_grads=True)


def measure(piece: Piece) -> Data:
    """Return status, largest relative difference, tolerance and reason of one cell."""
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        # what the model itself refuses, nobody can measure
        try:
            case = prepare(piece["architecture"], piece["setting"])
            J, eps = truth(case)
        except Absent as absent:
            return {"status": "absent", "reason": str(absent)}
        except Exception as error:
            return {"status": "absent", "reason": f"the model itself fails: {_said(error)}"}
        bound = tolerance(eps, J.shape[1])
        forms: dict[str, Any] = {}
        for method in METHODS:
            if method == "graph" and forms["auto"].get("form") == "graph":
                break  # the same once more
            if method == "graph" and case.after is not None:
                case = prepare(piece["architecture"], piece["setting"])
            forms[method] = judge(case, J, bound, method, piece["seeds"])
        return {"status": worst(forms), "eps": eps, "tolerance": bound, "forms": forms}


def tolerance(eps: float, parameters: int) -> float:
    """Return the relative difference that rounding explains, a few times over.

    Half an ε for each of `ROUNDINGS`, and √P of them in a sum over P parameters, for types that are
    summed in themselves: the 16-bit ones are summed in float32.
    """
    summed = parameters**0.5 if eps <= torch.finfo(torch.float32).eps else 0.0
    return (ROUNDINGS + summed) * eps / 2


def worst(forms: dict[str, Any]) -> str:
    """Return one word for all forms of a cell: a fault before a refusal before an exact product."""
    said = {one["status"] for one in forms.values()}
    return next(word for word in ("wrong", "raw", "refused", "exact") if word in said)


def judge(case: Case, J: Tensor, bound: float, method: str, seeds: int) -> Data:
    """Return what one form of the operator does with a case."""
    before = copy.deepcopy(case.model.state_dict())
    try:
        with case.context():
            M: Any = NTK(case.model, case.inputs, case.observable, normalize="sum", method=method)  # type: ignore[arg-type]
            if _changed(before, case.model.state_dict()):
                return {"status": "wrong", "reason": "the model was changed"}
            if case.after is not None:
                case.after()
            # a wrong number before a refusal is wrong
            largest = 0.0
            for what, found, true in _products(M, J, seeds):
                largest = max(largest, difference := _gap(found, true))
                if not difference <= bound:
                    return {
                        "status": "wrong",
                        "reason": f"{what} differs",
                        "difference": difference,
                    }
    except Exception as error:
        return refusal(error)
    return {"status": "exact", "form": M.method, "difference": rounded(largest, 2)}


def _products(M: Any, J: Tensor, seeds: int) -> Any:
    """Yield the name of a product, the product and its truth."""
    K = J @ J.T
    for seed in range(seeds):
        u = torch.randn(len(K), generator=torch.Generator().manual_seed(seed)).to(M.dtype)
        yield "M u", M @ u, K @ u.double()
        gradient = torch.cat([g.reshape(-1) for g in M.vjp(u)])
        yield "Jᵀ u", gradient, _used(J, M).T @ u.double()
    if M.method == "factored":  # the graph takes a block column by column
        yield "M U", M.to_dense(), K


def _used(J: Tensor, M: Any) -> Tensor:
    """Return the columns of the parameters that M uses, as `vjp` lists them."""
    sizes = [p.numel() for p in M._parameters]
    kept = {id(p) for p in M._used}
    blocks = torch.split(J, sizes, dim=1)
    return torch.cat([b for b, p in zip(blocks, M._parameters, strict=True) if id(p) in kept], 1)


def _gap(found: Tensor, true: Tensor) -> float:
    gap = float((found.double() - true).norm() / true.norm())
    return gap if gap == gap else float("inf")


def _changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return any(not torch.equal(x, after[name]) for name, x in before.items())


def refusal(error: Exception) -> Data:
    """Return "refused" for a sentence of this package with a remedy, else "raw"."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(last.filename).is_relative_to(Path(__file__).parents[1])
    fit = ours and isinstance(error, (ValueError, RuntimeError)) and REMEDY.search(str(error))
    where = f"{Path(last.filename).name}:{last.name}"
    reason = str(error) if fit else f"{_said(error)} ({where})"
    return {"status": "refused" if fit else "raw", "reason": reason}


def _said(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300]


def reduce(p: Parameters, listed: list[Piece], measured: list[Data]) -> Data:
    """Lay the cells out as rows by architecture, and number what was said in several of them."""
    said: dict[str, int] = {}
    rows: dict[str, Any] = {}
    for piece, one in zip(listed, measured, strict=True):
        name = piece["architecture"]
        row = rows.setdefault(name, {"kind": ARCHITECTURES[name].kind, "cells": {}})
        forms = one.get("forms", {"": one})
        cell: Data = {"status": one["status"]}
        # the largest difference of both forms, and the reasons by form
        if differences := [form["difference"] for form in forms.values() if "difference" in form]:
            cell |= {"difference": rounded(max(differences), 2), "eps": one["eps"]}
        for method, form in forms.items():
            if "reason" in form:
                number = said.setdefault(form["reason"], len(said))
                cell.setdefault("reasons", {})[method] = number
        row["cells"][piece["setting"]] = cell
    words = [[name, SETTINGS[name].words] for name in p.settings]
    return {"settings": words, "rows": rows, "reasons": [*said]}


def table(data: Data) -> Rows:
    """Per architecture: how many cells are exact, refused, absent, or faults."""
    words = ("exact", "refused", "absent", "wrong", "raw")
    rows: list[list[object]] = []
    for name, row in data["rows"].items():
        said = [one["status"] for one in row["cells"].values()]
        rows.append([name, row["kind"], *(said.count(word) for word in words)])
    return ["architecture", "kind", *words], rows


EXPERIMENT = Experiment(Parameters, pieces, measure, reduce, table)
