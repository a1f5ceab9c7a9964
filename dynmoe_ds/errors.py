"""The errors a user can cause. Each message says what was wrong, with the values, and what to do."""

from __future__ import annotations

from collections.abc import Sequence

EXIT_PREEMPTED = 85
"""Exit code of a run that was asked to stop and has written a checkpoint: start me again. Shells and launchers do not
use the number."""


class DynMoEError(Exception):
    """Base of every error that this package raises for a user's fault."""


class ConfigError(DynMoEError):
    """A configuration that cannot work. `faults` holds one sentence per fault; all are reported at once."""

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults: tuple[str, ...] = (faults,) if isinstance(faults, str) else tuple(faults)
        if len(self.faults) == 1:
            message = self.faults[0]
        else:
            message = f"{len(self.faults)} faults in the configuration:\n" + "\n".join(f"  - {f}" for f in self.faults)
        super().__init__(message)


class RoutingError(DynMoEError):
    """Input that cannot be routed: a wrong width, a token mask of another shape, a reentrant checkpoint."""


class PlacementError(DynMoEError):
    """A plan or a placement that contradicts the pool: a slot that is taken, an expert that does not exist."""


class SurgeryError(DynMoEError):
    """Weights, masters or moments that cannot be edited with the optimiser in use."""


class DivergenceError(DynMoEError):
    """Ranks that disagree on something that must be equal everywhere. Raised on every rank."""


class NonFiniteError(DynMoEError):
    """NaN or infinity in what a training step computed. Raised on every rank, with nothing updated."""


class CheckpointError(DynMoEError):
    """A checkpoint that cannot be written or read."""


class DataError(DynMoEError):
    """Training data that cannot be used."""


class LaunchError(DynMoEError):
    """A job that could not be submitted or started."""
