"""Predictions next to what logs show: one row per GPU buffer, with its best estimate and bound.

Used by the backtest and by the fit of the margins; a row that cannot be judged says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from quantmix.errors import QuantmixError
from quantmix.memory.compute import DeviceRole, regimes
from quantmix.memory.logroles import ExpertBytes, expert_bytes, gpu_roles
from quantmix.memory.logs import LogCase, LoggedDevice
from quantmix.memory.margins import Margin
from quantmix.memory.model import Regime
from quantmix.units import GIB, MIB

JUDGED_SINCE: Final = "2025-03-18"  # MLA cache and flash attention were reworked (PRs 259, 260)
_SMALLEST_MIB: Final = 16.0
_CARD_SIZES_GIB: Final = (8, 12, 16, 24, 32, 48, 80, 96, 141, 192)


@dataclass(frozen=True, slots=True)
class Evidence:
    """One GPU compute buffer: what the log shows and what the model says, in bytes."""

    id: str
    url: str
    regime: str
    measured_bytes: int
    estimate_bytes: int
    upper_bytes: int
    uppers: tuple[Regime, ...]
    experts: ExpertBytes | None
    capacity_bytes: int

    @property
    def relative_error(self) -> float:
        """Estimate over measured, minus one."""
        return self.estimate_bytes / self.measured_bytes - 1

    def bound_bytes(self, table: dict[str, Margin]) -> int:
        """The upper bound with the margins of `table`."""
        bounds = (table.get(r.name, table["*"]).bound(r) for r in self.uppers)
        return max(_value(r, self.experts, safe=True) for r in bounds)


def compute_evidence(cases: tuple[LogCase, ...]) -> tuple[list[Evidence], list[dict[str, str]]]:
    """Return the judged GPU rows of ik builds since `JUDGED_SINCE`, and the others with why."""
    found: list[Evidence] = []
    skipped: list[dict[str, str]] = []
    for case in cases:
        why = _case_obstacle(case)
        gpus = [g for g in case.gpus if g.compute is not None]
        if why:
            skipped += [{"id": f"{case.id}/{g.name}/compute", "why": why} for g in gpus]
            continue
        assert case.model is not None
        try:
            roles = gpu_roles(case)
            experts = expert_bytes(case) if case.model.hparams.is_moe else None
        except QuantmixError as err:
            skipped += [{"id": f"{case.id}/{g.name}/compute", "why": str(err)} for g in gpus]
            continue
        seen: set[tuple[str, int]] = set()
        for gpu in gpus:
            made = _row(case, gpu, roles[gpu.name], experts, seen)
            if isinstance(made, str):
                skipped.append({"id": f"{case.id}/{gpu.name}/compute", "why": made})
            else:
                found.append(made)
    return found, skipped


def _case_obstacle(case: LogCase) -> str:
    """Why no GPU row of the case can be judged, empty when they can."""
    if case.settings.engine != "ik":
        return "mainline: its own fit tool is exact, few rows"
    if case.settings.build < JUDGED_SINCE:
        return f"ik before {JUDGED_SINCE}: MLA and FA graphs were others"
    if case.model is None:
        return f"model {case.model_text[:60]!r} is not in the tables"
    if case.unstated:
        return "not stated: " + ", ".join(sorted(case.unstated))
    if case.offloaded is not None and case.offloaded[0] == 0:
        return "no layer offloaded: the card only computes copies"
    if not any(g.name.startswith("CUDA") for g in case.gpus):
        return "not a CUDA build"
    return ""


def _row(
    case: LogCase,
    gpu: LoggedDevice,
    role: DeviceRole,
    experts: ExpertBytes | None,
    seen: set[tuple[str, int]],
) -> Evidence | str:
    """Evidence for one GPU, or why there is none."""
    assert case.model is not None
    assert gpu.compute is not None
    if gpu.compute < _SMALLEST_MIB:
        return f"buffer below {_SMALLEST_MIB:.0f} MiB"
    every = regimes(case.model, case.settings, role)
    uppers = regimes(case.model, case.settings, role, upper=True)
    copying = any(r.name.startswith("copy") for r in every)
    if copying and experts is None:
        return "experts in RAM are copied, but the post does not tell their quant type"
    copied = experts is not None and experts.has_cuda_kernel
    applies = [r for r in every if copied or not r.name.startswith("copy")]
    if not applies:
        return "the log does not show what this card does"
    best = max(applies, key=lambda r: _value(r, experts))
    upper = tuple(r for r in uppers if copied or not r.name.startswith("copy"))
    key = (best.name, round(gpu.compute))
    if key in seen:
        return "same regime and size as another GPU of the case"
    seen.add(key)
    held = (gpu.weights or 0) + (gpu.kv or 0) + gpu.compute
    return Evidence(
        id=f"{case.id}/{gpu.name}/compute",
        url=case.url,
        regime=best.name,
        measured_bytes=int(gpu.compute * MIB),
        estimate_bytes=_value(best, experts),
        upper_bytes=max(_value(r, experts, safe=True) for r in upper if r.name == best.name),
        uppers=upper,
        experts=experts,
        capacity_bytes=_card_that_holds(int(held * MIB)),
    )


def _value(regime: Regime, experts: ExpertBytes | None, *, safe: bool = False) -> int:
    """Bytes of a regime with the experts in RAM; a bound takes the largest for gate and up too."""
    if experts is None or not regime.coefficient:
        return regime.constant_bytes
    pair = regime.name == "copy_pair" and not safe
    return regime.bytes_at(experts.gate_up if pair else experts.largest)


def _card_that_holds(n_bytes: int) -> int:
    """The smallest usual card that what the log shows fits on (logs seldom name the card)."""
    sizes = [s * GIB for s in _CARD_SIZES_GIB if s * GIB >= n_bytes]
    return sizes[0] if sizes else n_bytes
