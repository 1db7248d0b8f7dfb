"""Which initializers a bundle holds, from which tensors, and where each lies, before a byte is read.

Sizes follow from the config and the rules alone, so every offset is known in advance and an interrupted pack
can go on where it stopped.
"""

from __future__ import annotations

from dataclasses import dataclass

from toolkit import names
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.weights import expected_tensors
from toolkit.quant.blockwise import QuantSpec
from toolkit.recipe import Recipe

_ALIGNMENT = 64


@dataclass(frozen=True)
class Slot:
    """One initializer's bytes in the data file; dtype is `float32` or `uint8`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Unit:
    """One matrix or vector of the graph: its sources are stacked by rows. `spec` None keeps float32.

    `slots` is (weight,) or (packed, scales[, zero_points]).
    """

    name: str
    sources: tuple[str, ...]
    rows: tuple[int, ...]
    width: int
    spec: QuantSpec | None
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class Layout:
    """Every unit by name, in file order, and the size of the data file."""

    units: dict[str, Unit]
    nbytes: int

    def weights(self) -> int:
        """How many weights its matrices hold; gains and biases are not counted."""
        return sum(sum(unit.rows) * unit.width for unit in self.matrices())

    def matrices(self) -> list[Unit]:
        """The units that are matrices."""
        return [unit for unit in self.units.values() if unit.spec is not None or len(unit.slots[0].shape) == 2]

    def bits_per_weight(self) -> float:
        """Scales and zero points included."""
        return 8 * sum(slot.nbytes for unit in self.matrices() for slot in unit.slots) / self.weights()


def plan_layout(config: ModelConfig, recipe: Recipe | None) -> Layout:
    """The layout for a recipe's rules; `recipe` None keeps every tensor float32."""
    shapes = expected_tensors(config)
    units: dict[str, Unit] = {}
    end = 0
    for name, sources in _groups(config, recipe):
        spec = _spec(sources[0], shapes, recipe)
        rows = tuple(shapes[source][0] for source in sources)
        width = shapes[sources[0]][1] if len(shapes[sources[0]]) == 2 else 1
        slots, end = _place(name, sum(rows), shapes[sources[0]], spec, end)
        units[name] = Unit(name, sources, rows, width, spec, slots)
    return Layout(units, end)


def _groups(config: ModelConfig, recipe: Recipe | None) -> list[tuple[str, tuple[str, ...]]]:
    """Unit names with their sources: q, k and v become one matrix where one spec and no q/k norm allow it."""
    groups: dict[str, tuple[str, ...]] = {}
    shapes = expected_tensors(config)
    for tensor in shapes:
        kind = ".bias" if tensor.endswith(".bias") else ".weight"
        role, prefix = names.role_of(tensor), tensor.rsplit(".", 2)[0]
        triple = tuple(f"{prefix}.{p}{kind}" for p in names.QKV_PROJECTIONS)
        same = role in names.QKV_PROJECTIONS and _packs_qkv(config, shapes, recipe, prefix)
        groups[f"{prefix}.qkv_proj{kind}" if same else tensor] = triple if same else (tensor,)
    return list(groups.items())


def _packs_qkv(
    config: ModelConfig, shapes: dict[str, tuple[int, ...]], recipe: Recipe | None, prefix: str
) -> bool:
    """Whether one matrix serves q, k and v of the attention at `prefix`: their specs must agree."""
    specs = {_spec(names.weight(f"{prefix}.{p}"), shapes, recipe) for p in names.QKV_PROJECTIONS}
    return not config.qk_norm and len(specs) == 1


def _spec(tensor: str, shapes: dict[str, tuple[int, ...]], recipe: Recipe | None) -> QuantSpec | None:
    if recipe is None or len(shapes[tensor]) != 2:
        return None
    rule = recipe.rule_for(tensor.removesuffix(".weight"))
    return QuantSpec(rule.bits, rule.block_size, rule.symmetric, rule.algorithm)


def _place(
    name: str, rows: int, shape: tuple[int, ...], spec: QuantSpec | None, end: int
) -> tuple[tuple[Slot, ...], int]:
    parts: list[tuple[str, str, tuple[int, ...]]]
    if spec is None:
        parts = [(name, "float32", (rows, *shape[1:]))]
    else:
        J = spec.num_blocks(shape[1])
        parts = [
            (f"{name}.packed", "uint8", (rows, J, spec.block_size * spec.bits // 8)),
            (f"{name}.scales", "float32", (rows, J)),
        ]
        if not spec.symmetric:
            parts.append((f"{name}.zero_points", "uint8", (rows, -(-J * spec.bits // 8))))
    slots = []
    for part, dtype, part_shape in parts:
        nbytes = 4 if dtype == "float32" else 1
        for extent in part_shape:
            nbytes *= extent
        offset = -(-end // _ALIGNMENT) * _ALIGNMENT
        slots.append(Slot(part, dtype, part_shape, offset, nbytes))
        end = offset + nbytes
    return tuple(slots), end
