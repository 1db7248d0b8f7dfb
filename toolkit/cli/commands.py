"""Commands that parse, call and print. Exit codes: 0 done, 1 a verdict failed, 2 the request or its input is bad.

Nothing heavy is imported before a command needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolkit import __version__
from toolkit.cli.effort import effort_of, effort_options
from toolkit.cli.printing import one_document, print_costs, print_exported, print_plans, print_problems, print_verdict
from toolkit.errors import ToolkitError
from toolkit.soc import SOCS

if TYPE_CHECKING:
    from toolkit.checkpoint.opened import Checkpoint
    from toolkit.pipeline.judge import Effort
    from toolkit.recipe import Recipe

ON_CPU = click.option("--on-cpu", is_flag=True, help="Run every stage on the CPU, whatever the bundle is made for.")
BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))
AS_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, the rest on stderr.")
CHECKPOINT_HELP = "A folder in Hugging Face layout, or a hub id [the recipe's model]."


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show a traceback on errors.")
def commands(debug: bool) -> None:
    """Turns reasoning distills into ONNX bundles that onnxruntime-genai opens."""
    # Read again in main(), which has to know it before any command runs.


@commands.command()
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE...")
@click.option("--checkpoint", help=CHECKPOINT_HELP)
@click.option("--out", type=click.Path(path_type=Path), help="Where the bundle goes, or several [build/RECIPE].")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change the recipe: quantize.0.bits=8.")
@click.option("--precision", type=click.Choice(["int4", "fp32"]), default="int4", help="fp32 keeps every weight.")
@click.option("--quality", type=click.Choice(["fast", "balanced", "best"]), help="What to do for the weights [recipe].")
@click.option("--calibration", type=click.Path(path_type=Path), help="Text to calibrate on [the recipe's].")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--synthetic", is_flag=True, help="Random weights of the recipe's true shapes; nothing is downloaded.")
@click.option("--no-validate", is_flag=True, help="Skip the comparison with the checkpoint.")
@click.option("--no-compile", is_flag=True, help="Leave qnn's compiling out; `toolkit compile` does it.")
@AS_JSON
@effort_options
def export(
    recipes: tuple[str, ...],
    checkpoint: str | None,
    out: Path | None,
    changes: tuple[str, ...],
    precision: str,
    quality: str | None,
    calibration: Path | None,
    dry_run: bool,
    synthetic: bool,
    no_validate: bool,
    no_compile: bool,
    as_json: bool,
    **effort: Any,
) -> None:
    """Convert one RECIPE to one bundle: a name, a path, or a bare target such as cpu with --checkpoint.

    Several recipes of one model are made in one pass over its checkpoint, and share what is equal on the disk.
    """
    from toolkit.pipeline.compile import compile_exported
    from toolkit.pipeline.export import Order, export_bundles
    from toolkit.pipeline.plan import describe, plan_export
    from toolkit.progress import progress_line

    shapes_alone = synthetic or (dry_run and not checkpoint)
    # Random weights have no salient channels: calibrating them is for who asks.
    quality = quality or ("fast" if synthetic else None)
    asked = {"quality": quality, "calibration": str(calibration.resolve()) if calibration else None}
    changes += tuple(f"{key}={json.dumps(value)}" for key, value in asked.items() if value)
    opened, loaded = _load(recipes, changes, checkpoint, shapes_alone)
    orders = [Order(recipe, _place(out, recipe.name, len(recipes))) for recipe in loaded]
    plans = [describe(plan_export(o.recipe, opened, o.out, precision), opened.config) for o in orders]
    if dry_run:
        print_plans(plans, as_json)
        return
    print_costs(plans)
    wanted = None if no_validate or synthetic else effort_of(effort)
    with progress_line(len(opened.source.names())) as progress:
        bundles = export_bundles(orders, opened, precision, progress)
    for bundle in bundles:
        with progress_line(None) as progress:
            if note := compile_exported(bundle, not no_compile, progress):
                click.echo(f"note: {note}", err=True)
    if wanted is None:
        print_exported(bundles, as_json)
        return
    for bundle in bundles:
        click.echo(f"bundle: {bundle}", err=as_json)
    _validate(bundles, opened, wanted, as_json)


@commands.command(name="compile")
@BUNDLE
@click.option("--soc", type=click.Choice(list(SOCS)), help="For another SoC than the bundle's recipe names.")
@AS_JSON
def compile_(bundle: Path, soc: str | None, as_json: bool) -> None:
    """The transformer of BUNDLE to EPContext files for its SoC, part by part; goes on where it was stopped."""
    from toolkit.pipeline.compile import compile_bundle
    from toolkit.progress import progress_line

    with progress_line(None) as progress:
        rows = compile_bundle(bundle, progress, soc)
    if as_json:
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for row in rows:
        if row["compiled"]:
            size = f"{row['bin']}, {row['bin_bytes'] / 2**20:.1f} MiB"
            click.echo(f"{row['file']}: {row['nodes']} nodes in EPContext, {size}")


@commands.command()
@BUNDLE
@click.option("--checkpoint", help="What the bundle was made from, a folder or a hub id [its recipe's model].")
@AS_JSON
@effort_options
def validate(bundle: Path, checkpoint: str | None, as_json: bool, **effort: Any) -> None:
    """Compare BUNDLE with its checkpoint, token by token and answer by answer; rewrite its report."""
    from toolkit.bundle.manifest import read_manifest
    from toolkit.recipe import model_facts

    manifest = read_manifest(bundle)
    made_by, synthetic = manifest["recipe"], manifest["synthetic"]
    wanted = effort_of(effort)
    place = checkpoint or (None if synthetic else made_by["model"])
    opened = _open(place, model_facts(made_by["name"], made_by["target"]), synthetic)
    _validate([bundle], opened, wanted, as_json)


@commands.command()
@click.argument("path", type=click.Path(path_type=Path))
@AS_JSON
def inspect(path: Path, as_json: bool) -> None:
    """What a checkpoint or a bundle is, from headers alone."""
    from toolkit.pipeline.inspect import inspect_path

    facts = inspect_path(path)
    if as_json:
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    for key, value in facts.items():
        if isinstance(value, list):
            click.echo(f"{key}:")
            for row in value:
                click.echo("  " + "  ".join(str(v) for v in row.values()))
        else:
            click.echo(f"{key}: {value}")


@commands.command()
@BUNDLE
@click.option("--run", is_flag=True, help="Also run the stages in their vendor's software: openvino, onnxruntime-qnn.")
@AS_JSON
def check(bundle: Path, run: bool, as_json: bool) -> None:
    """BUNDLE's genai_config.json, and each node of its graphs against what its execution provider takes."""
    from toolkit.pipeline.check import check_bundle

    found = check_bundle(bundle, run)
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        for stage in found["stages"]:
            outside = f", {stage['nodes_outside']} are the CPU's on purpose" if stage["nodes_outside"] else ""
            ep = stage["execution_provider"]
            click.echo(f"{stage['file']}: {stage['nodes_legal']} of {stage['nodes']} nodes fit {ep}{outside}")
            for condition in stage["conditions"]:
                click.echo(f"note: {condition}")
        for entry in found["runs"]:
            taken = "".join(f", {count} nodes on {ep}" for ep, count in entry["nodes"].items())
            click.echo(f"{entry['file']}: {entry['software']} differs from the CPU by {entry['error']:.2g}{taken}")
        click.echo("\n".join(found["problems"]) or "genai_config.json fits the graphs, and genai 0.12.2 and later")
    if not found["passed"]:
        sys.exit(1)


@commands.command()
@BUNDLE
@AS_JSON
def verify(bundle: Path, as_json: bool) -> None:
    """Every file of BUNDLE against its size and SHA-256."""
    from toolkit.bundle.manifest import verify_manifest

    print_problems(verify_manifest(bundle), "every file is as the manifest says", as_json)


@commands.command()
@BUNDLE
@click.option("--prompt", required=True, help="The question; the bundle's chat template is put around it.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=400, show_default=True)
@ON_CPU
@AS_JSON
def generate(bundle: Path, prompt: str, max_new_tokens: int, on_cpu: bool, as_json: bool) -> None:
    """Text from BUNDLE through onnxruntime-genai, streamed."""
    from toolkit.evaluate.conversation import Conversation

    conversation = Conversation(bundle, max_new_tokens, on_cpu)
    if as_json:
        text = "".join(conversation.ask(prompt))
        click.echo(json.dumps({"prompt": prompt, "text": text}, indent=2, ensure_ascii=False))
        return
    for piece in conversation.ask(prompt):
        click.echo(piece, nl=False)
    click.echo()


@commands.command()
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
        for piece in conversation.ask(question):
            click.echo(piece, nl=False)
        click.echo()


@commands.command()
@BUNDLE
@click.option("--prompt-tokens", type=int, default=128, show_default=True)
@click.option("--new-tokens", type=int, default=64, show_default=True)
@click.option("--repeat", type=int, default=5, show_default=True)
@ON_CPU
@AS_JSON
def bench(bundle: Path, prompt_tokens: int, new_tokens: int, repeat: int, on_cpu: bool, as_json: bool) -> None:
    """Speed of BUNDLE through onnxruntime-genai, medians over the runs."""
    from toolkit.evaluate.speed import measure_speed

    speed = measure_speed(bundle, prompt_tokens, new_tokens, repeat, on_cpu)
    if as_json:
        click.echo(json.dumps(speed, indent=2))
        return
    prefill, decode = speed["prefill_tokens_per_s"], speed["decode_tokens_per_s"]
    click.echo(f"prefill {prefill:.1f} tokens/s, decode {decode:.1f} tokens/s, {speed['threads']} threads")
    click.echo(
        f"first token {speed['ttft_s']:.3f} s, load {speed['load_s']:.2f} s, "
        f"peak RSS {speed['peak_rss_bytes'] / 2**20:.0f} MiB, {repeat} runs"
    )


@commands.command(context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]})
@BUNDLE
@ON_CPU
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[LM_EVAL_OPTION]...")
def harness(bundle: Path, on_cpu: bool, options: tuple[str, ...]) -> None:
    """lm-evaluation-harness with BUNDLE for its model: toolkit harness BUNDLE --tasks gsm8k --apply_chat_template."""
    from toolkit.evaluate.harness import run_harness

    run_harness(bundle, on_cpu, options)


@commands.command()
@AS_JSON
def recipes(as_json: bool) -> None:
    """The recipes that come with the toolkit, and what this machine can do with them."""
    from toolkit.pipeline.catalogue import recipe_rows

    rows = recipe_rows()
    if as_json:
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    click.echo(f"{'recipe':20} {'target':9} {'bundle':>9} {'bits':>5} {'context':>8}  {'here':35} model")
    for row in rows:
        mebibytes = row["bundle_bytes"] / 2**20
        size = f"{mebibytes / 1024:.2f} GiB" if mebibytes >= 1024 else f"{mebibytes:.1f} MiB"
        click.echo(
            f"{row['recipe']:20} {row['target']:9} {size:>9} {row['bits_per_weight']:5.2f} "
            f"{row['context_length']:8}  {row['here']:35} {row['model']}"
        )


def _load(
    names: tuple[str, ...], changes: tuple[str, ...], checkpoint: str | None, shapes_alone: bool
) -> tuple[Checkpoint, list[Recipe]]:
    """The recipes and the one checkpoint they are for. Raises RecipeError if they are for several."""
    from toolkit.errors import RecipeError
    from toolkit.pipeline.plan import shorten_context
    from toolkit.recipe import load_recipe
    from toolkit.target import TARGETS

    loaded = [load_recipe(name, changes, checkpoint) for name in names]
    if not checkpoint and len({recipe.model for recipe in loaded}) > 1:
        models = ", ".join(f"{recipe.name} of {recipe.model}" for recipe in loaded)
        raise RecipeError(f"one export reads one checkpoint, and these are {models}: name them one by one")
    if len({recipe.name for recipe in loaded}) < len(loaded):
        raise RecipeError(f"a recipe is named twice: {', '.join(names)}")
    place = checkpoint or (None if shapes_alone else loaded[0].model)
    opened = _open(place, loaded[0].facts(), shapes_alone)
    if not any(change.startswith("context_length=") for change in changes):
        loaded = [
            shorten_context(recipe, opened.config) if name in TARGETS else recipe
            for name, recipe in zip(names, loaded, strict=True)
        ]
    return opened, loaded


def _place(out: Path | None, name: str, count: int) -> Path:
    """Where a bundle goes: `out` itself for one, a folder of its own there for several."""
    if out is None:
        return Path("build") / name
    return out if count == 1 else out / name


def _open(place: str | None, facts: Path | None, synthetic: bool) -> Checkpoint:
    """The checkpoint at `place`; for random weights the shapes of `place`, or else of the model's facts."""
    from toolkit.checkpoint.download import resolve_checkpoint
    from toolkit.checkpoint.opened import open_checkpoint, synthetic_checkpoint
    from toolkit.errors import RecipeError

    folder = resolve_checkpoint(place) if place else facts
    if folder is None:
        raise RecipeError("--synthetic needs the shapes: name a folder with a config.json with --checkpoint")
    return synthetic_checkpoint(folder) if synthetic else open_checkpoint(folder)


def _validate(bundles: list[Path], checkpoint: Checkpoint, wanted: Effort, as_json: bool) -> None:
    from toolkit.pipeline.judge import judge_bundle
    from toolkit.progress import progress_line

    reports = []
    for bundle in bundles:
        with progress_line(None) as progress:
            reports.append(judge_bundle(bundle, checkpoint, wanted, progress))
        if not as_json:
            print_verdict(bundle, reports[-1])
    if as_json:
        click.echo(one_document(reports))
    if not all(report["verdict"]["passed"] for report in reports):
        sys.exit(1)


def main() -> None:
    """The entry point: a ToolkitError becomes one line and exit code 2."""
    # An end that is asked for leaves through the finalizers, which remove what is temporary.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        commands(standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("error: interrupted; the same command goes on from here", err=True)
        sys.exit(130)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as problem:
        click.echo(f"error: {problem.format_message()}", err=True)
        sys.exit(2)
    except ToolkitError as problem:
        if "--debug" in sys.argv[1:2]:
            raise
        click.echo(f"error: {problem}", err=True)
        sys.exit(2)
