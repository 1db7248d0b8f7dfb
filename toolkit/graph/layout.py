"""Which initializers a bundle holds, from which tensors, and in which data file each lies, before a byte is read.

Sizes follow from the config and the rules alone, so every offset is known in advance and an interrupted pack
can go on where it stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toolkit import names
from toolkit.checkpoint.anatomy import decoder_of
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.linears import Linear
from toolkit.checkpoint.sublayers import Attention
from toolkit.checkpoint.weights import expected_tensors
from toolkit.quant.blockwise import QuantSpec
from toolkit.quant.formats import StoredArray, floats_of, planned_specs, stored_arrays
from toolkit.recipe import Recipe
from toolkit.target import Form, Target

_ALIGNMENT = 64
_Group = tuple[str, tuple[str, ...], int]


@dataclass(frozen=True)
class Slot:
    """One initializer's bytes in its data file; dtype as `StoredArray` has it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Unit:
    """One matrix or vector of the graph: its sources are stacked by rows. `spec` None keeps floats.

    Where `by_turns` is more than 1 so many sources at a time, of equally many rows, have their rows by turns.
    `slots` is (weight,), (packed, scales[, zero_points]), or, where the spec is signed, (integers, scales,
    zero_points) with the input features first.
    """

    name: str
    sources: tuple[str, ...]
    rows: tuple[int, ...]
    width: int
    spec: QuantSpec | None
    slots: tuple[Slot, ...]
    by_turns: int = 1

    def place(self, k: int) -> slice:
        """Where the rows of its k-th source stand among its own."""
        first = sum(self.rows[: k - k % self.by_turns]) + k % self.by_turns
        return slice(first, first + self.rows[k] * self.by_turns, self.by_turns)

    def places(self) -> dict[str, slice]:
        """Where the rows of each source stand among its own."""
        return {source: self.place(k) for k, source in enumerate(self.sources)}


@dataclass(frozen=True)
class Layout:
    """Every unit by name, each file's in its order, and the size of each data file."""

    units: dict[str, Unit]
    files: dict[str, int]

    @property
    def nbytes(self) -> int:
        """The size of all data files in bytes."""
        return sum(self.files.values())

    def in_file(self, file: str) -> tuple[Unit, ...]:
        """The units of one data file, by offset. Two files with equal units have the same bytes."""
        return tuple(unit for unit in self.units.values() if unit.slots[0].file == file)

    def digest(self) -> str:
        """The SHA-256 of what lies where in which format: that of another layout is another."""
        return hashlib.sha256(repr(self).encode("utf-8")).hexdigest()

    def weights(self) -> int:
        """How many weights its matrices hold; gains and biases are not counted."""
        return sum(sum(unit.rows) * unit.width for unit in self.matrices())

    def matrices(self) -> list[Unit]:
        """Every unit that is a matrix: a bias or a norm's gain is none."""
        return [unit for unit in self.units.values() if unit.spec is not None or len(unit.slots[0].shape) == 2]

    def bits_per_weight(self) -> float:
        """Bits that a weight takes in all matrices together, scales and zero points included."""
        return 8 * sum(slot.nbytes for unit in self.matrices() for slot in unit.slots) / self.weights()


def plan_layout(
    config: ModelConfig, target: Target, recipe: Recipe | None, formats: Mapping[str, QuantSpec] | None = None
) -> Layout:
    """The layout for a recipe's rules; `recipe` None quantizes nothing. `formats` by tensor overrule the rules."""
    specs = {**planned_specs(config, recipe, target.form), **(formats or {})}
    shapes = expected_tensors(config)
    units: dict[str, Unit] = {}
    ends: dict[str, int] = {}
    for name, sources, by_turns in _groups(config, target, specs):
        spec = specs.get(sources[0])
        rows = tuple(shapes[source][0] for source in sources)
        shape = (sum(rows), *shapes[sources[0]][1:])
        file = target.data_file(names.role_of(name))
        arrays = stored_arrays(shape, spec, floats_of(name, target.form))
        slots, ends[file] = slots_from(name, arrays, file, ends.get(file, 0))
        units[name] = Unit(name, sources, rows, shape[1] if len(shape) == 2 else 1, spec, slots, by_turns)
    return Layout(units, ends)


def _groups(config: ModelConfig, target: Target, specs: Mapping[str, QuantSpec]) -> list[_Group]:
    """Unit names with their sources, and how many of these have their rows by turns: q, k and v become one matrix where
    target, specs and no q/k norm allow it, or k and v alone, the experts of a layer become two."""
    groups: dict[str, _Group] = {tensor: (tensor, (tensor,), 1) for tensor in expected_tensors(config)}
    for moe in decoder_of(config).moes:
        for module, by_expert in moe.stacks().items():
            stacked, by_turns = [linear for linears in by_expert for linear in linears], len(by_expert[0])
            for sources in zip(*(linear.tensors for linear in stacked), strict=True):
                name = module + sources[0].removeprefix(stacked[0].module)
                groups |= dict.fromkeys(sources, (name, sources, by_turns))
    for layer in decoder_of(config).layers:
        if isinstance(layer.attention, Attention):
            module, joined = _joined_heads(layer.attention, target.form, specs)
            for sources in zip(*(linear.tensors for linear in joined), strict=True):
                name = module + sources[0].removeprefix(joined[0].module)
                groups |= dict.fromkeys(sources, (name, sources, 1))
    return list(dict.fromkeys(groups.values()))


def _joined_heads(attention: Attention, form: Form, specs: Mapping[str, QuantSpec]) -> tuple[str, tuple[Linear, ...]]:
    """Which of an attention's q, k and v become one matrix, and the module's name; none where nothing allows it."""
    q, k, v = (specs.get(linear.weight) for linear in attention.qkv)
    if form.packed_qkv and not attention.head_norms and q == k == v:
        return attention.qkv_proj, attention.qkv
    if form.packed_kv and k == v:
        return attention.kv_proj, attention.qkv[1:]
    return "", ()


def slots_from(name: str, arrays: Sequence[StoredArray], file: str, end: int) -> tuple[tuple[Slot, ...], int]:
    """A unit's slots one after the other from `end` on, aligned, and where the last one ends."""
    slots = []
    for array in arrays:
        offset = -(-end // _ALIGNMENT) * _ALIGNMENT
        slots.append(Slot(name + array.suffix, array.dtype, array.shape, file, offset, array.nbytes))
        end = offset + array.nbytes
    return tuple(slots), end
