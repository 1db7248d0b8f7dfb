"""The first pass over the text: what each input of a linear looks like, and what follows for the formats.

One layer is in memory at a time. For each input: second moments (imatrix), channel scales (AWQ), the error of the
output in each format, and, where a budget is to be spent, the divergence that rounding its readers alone causes at the
model's end. For that each input starts a probe, a copy of some of the text that goes on from there with the rounding
in it; the probes of all layers run side by side, so that one pass serves them all.
Every finished layer is kept on disk, and an interrupted survey goes on after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit import names
from toolkit.algorithms import MatrixUse
from toolkit.calibrate.activations import ActivationFile
from toolkit.calibrate.exact import ExactInputs
from toolkit.calibrate.expert_pieces import seen_elsewhere
from toolkit.calibrate.experts import routed_facts
from toolkit.calibrate.facts import InputFacts, State, Survey, load_state, save_state, state_file
from toolkit.calibrate.ladder import SharedFormat
from toolkit.calibrate.pieces import each, through
from toolkit.calibrate.search import Searched, input_facts
from toolkit.calibrate.statistics import InputStatistics
from toolkit.checkpoint.anatomy import decoder_of
from toolkit.checkpoint.config import ModelConfig
from toolkit.checkpoint.linears import Linear, LinearInput
from toolkit.checkpoint.sublayers import Moe
from toolkit.checkpoint.weights import Tensors
from toolkit.device.arrays import Device
from toolkit.device.fitting import ON_NUMPY, Fitting, Pool
from toolkit.quant.activations import InputSample, Rounding, rounded_input
from toolkit.quant.awq import FoldChoice, Reader, thinned_rows
from toolkit.quant.blockwise import QuantSpec, dequantize_blocks, quantize_blocks
from toolkit.quant.formats import budget_blocks, other_formats, use_of
from toolkit.quant.ranges import ActivationRange
from toolkit.reference.decoder import Layer, Look, batched, by_batches, embed, read_layer, rms_norm, through_layer
from toolkit.reference.divergence import Diverging, mean_divergences
from toolkit.reference.shared import share_layer

Floats = NDArray[np.float32]
_PROBE_TOKENS: Final = (128, 2048)


@dataclass(frozen=True)
class Wish:
    """What a survey is for. `specs` has each matrix' format by its rule; `rounding` is what the bundle does to the
    input of a linear in a layer, and `head_rounding` to the head's; `folds` allows channel scales, `folds_head` the
    LM head's too, `probes` measures divergences."""

    specs: Mapping[str, QuantSpec]
    rounding: Rounding
    head_rounding: Rounding
    folds: bool
    probes: bool
    folds_head: bool = True


@dataclass(frozen=True)
class Surveyed:
    """What is found after so many `layers`; `step` names what was done for it, and is empty where that was done in an
    earlier run."""

    step: str
    layers: int
    found: Survey


def survey(
    config: ModelConfig,
    source: Tensors,
    sequences: Sequence[Sequence[int]],
    wish: Wish,
    folder: Path,
    progress: Callable[[str], None] = lambda _: None,
    fitting: Fitting = ON_NUMPY,
) -> Survey:
    """Runs the text through the model, layer by layer, on a device; `folder` holds what is finished.

    Raises NonFiniteError if an activation is NaN or infinite.
    """
    done = Surveyed("", 0, Survey({}, {}, 0))
    for done in survey_by_layers(config, source, sequences, wish, folder, fitting):
        if done.step:
            progress(done.step)
    return done.found


def survey_by_layers(
    config: ModelConfig,
    source: Tensors,
    sequences: Sequence[Sequence[int]],
    wish: Wish,
    folder: Path,
    fitting: Fitting = ON_NUMPY,
    kept: ExactInputs | None = None,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Surveyed]:
    """Yields what is found so far: once for the layers done before, after each layer, and after the head. What linears
    of the layers read is `kept` where that is asked for. `check` is called now and then, and may raise to stop it.

    Raises NonFiniteError if an activation is NaN or infinite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lengths = [len(ids) for ids in sequences]
    streams, start = _streams(config, lengths, folder), layers_surveyed(config, lengths, folder)
    state = load_state(folder, start)
    if state is None:
        start, state = 0, State()
        streams[0].write(embed(source, list(ids)) for ids in sequences)
        if wish.probes:
            state.probes = _first_probes(config, source, sequences, wish)
    pass_over = _Pass(config, source, lengths, wish, kept, fitting.pool, check)
    yield Surveyed("", start, Survey({**state.inputs}, {}, sum(lengths)))
    for k in range(start, config.num_hidden_layers):
        fitting.run(f"layer {k}", partial(pass_over.layer, k, streams[k], streams[k + 1], state))
        save_state(folder, k + 1, state)
        streams[k].remove()
        state_file(folder, k).unlink(missing_ok=True)
        yield Surveyed(f"calibrated layer {k}", k + 1, Survey({**state.inputs}, {}, sum(lengths)))
    divergences = fitting.run("the LM head", partial(pass_over.head, streams[-1], state))
    yield Surveyed("calibrated head", config.num_hidden_layers, Survey({**state.inputs}, divergences, sum(lengths)))


def layers_surveyed(config: ModelConfig, lengths: Sequence[int], folder: Path) -> int:
    """Returns after how many layers a survey of sequences of these lengths goes on."""
    streams = _streams(config, lengths, folder)
    begun = (k for k in range(len(streams) - 1, -1, -1) if streams[k].is_whole() and state_file(folder, k).is_file())
    return next(begun, 0)


def _streams(config: ModelConfig, lengths: Sequence[int], folder: Path) -> list[ActivationFile]:
    """The residual stream before each layer, and behind the last."""
    return [
        ActivationFile(folder / f"hidden-{k}.f32", batched(lengths), config.hidden_size)
        for k in range(config.num_hidden_layers + 1)
    ]


def shared_formats(
    config: ModelConfig, specs: Mapping[str, QuantSpec], shapes: Mapping[str, tuple[int, ...]], found: Survey
) -> list[SharedFormat]:
    """Matrices that share a format, with what the survey measured of them. Readers of an input that the rules give
    another format than its first one keep that: what the input's probe says is put down to those that are like the
    first."""
    decoder, made = decoder_of(config), list[SharedFormat]()
    groups = [(given.name, tuple(linear.weight for linear in given.linears)) for given in decoder.inputs]
    if not config.tie_word_embeddings:
        groups.append((decoder.embedding.module, (decoder.embedding.weight,)))
    for name, tensors in groups:
        first = specs[tensors[0]]
        for spec in dict.fromkeys(specs[tensor] for tensor in tensors):
            alike = tuple(tensor for tensor in tensors if specs[tensor] == spec)
            sizes = tuple((shapes[tensor][0], shapes[tensor][1]) for tensor in alike)
            measured = (found.divergences[name], found.inputs[name].losses) if spec == first else (0.0, {spec: 0.0})
            made.append(SharedFormat(alike, sizes, spec, *measured))
    return made


class _Pass:
    """One layer after the other, each on a device with so many tokens at a time."""

    def __init__(
        self,
        config: ModelConfig,
        source: Tensors,
        lengths: Sequence[int],
        wish: Wish,
        kept: ExactInputs | None,
        pool: Pool | None,
        check: Callable[[], None],
    ) -> None:
        self._pool, self._check = pool, check
        self._config, self._source, self._lengths, self._wish, self._kept = config, source, lengths, wish, kept

    def layer(
        self, k: int, before: ActivationFile, after: ActivationFile, state: State, on: Device, tokens: int
    ) -> None:
        """Statistics of the layer's inputs, its folds and losses, and every probe one layer further."""
        layer = read_layer(self._config, self._source, k, on)
        inputs = layer.anatomy.inputs
        text = sum(self._lengths)
        seen = {g.name: InputStatistics(g.name, g.width, text, sampled=not g.routed) for g in inputs}
        batches = before.read_by(on, batched(self._lengths, tokens))
        with ExitStack() as files:
            keep = {given.name: self._keeping(given, files) for given in inputs if not given.routed}
            if self._pool:
                after.write(self._by_workers(layer, k, batches, seen, keep))
            else:
                after.write(_through(layer, batches, seen, keep, self._check))
        searched = dict[str, Searched]()
        for given in (given for given in inputs if not given.routed):
            read = {linear.module: on.to_host(thinned_rows(layer.tensors[linear.weight])) for linear in given.linears}
            sample = seen[given.name].sample(on)
            searched[given.name] = self._searched(given, sample, read, self._wish.rounding)
        self._check()
        facts = dict(zip(searched, each(self._pool, input_facts, None, searched.values()), strict=True))
        for given in inputs:
            state.inputs[given.name] = facts.get(given.name) or routed_facts(seen[given.name])
        if not self._wish.probes:
            return
        exact = state.probes[""]
        fresh = {}
        for given in inputs:
            rounded = _RoundedLayer(layer)
            for linear in given.linears:
                rounded.round(linear, self._wish.specs[linear.weight], state.inputs[given.name], self._wish.rounding)
            fresh[given.name] = through_layer(rounded, exact, tokens)
        state.probes = {name: through_layer(layer, x, tokens) for name, x in state.probes.items()} | fresh

    def _by_workers(
        self,
        layer: Layer,
        k: int,
        batches: ActivationFile,
        seen: dict[str, InputStatistics],
        keep: Mapping[str, Callable[[Floats], Floats]],
    ) -> Iterator[Floats]:
        """Sequences that workers take through a layer, or as far as its experts, which they have with the tokens of the
        whole text."""
        assert self._pool
        shared, moe = share_layer(self._config, self._source, k), layer.anatomy.mlp
        found = self._pool.map(through, shared, list(batches))
        passed = (_counted(x, values, seen, keep) for x, values in found)
        if not isinstance(moe, Moe):
            return passed
        layer.elsewhere = seen_elsewhere(self._pool, shared, seen)
        return iter([layer.through(moe, np.concatenate(list(passed)), look=_looking(seen, keep, self._check))])

    def head(self, before: ActivationFile, state: State, on: Device, tokens: int) -> dict[str, float]:
        """The head's facts; the divergence of every probe."""
        config, source, decoder = self._config, self._source, decoder_of(self._config)
        norm = source.read(decoder.norm.weight)
        given, gain = decoder.head_input, on.from_host(norm)
        if not self._wish.folds_head:
            given = replace(given, writer=None)
        statistics = InputStatistics(given.name, given.width, sum(self._lengths))
        with ExitStack() as files:
            keep = self._keeping(given, files)
            for x, _ in before.read_by(on, batched(self._lengths, tokens)):
                statistics.add(keep(rms_norm(x, gain, config.stream_eps)))
        rows = _spread_rows(source, names.weight(given.name), config.vocab_size)
        sample = statistics.sample(on)
        searched = self._searched(given, sample, {given.name: rows}, self._wish.head_rounding)
        state.inputs[given.name] = input_facts(None, searched)
        if not config.tie_word_embeddings:
            rows = _spread_rows(source, names.weight(names.EMBED_TOKENS), config.vocab_size)
            state.inputs[names.EMBED_TOKENS] = _embedding_facts(rows, self._wish.specs)
        if not self._wish.probes:
            return {}
        ended = {name: rms_norm(np.concatenate(probe), norm, config.stream_eps) for name, probe in state.probes.items()}
        exact = ended.pop("")
        others = {name: Diverging(hidden) for name, hidden in ended.items()}
        others[given.name] = self._rounded_head(given, ended.get(given.name, exact), state.inputs[given.name])
        return mean_divergences(config, source, exact, others, on)

    def _keeping(self, given: LinearInput, files: ExitStack) -> Callable[[Floats], Floats]:
        """What takes an input's values as they come, and gives them back; its file is whole when `files` end."""
        return files.enter_context(self._kept.file(given).filling()) if self._kept else lambda x: x

    def _rounded_head(self, given: LinearInput, arriving: Floats, facts: InputFacts) -> Diverging:
        """What arrives at the head [T, D] and its rows, as the bundle will have them."""
        spec, rounding = self._wish.specs[names.weight(given.name)], self._wish.head_rounding
        scales = facts.fold.scales if facts.fold.scales is not None else np.ones(given.width, np.float32)

        def rounded(rows: Floats) -> Floats:
            return dequantize_blocks(quantize_blocks(rows * scales, spec, facts.importance), spec, rows.shape[1])

        return Diverging(rounded_input(arriving / scales, rounding, spec.block_size, facts.values), rounded)

    def _searched(
        self, given: LinearInput, sample: InputSample, read: Mapping[str, Floats], rounding: Rounding
    ) -> Searched:
        wish = self._wish
        specs = {reader: wish.specs[names.weight(reader)] for reader in given.readers}
        readers = tuple(Reader(thinned_rows(read[reader]), specs[reader]) for reader in given.readers)
        # What uint16 does to an input is nothing that solving could make up for.
        solved = rounding is not Rounding.UINT16 and any(spec.rounded_by.solves for spec in specs.values())
        shared = _shared(given) if wish.folds and given.writers else None
        use = use_of(names.weight(given.name), self._config)
        blocks = budget_blocks(wish.specs.values())
        formats = other_formats(specs[given.name], given.width, use, blocks) if wish.probes else []
        return Searched(readers, sample, rounding, shared, solved, tuple(formats))


def _through(
    layer: Layer,
    batches: ActivationFile,
    seen: Mapping[str, InputStatistics],
    keep: Mapping[str, Callable[[Floats], Floats]],
    check: Callable[[], None],
) -> Iterator[Floats]:
    """Sequences through a layer, each input counted, and kept where all tokens come to it; `check` before each."""
    return by_batches(layer, batches, _looking(seen, keep, check))


def _looking(
    seen: Mapping[str, InputStatistics], keep: Mapping[str, Callable[[Floats], Floats]], check: Callable[[], None]
) -> Look:
    """What counts an input, and keeps it where all tokens come to it; `check` before each."""

    def looked_at(given: LinearInput, values: Floats) -> Floats:
        check()
        return seen[given.name].add(values if given.routed else keep[given.name](values))

    return looked_at


def _counted(
    x: Floats,
    found: Mapping[str, Floats],
    seen: Mapping[str, InputStatistics],
    keep: Mapping[str, Callable[[Floats], Floats]],
) -> Floats:
    """Sequences that a worker took through a layer, and what it found the inputs to be."""
    for name, values in found.items():
        seen[name].add(keep[name](values))
    return x


class _RoundedLayer(Layer):
    """A layer of which some linears compute as the bundle will: folded, rounded weights, perhaps rounded inputs."""

    def __init__(self, exact: Layer) -> None:
        super().__init__(exact.config, exact.anatomy, exact.tensors, exact.on)
        self._rounded: dict[str, tuple[Floats, Callable[[Floats], Floats]]] = {}

    def round(self, linear: Linear, spec: QuantSpec, facts: InputFacts, rounding: Rounding) -> None:
        """Rounds one linear's weight, and its input too if asked."""
        on, weight = self.on, self.on.to_host(self.tensors[linear.weight])
        scales = facts.fold.scales if facts.fold.scales is not None else np.ones(weight.shape[1], np.float32)
        blocks = quantize_blocks(weight * scales, spec, facts.importance)
        divisor = on.from_host(scales)

        def arriving(x: Floats) -> Floats:
            return rounded_input(x / divisor, rounding, spec.block_size, facts.values)

        self._rounded[linear.module] = (on.from_host(dequantize_blocks(blocks, spec, weight.shape[1])), arriving)

    def product(self, linear: Linear, x: Floats) -> Floats:
        """As the exact layer's, but for what was rounded."""
        if linear.module not in self._rounded:
            return super().product(linear, x)
        weight, arriving = self._rounded[linear.module]
        y = self.on.product(arriving(x), weight.T)
        return y


def probe_tokens(tokens: int, layers: int) -> int:
    """How much of a text of so many tokens a probe has: about as many go through the layers as the text itself has,
    with probes of all inputs, half the depth each."""
    least, most = _PROBE_TOKENS
    return min(max(2 * tokens // (4 * layers), least), most)


def _first_probes(
    config: ModelConfig, source: Tensors, sequences: Sequence[Sequence[int]], wish: Wish
) -> dict[str, list[Floats]]:
    """The exact probe under no name, and one with the embedding rounded."""
    left, exact = probe_tokens(sum(map(len, sequences)), config.num_hidden_layers), []
    for ids in sequences:
        if left > 1:
            exact.append(embed(source, list(ids)[:left]))
            left -= exact[-1].shape[0]
    spec = wish.specs[names.weight(names.EMBED_TOKENS)]
    rounded = [dequantize_blocks(quantize_blocks(x, spec), spec, x.shape[1]) for x in exact]
    return {"": exact, names.EMBED_TOKENS: rounded}


def _embedding_facts(rows: Floats, specs: Mapping[str, QuantSpec]) -> InputFacts:
    """Nothing arrives at an embedding: its error is that of its rows."""
    losses: dict[QuantSpec, float] = {}
    spec_by_rule = specs[names.weight(names.EMBED_TOKENS)]
    for spec in other_formats(spec_by_rule, rows.shape[1], MatrixUse.EMBEDDING, budget_blocks(specs.values())):
        miss = dequantize_blocks(quantize_blocks(rows, spec), spec, rows.shape[1]) - rows
        losses[spec] = float(np.vdot(miss, miss) / (np.vdot(rows, rows) or 1.0))
    return InputFacts(np.ones(rows.shape[1], np.float32), ActivationRange(0.0, 0.0), FoldChoice(), losses)


def _spread_rows(source: Tensors, name: str, rows: int) -> Floats:
    """Some hundred rows of a table too large to read whole."""
    every = max(1, rows // 512)
    return np.concatenate([source.read_rows(name, row, row + 1) for row in range(0, rows, every)])


def _shared(given: LinearInput) -> NDArray[np.int64]:
    """[width]: which channels have one writer's row in common."""
    channel = np.arange(given.width)
    head, within = channel // given.head_dim, channel % given.head_dim
    return np.asarray(head // given.shared * given.head_dim + within, np.int64)
