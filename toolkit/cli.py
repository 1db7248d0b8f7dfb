"""Commands that parse, call and print. Exit codes: 0 done, 1 a verdict failed, 2 the request or its input is bad."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from toolkit import __version__
from toolkit.errors import ToolkitError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def commands() -> None:
    """Turns reasoning distills into ONNX bundles that onnxruntime-genai opens."""


@commands.command()
@click.argument("recipe")
@click.option("--checkpoint", help="A folder in Hugging Face layout, or a hub id [the recipe's model].")
@click.option("--out", type=click.Path(path_type=Path), help="Where the bundle goes [build/RECIPE].")
@click.option("--precision", type=click.Choice(["int4", "fp32"]), default="int4", help="fp32 keeps every weight.")
@click.option("--no-validate", is_flag=True, help="Skip the comparison with the checkpoint.")
def export(recipe: str, checkpoint: str | None, out: Path | None, precision: str, no_validate: bool) -> None:
    """Convert one RECIPE (a name or a path) to one bundle."""
    from toolkit.checkpoint.download import resolve_checkpoint
    from toolkit.pipeline import export_bundle
    from toolkit.recipe import load_recipe

    loaded = load_recipe(recipe)
    folder = resolve_checkpoint(checkpoint or loaded.model)
    bundle = export_bundle(loaded, folder, out or Path("build") / loaded.name, precision)
    click.echo(f"bundle: {bundle}")
    if not no_validate:
        _validate(bundle, folder, tokens=2000)


@commands.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--checkpoint", help="What the bundle was made from, a folder or a hub id [its recipe's model].")
@click.option("--tokens", default=2000, show_default=True, help="Tokens of text to compare on.")
def validate(bundle: Path, checkpoint: str | None, tokens: int) -> None:
    """Compare BUNDLE with its checkpoint, token by token, and write report.json."""
    from toolkit.bundle.manifest import read_manifest
    from toolkit.checkpoint.download import resolve_checkpoint

    model = read_manifest(bundle)["recipe"]["model"]
    _validate(bundle, resolve_checkpoint(checkpoint or model), tokens)


@commands.command()
@click.argument("bundle", type=click.Path(path_type=Path))
def verify(bundle: Path) -> None:
    """Every file of BUNDLE against its size and SHA-256."""
    from toolkit.bundle.manifest import verify_manifest

    problems = verify_manifest(bundle)
    for problem in problems:
        click.echo(problem)
    if problems:
        sys.exit(1)
    click.echo("every file is as the manifest says")


@commands.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="The question; the bundle's chat template is put around it.")
@click.option("--max-new-tokens", default=400, show_default=True)
def generate(bundle: Path, prompt: str, max_new_tokens: int) -> None:
    """Text from BUNDLE through onnxruntime-genai, streamed."""
    from toolkit.validate.session import stream_text

    for piece in stream_text(bundle, prompt, max_new_tokens):
        click.echo(piece, nl=False)
    click.echo()


@commands.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt-tokens", default=128, show_default=True)
@click.option("--new-tokens", default=64, show_default=True)
@click.option("--repeat", default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def bench(bundle: Path, prompt_tokens: int, new_tokens: int, repeat: int, as_json: bool) -> None:
    """Speed of BUNDLE through onnxruntime-genai, medians over the runs."""
    from toolkit.validate.speed import measure_speed

    speed = measure_speed(bundle, prompt_tokens, new_tokens, repeat)
    if as_json:
        click.echo(json.dumps(speed, indent=2))
        return
    prefill, decode = speed["prefill_tokens_per_s"], speed["decode_tokens_per_s"]
    click.echo(f"prefill {prefill:.1f} tokens/s, decode {decode:.1f} tokens/s")
    click.echo(f"first token {speed['ttft_s']:.3f} s, load {speed['load_s']:.2f} s, {repeat} runs")


@commands.command()
def recipes() -> None:
    """The recipes that come with the toolkit."""
    from toolkit.recipe import load_recipe, recipe_names

    for name in recipe_names():
        recipe = load_recipe(name)
        click.echo(f"{name}\t{recipe.model}\t{recipe.target}\t{recipe.context_length} tokens")


def _validate(bundle: Path, checkpoint: Path, tokens: int) -> None:
    from toolkit.validate.parity import validate_bundle

    report = validate_bundle(bundle, checkpoint, tokens)
    for check in report["verdict"]["checks"]:
        word = "pass" if check["passed"] else "FAIL"
        click.echo(f"{word}: {check['name']} {check['value']:.3g} (threshold {check['threshold']:g})")
    click.echo(f"parity: {json.dumps(report['parity'])}")
    click.echo(f"report: {bundle / 'report.json'}")
    if not report["verdict"]["passed"]:
        sys.exit(1)


def main() -> None:
    """The entry point: a ToolkitError becomes one line and exit code 2."""
    try:
        commands(standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("error: interrupted; the same command resumes", err=True)
        sys.exit(130)
    except click.ClickException as problem:
        click.echo(f"error: {problem.format_message()}", err=True)
        sys.exit(2)
    except ToolkitError as problem:
        click.echo(f"error: {problem}", err=True)
        sys.exit(2)
