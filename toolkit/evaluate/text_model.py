"""A bundle opened for text: a prompt goes in, and thought and answer come out apart as they are written."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from toolkit import names
from toolkit.errors import BundleError
from toolkit.evaluate.chat_prompt import ChatTemplate
from toolkit.evaluate.grammar import whole_grammar
from toolkit.evaluate.session import open_model
from toolkit.evaluate.stop_strings import StopStrings
from toolkit.evaluate.thought import Piece, ScoredToken, ThoughtSplitter
from toolkit.report.sections import Speculated
from toolkit.typed_json import field_kinds


@dataclass(frozen=True)
class SearchOptions:
    """How the next token is chosen, under onnxruntime-genai's own names; what is None is as the bundle says."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    random_seed: int | None = None
    repetition_penalty: float | None = None

    def given(self) -> dict[str, float]:
        """Returns the options that are not None."""
        return {name: value for name in field_kinds(SearchOptions) if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class TextOptions:
    """What is asked of one text. None of `max_new_tokens` leaves it all that the context
    and the memory for a cache have.

    `stop` are strings that end the answer and are not part of it; in a thought they mean nothing. `grammar` is a rule
    in llguidance's Lark that the answer keeps to. `alternatives` is how many of the likeliest tokens are told beside
    each chosen one, with their log-probabilities; None tells no log-probabilities at all. Without `splits_thought` the
    text is an answer as a whole, markers included.
    """

    max_new_tokens: int | None = None
    search: SearchOptions = SearchOptions()
    stop: tuple[str, ...] = ()
    grammar: str | None = None
    alternatives: int | None = None
    splits_thought: bool = True


@dataclass(frozen=True)
class Written:
    """How one text ended: `finish_reason` is `stop` where the model or a stop string ended it, else `length`.

    `ended_itself` is whether the model's own stop token did. `new_tokens` counts thought, markers and the stop token,
    `thought_tokens` those of the thought alone. `ttft_s` is the time to the first token, `decode_s` the time after it.
    `speculation` is what came of guessing tokens ahead, None where nothing guesses.
    """

    finish_reason: str
    ended_itself: bool
    prompt_tokens: int
    new_tokens: int
    thought_tokens: int
    ttft_s: float
    decode_s: float
    speculation: Speculated | None = None


class TextModel:
    """A bundle with its tokenizer and chat template, opened through onnxruntime-genai.

    Raises BundleError for a bundle without a tokenizer, and what `open_model` raises.
    """

    def __init__(self, bundle: Path, on_cpu: bool = False) -> None:
        if not (bundle / names.TOKENIZER_FILE).is_file():
            raise BundleError(f"{bundle} has no {names.TOKENIZER_FILE}: a synthetic bundle has no words, only speed")
        self._opened = open_model(bundle, on_cpu)
        self.settings = self._opened.settings
        self.template = ChatTemplate(bundle, self._opened)
        self._tokenizer = self.template.tokenizer

    def pieces(self, prompt: str, options: TextOptions) -> Generator[Piece, None, Written]:
        """Yields what follows the prompt as it comes, and returns how it ended.

        Raises BundleError if the prompt leaves no room in the context, UnsupportedError for a grammar that
        onnxruntime-genai does not take.
        """
        begun = time.perf_counter()
        ids = self._tokenizer.encode(prompt)
        if self.settings.room_after(len(ids), 1) < 1:
            raise BundleError(
                f"the conversation has {len(ids)} tokens, the bundle's context {self.settings.context_length}: "
                "start anew"
            )
        pieces = _Pieces(prompt, options)
        new_tokens = options.max_new_tokens or max(1, self._opened.longest() - len(ids))
        times, last = [begun], -1
        generator = self._begun(ids, prompt, new_tokens, options)
        for last, scored in self._tokens(generator, new_tokens, options):
            times = [*times[:2], time.perf_counter()]
            yield from pieces.add("" if last in self._stop_ids else self._stream.decode(last), scored)
            if pieces.is_stopped:
                break
        yield from pieces.end()
        first = times[min(1, len(times) - 1)]
        return Written(
            finish_reason="stop" if pieces.is_stopped or last in self._stop_ids else "length",
            ended_itself=last in self._stop_ids,
            prompt_tokens=len(ids),
            new_tokens=pieces.tokens,
            thought_tokens=pieces.thought_tokens,
            ttft_s=first - begun,
            decode_s=times[-1] - first,
            speculation=self._guessed(generator, pieces.tokens),
        )

    def _guessed(self, generator: Any, tokens: int) -> Speculated | None:
        """What came of the guesses of a text that is written."""
        method, guesses = self._opened.speculation, self._opened.guesses(generator, tokens)
        return guesses.described(method) if method and guesses else None

    @property
    def _stop_ids(self) -> tuple[int, ...]:
        return self.settings.eos_token_ids

    def _begun(self, ids: Any, prompt: str, new_tokens: int, options: TextOptions) -> Any:
        """A generator that has read the prompt, held to the grammar that is asked for."""
        grammar = None
        if options.grammar is not None:
            grammar = whole_grammar(prompt, options.grammar) if options.splits_thought else f"start: {options.grammar}"
        tells = options.alternatives is not None
        return self._opened.generator(ids, new_tokens, grammar, tells, **options.search.given())

    def _tokens(
        self, generator: Any, new_tokens: int, options: TextOptions
    ) -> Iterator[tuple[int, ScoredToken | None]]:
        """Each token as it is chosen, with its log-probability where that is asked for."""
        self._stream = self._tokenizer.create_stream()
        for token, logits in self._opened.steps(generator, new_tokens, options.alternatives is not None):
            yield token, None if logits is None else self._scored(token, logits, options.alternatives or 0)

    def _scored(self, token: int, logits: npt.NDArray[Any], alternatives: int) -> ScoredToken:
        """The token with log-probabilities of the model's own distribution, before any search option changes it."""
        wide = logits.astype(np.float64)
        scores = wide - wide.max()
        scores -= np.log(np.exp(scores).sum())
        likeliest = np.argsort(-scores, kind="stable")[:alternatives]
        beside = tuple(ScoredToken(self._tokenizer.decode([k]), float(scores[k])) for k in likeliest)
        return ScoredToken(self._tokenizer.decode([token]), float(scores[token]), beside)


class _Pieces:
    """Pieces of one text, each with the scored tokens that ended in it, cut where a stop string begins."""

    def __init__(self, prompt: str, options: TextOptions) -> None:
        self._splitter = ThoughtSplitter(prompt, options.splits_thought)
        self._stops = StopStrings(options.stop)
        # Characters that each token has brought and no piece has taken yet.
        self._open: deque[tuple[int, ScoredToken | None]] = deque()
        self.tokens = self.thought_tokens = 0

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has ended the answer."""
        return self._stops.is_found

    def add(self, text: str, scored: ScoredToken | None) -> Iterator[Piece]:
        """The pieces that are certain once a token has brought `text`."""
        self.tokens += 1
        self._open.append((len(text), scored))
        yield from self._told(self._splitter.add(text))

    def end(self) -> Iterator[Piece]:
        """What was held back, once no more tokens will come."""
        if self.is_stopped:
            return
        yield from self._told(self._splitter.end())
        if held := self._stops.end():
            yield Piece("answer", held)

    def _told(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            ended = self._ended_in(len(piece))
            self.thought_tokens += len(ended) if piece.kind == "thought" else 0
            text = self._stops.add(piece) if piece.kind == "answer" else piece
            scored = tuple(token for token in ended if token is not None)
            if text is piece and not scored:
                yield piece
            elif text or scored:
                yield Piece(piece.kind, text, scored)

    def _ended_in(self, characters: int) -> list[ScoredToken | None]:
        ended = []
        while self._open and self._open[0][0] <= characters:
            length, scored = self._open.popleft()
            characters -= length
            ended.append(scored)
        if self._open and characters:
            length, scored = self._open.popleft()
            self._open.appendleft((length - characters, scored))
        return ended
