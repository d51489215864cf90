"""A plan: everything that was found out about a run on devices, and the same as data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from itjax import __version__
from itjax.parallel.topology import Target
from itjax.planning.advice import Suggestion
from itjax.planning.case import Case, Measured, versions
from itjax.planning.memory import State
from itjax.planning.roofline import Bound, Load, Products

DAY, HOUR = 86400.0, 3600.0


@dataclass(frozen=True)
class Rates:
    """What a bound of a step comes to."""

    tokens_per_day: float  # at most
    device_hours: float | None  # of an epoch, at least; None without data
    price: float | None  # of an epoch, at least


@dataclass(frozen=True)
class Plan:
    case: Case
    load: Load
    report: Mapping[str, Any] | None  # of the loader; None without data
    num_parameters: int
    num_trained: int
    state: State
    parts: Mapping[str, float]  # bytes of one device by what they are for
    dominates: str
    limit: float | None  # bytes of one device
    products: Products
    measured: Measured | None  # None where a reason stood before compiling
    bound: Bound | None
    reasons: Sequence[str]  # not to start; empty when it fits
    warnings: Sequence[str]
    suggestions: Sequence[Suggestion] = ()
    fitted: str | None = None  # the lines of the config that a search chose
    price: float | None = None  # of a device for an hour
    tried: Sequence[Mapping[str, Any]] = field(default_factory=tuple)

    @property
    def fits(self) -> bool:
        return not self.reasons

    @property
    def peak(self) -> int | None:
        return self.measured.peak if self.measured else None

    def rates(self) -> Rates:
        assert self.bound is not None
        assert self.bound.step is not None
        hours = None
        if self.report is not None:
            steps = self.report["rows_per_epoch"] / self.case.run.rows
            hours = steps * self.bound.step * self.case.num_devices / HOUR
        price = None if hours is None or self.price is None else hours * self.price
        return Rates(self.load.tokens / self.bound.step * DAY, hours, price)

    def as_json(self) -> dict[str, Any]:
        """As contracts say, with more beside it."""
        case, measured = self.case, self.measured
        compiled = measured if measured is not None and measured.compiles else None
        rates = self.rates() if self.bound is not None and self.bound.step is not None else Rates(0.0, None, None)
        bound = self.bound if self.bound is not None and self.bound.step is not None else None
        return {
            "fits": self.fits,
            "reasons": list(self.reasons),
            "devices": case.num_devices,
            "target": case.target.name,
            "device_kind": case.target.chip.name,
            "slices": case.target.slices,
            "tokens_per_step": self.load.tokens,
            "mesh": dict(case.mesh.shape),
            "bytes_per_device": {
                "parameters": self.state.parameters,
                "optimizer": self.state.optimizer,
                "frozen": self.state.frozen,
                "batch": self.state.batch,
                "arguments": compiled.arguments if compiled else None,
                "temporaries": compiled.temporaries if compiled else None,
                "peak": self.peak,
                "limit": self.limit,
                "host": max(self.state.host, measured.host if measured else 0),
            },
            "parts_per_device": {name: round(size) for name, size in self.parts.items()},
            "flops_per_step": self.products.step,
            "model_flops_per_step": self.products.model,
            "compiled_flops_per_step": compiled.flops * case.num_devices if compiled and compiled.flops else None,
            "collective_bytes_per_step": dict(compiled.received) if compiled else {},
            "network_bytes_per_step": compiled.crossing if compiled else None,
            "warnings": list(self.warnings),
            "step_seconds_at_least": bound.step if bound else None,
            "bound_by": bound.by if bound else None,
            "bounds_seconds": dict(bound.seconds) if bound else {},
            "mfu_at_most": bound.mfu if bound else None,
            "tokens_per_day_at_most": rates.tokens_per_day if bound else None,
            "device_hours_per_epoch_at_least": rates.device_hours,
            "price_per_epoch_at_least": rates.price,
            "data": self._data(),
            "suggestions": [
                {
                    "set": one.lines,
                    "peak": round(one.peak),
                    "step_seconds_at_least": one.seconds,
                    "compiled": one.compiled,
                }
                for one in self.suggestions
            ],
            "fit": self.fitted,
            "tried": list(self.tried),
            "compile_seconds": measured.seconds if measured else None,
            "versions": {"itjax": __version__, **versions()},
        }

    def _data(self) -> dict[str, Any] | None:
        if self.report is None:
            return None
        names = ("fill", "rows_per_epoch", "tokens_per_step", "trained_share")
        of_source = ("share_examples", "share_tokens", "epochs")
        return {name: self.report[name] for name in names} | {
            "steps_per_epoch": self.report["rows_per_epoch"] / self.case.run.rows,
            "sources": {
                source: {name: facts[name] for name in of_source} for source, facts in self.report["sources"].items()
            },
        }


def refused(target: Target, reasons: Sequence[str]) -> dict[str, Any]:
    """The plan, as data, of a run that has no step to compile."""
    return {
        "fits": False,
        "reasons": list(reasons),
        "devices": len(target.devices),
        "device_kind": target.chip.name,
        "bytes_per_device": dict.fromkeys(("parameters", "optimizer", "arguments", "temporaries", "peak", "limit")),
        "flops_per_step": None,
        "model_flops_per_step": None,
        "collective_bytes_per_step": {},
        "warnings": [],
        "step_seconds_at_least": None,
        "mfu_at_most": None,
        "data": None,
    }
