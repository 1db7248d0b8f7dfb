"""Commands that talk to a bundle: generate and chat."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolkit.cli.options import AS_JSON, BUNDLE, ON_CPU
from toolkit.cli.printing import said_of_guesses

if TYPE_CHECKING:
    from toolkit.evaluate.conversation import Answer, Conversation


@click.command()
@BUNDLE
@click.option("--prompt", required=True, help="The question; the bundle's chat template is put around it.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=400, show_default=True)
@ON_CPU
@AS_JSON
def generate(bundle: Path, prompt: str, max_new_tokens: int, on_cpu: bool, as_json: bool) -> None:
    """Text from BUNDLE through onnxruntime-genai, streamed."""
    from toolkit.evaluate.conversation import Conversation

    conversation = Conversation(bundle, max_new_tokens, on_cpu)
    if not as_json:
        _say(conversation, prompt)
        return
    text = "".join(conversation.ask(prompt))
    answer = conversation.answer
    figures = {key: value for key, value in asdict(answer).items() if key not in ("thought", "text")}
    document = {"prompt": prompt, "text": text, "thinking": answer.thought, "answer": answer.text, **figures}
    document = {key: value for key, value in document.items() if value is not None}
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


@click.command()
@BUNDLE
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=1024, show_default=True)
@ON_CPU
def chat(bundle: Path, max_new_tokens: int, on_cpu: bool) -> None:
    """A conversation with BUNDLE; an empty line or end of input ends it."""
    from toolkit.evaluate.conversation import Conversation

    conversation = Conversation(bundle, max_new_tokens, on_cpu)
    while True:
        try:
            question = click.prompt("you", default="", show_default=False, prompt_suffix="> ")
        except click.Abort:
            question = ""
        if not question.strip():
            return
        if _say(conversation, question).finish_reason == "length":
            click.echo("note: neither this question nor its unfinished answer stays in the conversation", err=True)


def _say(conversation: Conversation, question: str) -> Answer:
    """Prints an answer as it arrives, and a note if it was cut."""
    for piece in conversation.ask(question):
        click.echo(piece, nl=False)
    click.echo()
    answer = conversation.answer
    if answer.finish_reason == "length":
        full = answer.new_tokens < conversation.max_new_tokens
        by = f"the end of the bundle's context of {conversation.context_length} tokens" if full else "--max-new-tokens"
        click.echo(f"note: cut after {answer.new_tokens} tokens, by {by}", err=True)
    if answer.speculation:
        click.echo(f"note: {said_of_guesses(answer.speculation)}", err=True)
    return answer
