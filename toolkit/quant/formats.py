"""Which format each matrix gets, from the recipe's rules and quality and the target's form, and what a format weighs.

A format is a `QuantSpec`; None keeps floats. Data files are laid out, budgets spent and texts measured by what stands
here. N output features (rows), K input features (columns), J blocks a row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

from toolkit import names
from toolkit.algorithms import MatrixUse
from toolkit.checkpoint.anatomy import decoder_of
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.family import Latent
from toolkit.checkpoint.sublayers import Moe
from toolkit.checkpoint.weights import expected_tensors
from toolkit.errors import RecipeError
from toolkit.quant.blockwise import QuantSpec
from toolkit.recipe import QuantRule, Recipe, nearest
from toolkit.target import TARGETS, Form

_ITEM_BITS: Final = {"float32": 32, "float16": 16, "bfloat16": 16, "uint8": 8, "int8": 8, "int4": 4}
# Blocks that QNN takes, where the rule's does not divide a width; it computes those of 8 wrongly, in silence, and so an
# odd number of blocks of 16 (LOG.md): a width in blocks is a multiple of 32.
_SIGNED_BLOCKS: Final = (64, 32, 16)
_SIGNED_WIDTH: Final = 32
# Blocks that a budget chooses from; narrower ones, which a CPU multiplies more slowly, where the rules have some.
_BLOCK_SIZES: Final = (32, 64, 128)


@dataclass(frozen=True)
class StoredArray:
    """One of the arrays that a matrix or vector is stored as; dtype is `float32`, `float16`, `bfloat16`,
    `uint8`, `int8` or `int4`."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size in bytes; of int4 two values are one byte."""
        return -(-math.prod(self.shape) * _ITEM_BITS[self.dtype] // 8)


def stored_arrays(shape: tuple[int, ...], spec: QuantSpec | None, floats: str) -> list[StoredArray]:
    """What a tensor of `shape` [N, K] or [N] is stored as, its floats of dtype `floats`: the weight alone, or packed
    blocks, scales and zero points, or, where the format is signed, integers, scales and zero points with the input
    features first."""
    if spec is None:
        return [StoredArray("", floats, shape)]
    N, J = shape[0], spec.num_blocks(shape[1])
    if spec.signed:
        scales, integers = (N,) if J == 1 else (J, N), f"int{spec.bits}"
        return [
            StoredArray(".integers", integers, (shape[1], N)),
            StoredArray(".scales", floats, scales),
            StoredArray(".zero_points", integers, scales),
        ]
    arrays = [
        StoredArray(".packed", "uint8", (N, J, spec.block_size * spec.bits // 8)),
        StoredArray(".scales", "bfloat16" if spec.short_scales else floats, (N, J)),
    ]
    if not spec.symmetric:
        arrays.append(StoredArray(".zero_points", "uint8", (N, -(-J * spec.bits // 8))))
    return arrays


def stored_bytes(shape: tuple[int, ...], spec: QuantSpec | None, floats: str) -> int:
    """The bytes of all arrays of a tensor."""
    return sum(array.nbytes for array in stored_arrays(shape, spec, floats))


def floats_of(tensor: str, form: Form) -> str:
    """The dtype of a tensor's floats: float32 outside the transformer, the form's within."""
    return "float32" if names.role_of(tensor) in names.OUTSIDE_ROLES else form.activations


def planned_specs(config: ModelConfig, recipe: Recipe | None, form: Form) -> dict[str, QuantSpec]:
    """The format of every matrix by its tensor name; none without a recipe. A layer's experts have that of the first
    one's gate_proj.

    Raises RecipeError for a matrix that no rule decides, or whose rule its operator cannot serve.
    """
    if recipe is None:
        return {}
    # A plan asks five times, and its recipe learns of parts and thresholds in between.
    return dict(_planned_specs(config, replace(recipe, parts=0, validate={}), form))


@lru_cache(maxsize=4)
def _planned_specs(config: ModelConfig, recipe: Recipe, form: Form) -> Mapping[str, QuantSpec]:
    of_experts: dict[str, QuantSpec] = {}
    for moe in decoder_of(config).moes:
        first = moe.experts[0].gate_proj
        of_experts |= _of_experts(moe, _spec(first.weight, first.tensors[first.weight], config, recipe, form))
    return {
        name: of_experts[name] if name in of_experts else _spec(name, shape, config, recipe, form)
        for name, shape in _matrices(config).items()
    }


def _of_experts(moe: Moe, spec: QuantSpec) -> dict[str, QuantSpec]:
    """The one format of a layer's experts, since one operator computes them; its blocks are whole.

    Raises RecipeError for other bits than 4, and for a block that divides no expert's width.
    """
    first = moe.experts[0].gate_proj
    if spec.bits != 4:
        # ONNX Runtime 1.32 computes experts of 8 bits with an error of a hundredth, whatever their input.
        raise RecipeError(f"{first.module} in {spec.bits} bits: experts have 4, give *.experts.* a rule of its own")
    for width in (first.in_features, first.out_features):
        if width % spec.block_size:
            raise RecipeError(
                f"{first.module} in blocks of {spec.block_size}: experts {width} wide have whole blocks alone; give "
                "*.experts.* a rule with a smaller block_size"
            )
    return {linear.weight: spec for given in moe.inputs if given.routed for linear in given.linears}


def budget_blocks(specs: Iterable[QuantSpec]) -> tuple[int, ...]:
    """Returns the block sizes that a budget over matrices of these formats chooses from."""
    narrower = {spec.block_size for spec in specs if spec.bits == 4 and spec.block_size < _BLOCK_SIZES[0]}
    return (*sorted(narrower), *_BLOCK_SIZES)


def other_formats(
    spec: QuantSpec, columns: int, use: MatrixUse = MatrixUse.LINEAR, block_sizes: Sequence[int] = _BLOCK_SIZES
) -> list[QuantSpec]:
    """What a budget may store a matrix as: its own format, and for 4 bits blocks of other sizes and 8 bits.

    Blocks are whole wherever the rule's are, since some execution providers take no other. A signed matrix may have 8
    bits with a scale a row.
    """
    if spec.bits != 4:
        return [spec]
    wide = replace(spec, bits=8, algorithm=spec.rounded_by.suited(8, use).name)
    if spec.signed:
        sizes = [b for b in block_sizes if columns % b == 0] if spec.block_size < columns else []
        narrower = [replace(spec, block_size=b) for b in sizes if b != spec.block_size]
        return [spec, *narrower, replace(wide, block_size=columns)]
    whole = columns % spec.block_size == 0
    sizes = [b for b in block_sizes if b != spec.block_size and (columns % b == 0 or not whole)]
    wide_sizes = [b for b in _BLOCK_SIZES if columns % b == 0 or not whole] or [spec.block_size]
    narrower = [replace(spec, block_size=b) for b in sizes]
    return [spec, *narrower, *(replace(wide, block_size=b) for b in {wide_sizes[0], wide_sizes[-1]})]


def check_rules(config: ModelConfig, recipe: Recipe) -> None:
    """Raises RecipeError for a rule that decides nothing: a name no matrix has, or one that earlier rules have taken.

    A rule for `lm_head` stands where the head is tied to the embedding, and so do a `*` that finds nothing left, and a
    rule that also names linears of the attention of other families: a list of rules for many checkpoints says such.
    So does the target's own list.
    """
    if recipe.bits_per_weight and decoder_of(config).moes:
        raise RecipeError(
            f"recipe {recipe.name}: bits_per_weight is for models without experts, whose formats are not chosen by a "
            "budget: set bits_per_weight=0"
        )
    modules = [tensor.removesuffix(".weight") for tensor in _matrices(config)]
    left, own = set(modules), TARGETS[recipe.target].own_matches
    for k, rule in enumerate(recipe.quantize):
        known = [*modules, names.LM_HEAD]
        if any(map(rule.matches, known)):
            known += _of_other_attention(config)
        for glob in rule.globs():
            if rule.match not in own and not any(map(QuantRule(glob).matches, known)):
                near = nearest(glob, _spellings(modules))
                raise RecipeError(f"recipe {recipe.name}: rule {k + 1} matches no module: {glob!r}{near}")
        taken = {module for module in modules if rule.matches(module)}
        if taken and not taken & left and "*" not in rule.globs():
            first = next(n for n, other in enumerate(recipe.quantize) if any(map(other.matches, taken)))
            raise RecipeError(
                f"recipe {recipe.name}: rule {k + 1} ({rule.match!r}) decides nothing, since rule {first + 1} "
                f"({recipe.quantize[first].match!r}) comes before it: the first match wins, so put it earlier"
            )
        left -= taken


def _of_other_attention(config: ModelConfig) -> list[str]:
    """The linears that attention would have through a latent if it has none, and without one if it has one."""
    latent = None if config.structure.latent else Latent(1, 1, 1, 1, 1)
    structure = replace(config.structure, latent=latent, delta_net=None)
    other = replace(config, structure=structure, num_hidden_layers=1)
    return [module for given in decoder_of(other).layers[0].attention.inputs for module in given.readers]


def idle_rules(config: ModelConfig, recipe: Recipe) -> list[str]:
    """Returns a line for each rule that matches the LM head alone, and so decides nothing, where the head is the
    embedding's table."""
    if not config.tie_word_embeddings:
        return []
    return [
        f"rule {k + 1} ({rule.match!r}) decides nothing: the head is tied to {names.EMBED_TOKENS}, whose rule holds"
        for k, rule in enumerate(recipe.quantize)
        if rule.matches(names.LM_HEAD)
        and not any(rule.matches(tensor.removesuffix(".weight")) for tensor in _matrices(config))
    ]


@lru_cache(maxsize=16)
def _matrices(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    exact = decoder_of(config).exact_matrices
    return {name: shape for name, shape in expected_tensors(config).items() if len(shape) == 2 and name not in exact}


def _spellings(modules: Sequence[str]) -> list[str]:
    """What a rule may have meant: the modules, any layer's, and any module of that role."""
    any_layer = {re.sub(r"\.\d+\.", ".*.", module) for module in modules}
    roles = {names.role_of(module) for module in modules} - set(names.OUTSIDE_ROLES)
    return [names.LM_HEAD, *sorted(any_layer), *(f"*.{role}" for role in sorted(roles)), *modules]


def _spec(tensor: str, shape: tuple[int, ...], config: ModelConfig, recipe: Recipe, form: Form) -> QuantSpec:
    """A matrix' format by its rule, and as its operator and execution provider take it; raises as `matrix_spec`."""
    spec = matrix_spec(tensor, shape, use_of(tensor, config), recipe, form)
    return _signed(spec, shape[1], form) if form.qdq and names.role_of(tensor) not in names.OUTSIDE_ROLES else spec


def matrix_spec(tensor: str, shape: tuple[int, ...], use: MatrixUse, recipe: Recipe, form: Form) -> QuantSpec:
    """The format of a matrix [N, K] of this use by its rule.

    Raises RecipeError for an embedding whose last block is not whole: GatherBlockQuantized, which has no attribute for
    the width, would look up rows that are too long.
    """
    rule = recipe.rule_for(tensor.removesuffix(".weight"))
    block_size = rule.block_size
    assert isinstance(block_size, int), "a plan replaces what is left to the model's size"
    if use is not MatrixUse.LINEAR and shape[1] % block_size:
        raise RecipeError(
            f"{tensor} in blocks of {block_size}: hidden_size {shape[1]} is not a multiple of it; give "
            f"{tensor.removesuffix('.weight')} a rule with a smaller block_size"
        )
    algorithm = recipe.algorithm_of(rule, use).suited(rule.bits, use)
    outside = names.role_of(tensor) in names.OUTSIDE_ROLES
    short = form.short_outside if outside else form.short_scales
    return QuantSpec(rule.bits, block_size, rule.symmetric, algorithm.name, short_scales=short)


def use_of(tensor: str, config: ModelConfig) -> MatrixUse:
    """Whether a matrix is multiplied, looked up, or both."""
    if names.role_of(tensor) != names.role_of(names.EMBED_TOKENS):
        return MatrixUse.EXPERT if names.is_expert(tensor) else MatrixUse.LINEAR
    return MatrixUse.TIED_EMBEDDING if config.tie_word_embeddings else MatrixUse.EMBEDDING


def _signed(spec: QuantSpec, columns: int, form: Form) -> QuantSpec:
    """The same for DequantizeLinear: blocks that divide the row, or the row as one.

    A row of an odd number of 4-bit values ends in one that is not stored: while it is made, two share a byte.
    """
    sizes = [size for size in (spec.block_size, *_SIGNED_BLOCKS) if columns % max(size, _SIGNED_WIDTH) == 0]
    whole = form.row_scales or spec.bits == 8 or not sizes
    row = columns + columns % 2 if spec.bits == 4 else columns
    return replace(spec, block_size=row if whole else sizes[0], symmetric=True, signed=True, short_scales=False)
