"""Which initializers a bundle holds, from which tensors, and in which data file each lies, before a byte is read.

Sizes follow from the config and the rules alone, so every offset is known in advance and an interrupted pack
can go on where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from toolkit import names
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.weights import expected_tensors
from toolkit.errors import RecipeError
from toolkit.quality import CALIBRATED_ALGORITHMS, QUALITIES
from toolkit.quant.blockwise import QuantSpec
from toolkit.recipe import Recipe
from toolkit.target import Form, Target

_ALIGNMENT = 64
_ITEM_BITS = {"float32": 32, "float16": 16, "uint8": 8, "int8": 8, "int4": 4}
# Blocks that QNN takes, where the rule's does not divide a width.
_SIGNED_BLOCKS: Final = (64, 32)


@dataclass(frozen=True)
class Slot:
    """One initializer's bytes in its data file; dtype is `float32`, `float16`, `uint8`, `int8` or `int4`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Unit:
    """One matrix or vector of the graph: its sources are stacked by rows. `spec` None keeps floats.

    `slots` is (weight,), (packed, scales[, zero_points]), or, where the spec is signed, (integers, scales,
    zero_points) with the input features first.
    """

    name: str
    sources: tuple[str, ...]
    rows: tuple[int, ...]
    width: int
    spec: QuantSpec | None
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class Layout:
    """Every unit by name, each file's in its order, and the size of each data file."""

    units: dict[str, Unit]
    files: dict[str, int]

    @property
    def nbytes(self) -> int:
        """Of all data files."""
        return sum(self.files.values())

    def in_file(self, file: str) -> tuple[Unit, ...]:
        """The units of one data file, by offset. Two files with equal units have the same bytes."""
        return tuple(unit for unit in self.units.values() if unit.slots[0].file == file)

    def weights(self) -> int:
        """How many weights its matrices hold; gains and biases are not counted."""
        return sum(sum(unit.rows) * unit.width for unit in self.matrices())

    def matrices(self) -> list[Unit]:
        """The units that are matrices."""
        return [unit for unit in self.units.values() if unit.spec is not None or len(unit.slots[0].shape) == 2]

    def bits_per_weight(self) -> float:
        """Scales and zero points included."""
        return 8 * sum(slot.nbytes for unit in self.matrices() for slot in unit.slots) / self.weights()


def plan_layout(
    config: ModelConfig, target: Target, recipe: Recipe | None, formats: Mapping[str, QuantSpec] | None = None
) -> Layout:
    """The layout for a recipe's rules; `recipe` None quantizes nothing. `formats` by tensor overrule the rules."""
    specs = {**planned_specs(config, recipe, target.form), **(formats or {})}
    shapes = expected_tensors(config)
    units: dict[str, Unit] = {}
    ends: dict[str, int] = {}
    for name, sources in _groups(config, target, specs):
        spec = specs.get(sources[0])
        rows = tuple(shapes[source][0] for source in sources)
        shape = (sum(rows), *shapes[sources[0]][1:])
        file = target.data_file(names.role_of(name))
        dtype = "float32" if names.role_of(name) in names.OUTSIDE_ROLES else target.form.activations
        parts = _parts(name, shape, spec, dtype)
        slots, ends[file] = _place(parts, file, ends.get(file, 0))
        units[name] = Unit(name, sources, rows, shape[1] if len(shape) == 2 else 1, spec, slots)
    return Layout(units, ends)


def planned_specs(config: ModelConfig, recipe: Recipe | None, form: Form) -> dict[str, QuantSpec]:
    """The format of every matrix by its rule, and the recipe's quality where the rule leaves the algorithm to it."""
    if recipe is None:
        return {}
    specs = {}
    for name, shape in expected_tensors(config).items():
        if len(shape) == 2:
            spec = _spec(name, config, recipe)
            signed = form.qdq and names.role_of(name) not in names.OUTSIDE_ROLES
            specs[name] = _signed(spec, shape[1], form) if signed else spec
    return specs


def _signed(spec: QuantSpec, columns: int, form: Form) -> QuantSpec:
    """The same for DequantizeLinear: blocks that divide the row, or the row as one."""
    sizes = [size for size in (spec.block_size, *_SIGNED_BLOCKS) if columns % size == 0]
    whole = form.row_scales or spec.bits == 8 or not sizes
    return replace(spec, block_size=columns if whole else sizes[0], symmetric=True, signed=True)


def _spec(tensor: str, config: ModelConfig, recipe: Recipe) -> QuantSpec:
    """GPTQ is for 4-bit matrices that read an input: 8 bits leave it nothing to do, and rows of an embedding are
    looked up. Raises RecipeError for an embedding whose last block is not whole: GatherBlockQuantized, which has no
    attribute for the width, would look up rows that are too long."""
    rule = recipe.rule_for(tensor.removesuffix(".weight"))
    if names.role_of(tensor) == "embed_tokens" and config.hidden_size % rule.block_size:
        raise RecipeError(
            f"{tensor} in blocks of {rule.block_size}: hidden_size {config.hidden_size} is not a multiple of it; give "
            "model.embed_tokens a rule with a smaller block_size"
        )
    algorithm = QUALITIES[recipe.quality].algorithm if rule.algorithm == "auto" else rule.algorithm
    if names.role_of(tensor) == "embed_tokens" and algorithm in CALIBRATED_ALGORITHMS:
        algorithm = "imatrix" if config.tie_word_embeddings else "kquant"
    elif algorithm == "gptq" and rule.bits != 4:
        algorithm = "imatrix"
    return QuantSpec(rule.bits, rule.block_size, rule.symmetric, algorithm)


def _groups(config: ModelConfig, target: Target, specs: Mapping[str, QuantSpec]) -> list[tuple[str, tuple[str, ...]]]:
    """Unit names with their sources: q, k and v become one matrix where target, specs and no q/k norm allow it."""
    groups: dict[str, tuple[str, ...]] = {}
    shapes = expected_tensors(config)
    for tensor in shapes:
        kind = ".bias" if tensor.endswith(".bias") else ".weight"
        role, prefix = names.role_of(tensor), tensor.rsplit(".", 2)[0]
        triple = tuple(f"{prefix}.{p}{kind}" for p in names.QKV_PROJECTIONS)
        packs = target.form.packed_qkv and role in names.QKV_PROJECTIONS
        same = packs and _packs_qkv(config, specs, prefix)
        groups[f"{prefix}.qkv_proj{kind}" if same else tensor] = triple if same else (tensor,)
    return list(groups.items())


def _packs_qkv(config: ModelConfig, specs: Mapping[str, QuantSpec], prefix: str) -> bool:
    """Whether one matrix serves q, k and v of the attention at `prefix`: their specs must agree."""
    kinds = {specs.get(names.weight(f"{prefix}.{p}")) for p in names.QKV_PROJECTIONS}
    return not config.qk_norm and len(kinds) == 1


def _parts(
    name: str, shape: tuple[int, ...], spec: QuantSpec | None, dtype: str
) -> list[tuple[str, str, tuple[int, ...]]]:
    """(initializer, dtype, shape) of a unit's slots; `dtype` is that of its floats."""
    if spec is None:
        return [(name, dtype, shape)]
    rows, J = shape[0], spec.num_blocks(shape[1])
    if spec.signed:
        scales = (rows,) if J == 1 else (J, rows)
        integers = f"int{spec.bits}"
        return [
            (f"{name}.integers", integers, (shape[1], rows)),
            (f"{name}.scales", dtype, scales),
            (f"{name}.zero_points", integers, scales),
        ]
    parts: list[tuple[str, str, tuple[int, ...]]] = [
        (f"{name}.packed", "uint8", (rows, J, spec.block_size * spec.bits // 8)),
        (f"{name}.scales", dtype, (rows, J)),
    ]
    if not spec.symmetric:
        parts.append((f"{name}.zero_points", "uint8", (rows, -(-J * spec.bits // 8))))
    return parts


def _place(parts: list[tuple[str, str, tuple[int, ...]]], file: str, end: int) -> tuple[tuple[Slot, ...], int]:
    slots = []
    for part, dtype, shape in parts:
        nbytes = -(-math.prod(shape) * _ITEM_BITS[dtype] // 8)
        offset = -(-end // _ALIGNMENT) * _ALIGNMENT
        slots.append(Slot(part, dtype, shape, file, offset, nbytes))
        end = offset + nbytes
    return tuple(slots), end
