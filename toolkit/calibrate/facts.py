"""What a survey finds, and how its state lies on the disk between two layers."""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.files import replacing
from toolkit.quant.awq import FoldChoice
from toolkit.quant.blockwise import QuantSpec
from toolkit.quant.ranges import ActivationRange

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class InputFacts:
    """What became of one input. `importance` [K] are its second moments and `values` its range after folding, `fold`
    how it was folded, and `losses` the error of the output by format, as a share of its energy. `tokens` is how many of
    the text's came to a routed input, None for all; `importance` is nothing where they are too few."""

    importance: Floats
    values: ActivationRange
    fold: FoldChoice
    losses: dict[QuantSpec, float]
    tokens: int | None = None


@dataclass(frozen=True)
class Survey:
    """Facts of every input by its name, and the mean KLD that rounding its readers alone causes (`divergences`; under
    the embedding's name that of the embedding); `tokens` is how much text it saw."""

    inputs: dict[str, InputFacts]
    divergences: dict[str, float]
    tokens: int

    def scales(self) -> dict[str, Floats]:
        """Channel scales of the inputs that are folded."""
        return {name: facts.fold.scales for name, facts in self.inputs.items() if facts.fold.scales is not None}


@dataclass
class State:
    """Where a survey stands: facts so far, and each probe's hidden states [T', D] before the next layer."""

    inputs: dict[str, InputFacts] = field(default_factory=dict)
    probes: dict[str, list[Floats]] = field(default_factory=dict)


def state_file(folder: Path, k: int) -> Path:
    """What is known before layer `k`."""
    return folder / f"before-{k}.npz"


def save_state(folder: Path, k: int, state: State) -> None:
    """Writes it whole or not at all."""
    arrays: dict[str, Any] = {}
    facts = {}
    for name, given in state.inputs.items():
        arrays[f"importance {name}"] = given.importance
        if given.fold.scales is not None:
            arrays[f"scales {name}"] = given.fold.scales
        figures = {key: value for key, value in asdict(given.fold).items() if key != "scales"}
        losses = [[asdict(spec), loss] for spec, loss in given.losses.items()]
        facts[name] = {"values": asdict(given.values), "fold": figures, "losses": losses, "tokens": given.tokens}
    for name, probe in state.probes.items():
        for k_piece, piece in enumerate(probe):
            arrays[f"probe {k_piece} {name}"] = piece
    told = {"inputs": facts, "arrays": sorted(arrays)}
    arrays["facts"] = np.frombuffer(json.dumps(told).encode(), np.uint8)
    with replacing(state_file(folder, k)) as fresh, fresh.open("wb") as file:
        np.savez(file, **arrays)


def load_state(folder: Path, k: int) -> State | None:
    """Reads back what `save_state` wrote for layer `k`; None where there is nothing, or it is damaged."""
    try:
        return _loaded(state_file(folder, k))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, NotImplementedError):
        return None
    except (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError):  # what zipfile raises of odd flags and fields
        return None


def _loaded(path: Path) -> State:
    """Every array has its CRC-32; their names stand among the facts."""
    state = State()
    with np.load(path, allow_pickle=False) as arrays:
        facts = json.loads(arrays["facts"].tobytes())
        if sorted({*arrays.files} - {"facts"}) != facts["arrays"]:
            raise ValueError(f"{path} lacks arrays")
        for name, entry in facts["inputs"].items():
            scales = arrays[f"scales {name}"] if f"scales {name}" in arrays else None
            losses = {QuantSpec(**spec): loss for spec, loss in entry["losses"]}
            fold, values = FoldChoice(scales, **entry["fold"]), ActivationRange(**entry["values"])
            state.inputs[name] = InputFacts(arrays[f"importance {name}"], values, fold, losses, entry["tokens"])
        for key in arrays.files:
            if key.startswith("probe "):
                state.probes.setdefault(key.split(" ", 2)[2], []).append(arrays[key])
    return state
