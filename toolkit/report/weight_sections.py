"""What the report says of the weights: their formats, their errors, and what a calibration text decided."""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.calibrate.expert_tokens import ExpertTokens
from toolkit.checkpoint.stored_as import StoredAs


@dataclass(frozen=True)
class Format:
    """How a matrix is stored. 32 bits are not quantized and have neither blocks nor a symmetry."""

    algorithm: str
    bits: int
    block_size: int | None = None
    symmetric: bool | None = None


@dataclass(frozen=True, kw_only=True)
class RoleRow(Format):
    """The matrices of one role that are stored in one format. `exact` ones lose nothing and have no SQNR."""

    role: str
    tensors: int
    bytes: int
    sqnr_db: float | None = None
    exact: bool | None = None


@dataclass(frozen=True, kw_only=True)
class TensorRow(Format):
    """One matrix: its format, and the signal to quantization noise of its weights."""

    name: str
    role: str
    layer: int | None = None
    sqnr_db: float | None = None
    exact: bool | None = None


@dataclass(frozen=True)
class Fold:
    """Channel scales that were folded into one input, and the error of its readers' output before and after."""

    input: str
    alpha: float
    beta: float
    plain_loss: float
    loss: float


@dataclass(frozen=True)
class FallbackRow:
    """A matrix that was searched rather than solved, and why."""

    tensor: str
    reason: str


@dataclass(frozen=True)
class ActivationRanges:
    """How the ranges of uint16 activations were taken from the text."""

    dtype: str
    tensors: int
    percentile: float


@dataclass(frozen=True)
class Tuned:
    """What so many steps down the gradient of the mean KLD brought: the KLD of the weights on the `tokens` of the
    calibration text that were left out, before and after. Where it is the same, nothing was taken."""

    steps: int
    tokens: int
    kld_before: float
    kld_after: float
    seconds: float


@dataclass(frozen=True)
class CalibrationOutcome:
    """What was read of a text, and what it decided."""

    quality: str
    text: str
    tokens: int
    inputs: int = 0
    folded: tuple[Fold, ...] = ()
    fallbacks: tuple[FallbackRow, ...] = ()
    experts: ExpertTokens | None = None
    budget_bits_per_weight: float | None = None
    divergences: dict[str, float] | None = None
    survey_s: float | None = None
    solve_s: float | None = None
    activations: ActivationRanges | None = None
    ranges_s: float | None = None
    tuned: Tuned | None = None


@dataclass(frozen=True)
class Quantization:
    """Bits, bytes and error of the weights, by role and format and by matrix."""

    bits_per_weight: float
    weight_bytes: int
    by_role: tuple[RoleRow, ...]
    tensors: tuple[TensorRow, ...]
    calibration: CalibrationOutcome | None = None
    salient_inputs: tuple[str, ...] | None = None
    rotated: bool | None = None
    source: StoredAs | None = None
