"""The last pass, where a recipe asks for it: scales of blocks and gains of norms follow the gradient of the mean KLD to
the checkpoint, while all integers stand.

GPTQ solves one matrix after the other; this looks at the end of the model, where errors of different matrices can make
up for each other. An eighth of the text is left out: what does not do better there is not taken.
T tokens, D hidden, N output features, J blocks a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.anatomy import decoder_of
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.weights import Tensors
from toolkit.device.arrays import Device
from toolkit.errors import RecipeError
from toolkit.quant.blockwise import QuantizedBlocks, QuantSpec, levels_of
from toolkit.reference.decoder import Layer, embed, read_layer, reference_hidden, rms_norm
from toolkit.target import Form

if TYPE_CHECKING:
    from toolkit.device.torch_gradients import TunedTensor

Floats = NDArray[np.float32]
# By how much Adam moves a factor at most in a step: on SmolLM2 .002 diverged, and .0003 took a seventh off the KLD in
# twenty steps (LOG.md).
_RATE: Final = 3e-4
# The first steps move less, while Adam knows little of the gradients' sizes.
_SHORTER_STEPS: Final = 5
# Of text for a step, and of sequences of which one is left out.
TOKENS_A_STEP: Final = 2048
_LEFT_OUT: Final = 8


class Stored(Tensors, Protocol):
    """A bundle's weights as they are stored, which can also be had as blocks."""

    def blocks(self, name: str) -> tuple[QuantizedBlocks, QuantSpec] | None:
        """A matrix as it is stored, None for a tensor of floats."""
        ...


@dataclass(frozen=True)
class Tuning:
    """`scales` [N, J] of matrices and `gains` [N] of norms by tensor, none where nothing was won, and the mean KLD of
    the weights on the `tokens` left out, before and after."""

    tokens: int
    kld_before: float
    kld_after: float
    scales: dict[str, Floats] = field(default_factory=dict)
    gains: dict[str, Floats] = field(default_factory=dict)


def check_tunable(config: ModelConfig, form: Form) -> None:
    """Raises RecipeError for a model or a form whose stored values have no gradients here."""
    if decoder_of(config).moes:
        raise RecipeError("tuning_steps is for models without experts: set tuning_steps=0")
    if config.structure.delta_net:
        raise RecipeError("tuning_steps is for models without linear attention, whose rule is numpy's: set it to 0")
    if form.qdq:
        raise RecipeError(
            "tuning_steps is for blocks with scales of their own, which this target's have not: set it to 0"
        )


def tune(
    config: ModelConfig,
    exact: Tensors,
    stored: Stored,
    sequences: Sequence[Sequence[int]],
    steps: int,
    on: Device,
    progress: Callable[[str], None] = lambda _: None,
) -> Tuning:
    """Returns what so many steps make of `stored`, on a device of torch; `exact` are the weights that it was made of.

    Raises RecipeError for a single sequence, of which none can be left out.
    """
    if len(sequences) < 2:
        raise RecipeError("tuning_steps needs a calibration text of two passages at least: one is left out")
    from toolkit.device.torch_gradients import Adam

    hidden = [on.from_host(x) for x in reference_hidden(config, exact, [list(ids) for ids in sequences], on=on)]
    head = on.from_host(exact.read(decoder_of(config).head.weight))
    texts = list(zip(sequences, hidden, strict=True))
    left_out, used = texts[::_LEFT_OUT], [text for k, text in enumerate(texts) if k % _LEFT_OUT]
    model = _TunedModel(config, stored, on, head)
    before = model.judged(left_out)
    adam, order = Adam(list(model.tuned.values()), _RATE), _Order(used)
    for step in range(steps):
        some = order.some()
        for text in some:
            model.learn(*text, 1 / sum(len(ids) for ids, _ in some))
        adam.step(min(1.0, (step + 1) / _SHORTER_STEPS) * (1 - step / steps))
        progress(f"tuned {step + 1}")
    after, tokens = model.judged(left_out), sum(len(ids) for ids, _ in left_out)
    if not after < before:
        return Tuning(tokens, before, before)
    made = {name: each.scales() for name, each in model.tuned.items()}
    gains = {name: found[:, 0] for name, found in made.items() if name in model.gains}
    return Tuning(tokens, before, after, {n: found for n, found in made.items() if n not in gains}, gains)


class _Order:
    """Texts in an order that is drawn anew each time that all were used."""

    def __init__(self, texts: Sequence[tuple[Sequence[int], Any]]) -> None:
        self._texts, self._left = texts, list[int]()
        self._generator = np.random.default_rng(0)

    def some(self) -> list[tuple[Sequence[int], Any]]:
        """Returns the next texts, enough for a step, or all that are left of this time."""
        if not self._left:
            self._left = self._generator.permutation(len(self._texts)).tolist()
        found: list[tuple[Sequence[int], Any]] = []
        while self._left and sum(len(ids) for ids, _ in found) < TOKENS_A_STEP:
            found.append(self._texts[self._left.pop()])
        return found


class _TunedModel:
    """What is stored, with `tuned` tensors of which some are `gains`, beside the checkpoint's head on the device."""

    def __init__(self, config: ModelConfig, stored: Stored, on: Device, exact_head: Floats) -> None:
        self._config, self._stored, self._on, self._exact_head = config, stored, on, exact_head
        self._decoder = decoder = decoder_of(config)
        self._layers = [read_layer(config, stored, k, on) for k in range(config.num_hidden_layers)]
        self.gains = {norm.weight for layer in decoder.layers for norm in layer.norms} | {decoder.norm.weight}
        names = {*self.gains, decoder.head.weight}
        for layer in self._layers:
            names |= {name for name, tensor in layer.tensors.items() if len(tensor.shape) == 2}
        read = {name: self._tuned(name) for name in sorted(names)}
        self.tuned = {name: each for name, each in read.items() if each is not None}

    def _tuned(self, name: str) -> TunedTensor | None:
        """None for a matrix of floats, which lost nothing."""
        from toolkit.device.torch_gradients import TunedTensor

        if name in self.gains:
            gain = self._stored.read(name)
            return TunedTensor(np.ones((gain.size, 1, 1), np.int8), self._on.from_host(gain[:, None]), gain.shape)
        if (found := self._stored.blocks(name)) is None:
            return None
        (blocks, spec), shape = found, self._decoder.tensors[name]
        levels = levels_of(blocks, spec).astype(np.int8 if spec.bits == 4 else np.int16)
        return TunedTensor(levels, self._on.from_host(blocks.scales), shape, spec.short_scales)

    def learn(self, ids: Sequence[int], exact: Floats, weight: float) -> None:
        """Collects the gradient of a text's KLD, summed over positions, times `weight`; `exact` [T, D] is where the
        checkpoint ends on it."""
        from toolkit.device.torch_gradients import divergence

        divergence(exact, self._exact_head, self._hidden(ids), self._tensor(self._decoder.head.weight), weight)

    def judged(self, texts: Sequence[tuple[Sequence[int], Floats]]) -> float:
        """Returns the mean KLD over all positions of some texts."""
        from toolkit.device.torch_gradients import divergence, without_gradients

        with without_gradients():
            head = self._tensor(self._decoder.head.weight)
            total = sum(divergence(exact, self._exact_head, self._hidden(ids), head) for ids, exact in texts)
        for each in self.tuned.values():
            each.forget()
        return total / sum(len(ids) for ids, _ in texts)

    def _hidden(self, ids: Sequence[int]) -> Floats:
        """[T, D] after the final norm."""
        from toolkit.device.torch_gradients import looked_up

        config, table = self._config, self._decoder.embedding.weight
        if table in self.tuned:
            x = looked_up(self._tensor(table), ids)
        else:
            x = self._on.from_host(embed(self._stored, list(ids)))
        for layer in self._layers:
            tensors = {name: self._tensor(name, kept) for name, kept in layer.tensors.items()}
            x = Layer(config, layer.anatomy, tensors, self._on)(x)
        return rms_norm(x, self._tensor(self._decoder.norm.weight), config.stream_eps)

    def _tensor(self, name: str, kept: Floats | None = None) -> Any:
        """A tuned tensor, or one that stands: as `kept`, or as it is stored."""
        if name in self.tuned:
            return self.tuned[name].tensor()
        return self._on.from_host(self._stored.read(name)) if kept is None else kept
