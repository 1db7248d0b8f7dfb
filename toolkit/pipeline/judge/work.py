"""How much there is to do when a bundle is judged, counted from shapes; and how much is judged where nobody said.

A bundle runs on the CPU here, whoever it is made for. What it costs there follows from how its transformer is written:
by nodes, by the bytes of its weights, and by weights that are restored for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from toolkit.checkpoint.config import ModelConfig
from toolkit.pipeline.calibration_work import forward_work, layer_weights
from toolkit.pipeline.judge.effort import Effort
from toolkit.pipeline.text import LONGEST
from toolkit.pipeline.work import TYPICAL, Work
from toolkit.target import Form

# The default sample is as much as fits these seconds of a typical machine, but not less than the counts.
TOKENS_SECONDS: Final = 20.0
QUESTIONS_SECONDS: Final = 30.0
FEWEST_TOKENS: Final = 500
MOST_TOKENS: Final = 2000
FEWEST_QUESTIONS: Final = 20
# What the weights cost by themselves is a second figure beside what the bundle costs as it runs: fewer tokens do.
ALONE_TOKENS: Final = 512
# Of the tokens that an answer may have, those it has; and a question's.
_ANSWERED: Final = 1 / 3
_PROMPT: Final = 40
# Nodes of one layer, by how its transformer is written, in steps of numpy's.
_FUSED_NODES: Final = 11.0
_PLAIN_NODES: Final = 25.0
_QDQ_NODES: Final = 70.0
_NODE_STEPS: Final = 3.0
# What the CPU passes over to restore a weight of QDQ graphs for a token.
_QDQ_RESTORED: Final = 3.0
# Tokens that a bundle takes at once where it is given a text.
_TOGETHER: Final = 32
# Tokens made one by one: the greedy continuation, and the runs of the speed.
_GREEDY_TOKENS: Final = 32.0
_SPEED_TOKENS: Final = 224.0
_PASSES_OF_LOGITS: Final = 12.0


@dataclass(frozen=True)
class Sample:
    """How many tokens of text are compared, and how many questions of each of the recipe's tasks are asked."""

    tokens: int
    examples: int


def sample(effort: Effort, config: ModelConfig, form: Form, baseline: bool) -> Sample:
    """The counts that an effort names, and those that fit where it names none: the same for a bundle everywhere."""
    tokens, examples = effort.tokens, effort.examples
    if config.traced:  # what a token costs is not known
        return Sample(tokens or FEWEST_TOKENS, examples or FEWEST_QUESTIONS)
    if tokens is None:
        fit = TOKENS_SECONDS / tokens_work(config, form, 1, baseline).seconds(TYPICAL)
        tokens = int(min(max(fit, FEWEST_TOKENS), MOST_TOKENS)) // 100 * 100
    if examples is None:
        fit = QUESTIONS_SECONDS / question_work(config, form, effort.max_new_tokens, baseline).seconds(TYPICAL)
        examples = max(int(fit) // 10 * 10, FEWEST_QUESTIONS)
    return Sample(tokens, examples)


def tokens_work(config: ModelConfig, form: Form, tokens: int, baseline: bool) -> Work:
    """So many tokens through the reference and through the bundle, some of them twice where it rounds its inputs, and
    logits beside each other; plain rounding beside them where it is wanted."""
    length, table = min(LONGEST, max(tokens, 160)), config.vocab_size * config.hidden_size
    alone = min(1.0, ALONE_TOKENS / MOST_TOKENS)
    rounds = 1.0 + alone if form.qdq or form.accuracy_level == 4 else 1.0
    passes = 1.0 + baseline
    logits = Work(2.0 * tokens * table, _PASSES_OF_LOGITS * tokens * config.vocab_size)
    through = forward_work(config, tokens, length, tokens / length)
    return (through + logits) * (passes + rounds) + _token_work(config, form) * (rounds * tokens / _TOGETHER)


def question_work(config: ModelConfig, form: Form, new_tokens: int, baseline: bool) -> Work:
    """One question to the bundle and to the reference, which answers many side by side."""
    answered = new_tokens * _ANSWERED
    table = config.vocab_size * config.hidden_size
    theirs = forward_work(config, answered + _PROMPT, _PROMPT + int(answered), 1.0)
    theirs += Work(products=2.0 * answered * table)
    return _token_work(config, form) * answered + theirs * (1.0 + 2.0 * baseline)


def validation_work(
    config: ModelConfig, form: Form, effort: Effort, tasks: Sequence[int], baseline: bool, here: bool
) -> Work:
    """All that judging does: `tasks` has the number of questions of each task, `here` is whether speed is measured."""
    asked = sample(effort, config, form, baseline)
    weights, passes = layer_weights(config) + 2 * config.vocab_size * config.hidden_size, 2.0 + 2.0 * baseline
    done = Work(elements=passes * 3.0 * weights) + tokens_work(config, form, asked.tokens, baseline)
    for questions in tasks:
        count = min(questions, asked.examples)
        done += question_work(config, form, effort.max_new_tokens, baseline) * count
    timed = _SPEED_TOKENS if effort.speed and here else 0.0
    return done + _token_work(config, form) * (_GREEDY_TOKENS + timed)


def _token_work(config: ModelConfig, form: Form) -> Work:
    """Returns the work of one token that goes through the bundle by itself."""
    weights = layer_weights(config) + config.vocab_size * config.hidden_size
    nodes = _QDQ_NODES if form.qdq else _FUSED_NODES if form.fused and form.packed_qkv else _PLAIN_NODES
    steps = _NODE_STEPS * (nodes * config.num_hidden_layers + 10)
    return Work(elements=_QDQ_RESTORED * weights if form.qdq else 0.0, steps=steps, nbytes=0.6 * weights)
