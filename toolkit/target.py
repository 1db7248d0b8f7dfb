"""Where a bundle runs. A target is a row of data: execution provider, device, and what suits them by default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True)
class Target:
    """One row. `quantize` and `context_length` are the defaults of a checkpoint without a recipe of its own."""

    name: str
    execution_provider: str
    device: str
    context_length: int
    quantize: tuple[dict[str, Any], ...]
    validate: dict[str, float]


TARGETS: Final[dict[str, Target]] = {
    "cpu": Target(
        name="cpu",
        execution_provider="CPUExecutionProvider",
        device="cpu",
        context_length=4096,
        quantize=(
            {"match": "lm_head", "algorithm": "kquant", "bits": 8, "block_size": 128},
            {"match": "model.embed_tokens", "algorithm": "kquant", "bits": 4, "block_size": 32},
            {"match": "*", "algorithm": "kquant", "bits": 4, "block_size": 128},
        ),
        validate={"mean_kld": 0.1},
    ),
}
