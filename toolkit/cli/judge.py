"""Commands that look at a finished bundle and may find fault: validate, check, verify, bench, harness."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolkit.cli.effort import effort_of, effort_options
from toolkit.cli.options import ADAPTER, AS_JSON, BUNDLE, DEVICE, ON_CPU, REVISION, WORKERS
from toolkit.cli.printing import one_document, print_note, print_problems, print_verdict, said_of_guesses

if TYPE_CHECKING:
    from toolkit.checkpoint.opened import Checkpoint
    from toolkit.pipeline.judge import Effort


@click.command()
@BUNDLE
@click.option("--checkpoint", help="What the bundle was made from, a folder or a hub id [its recipe's model].")
@REVISION
@ADAPTER
@DEVICE
@WORKERS
@AS_JSON
@effort_options
def validate(
    bundle: Path,
    checkpoint: str | None,
    revision: str | None,
    adapter: Path | None,
    device: str,
    workers: str | None,
    as_json: bool,
    **effort: Any,
) -> None:
    """Compare BUNDLE with its checkpoint, token by token and answer by answer; rewrite its report."""
    from toolkit.pipeline.opening import made_from

    wanted = effort_of(effort)
    validate_bundles([bundle], made_from(bundle, checkpoint, revision, adapter), wanted, as_json, device, workers)


def validate_bundles(
    bundles: list[Path],
    checkpoint: Checkpoint,
    wanted: Effort,
    as_json: bool,
    device: str,
    workers: str | None = None,
    anew: bool = True,
) -> None:
    """Judges each bundle beside its checkpoint and prints the verdicts; leaves with 1 unless all of them pass.

    One that was validated before is measured again only if `anew` is true.
    """
    from toolkit import library
    from toolkit.progress import progress_line
    from toolkit.report.summary import validated_report

    reports = []
    for bundle in bundles:
        standing = None if anew else validated_report(bundle)
        if standing:
            click.echo(f"note: {bundle} was validated before: `toolkit validate {bundle}` measures again", err=True)
            reports.append(standing)
        else:
            with progress_line() as progress:
                made = library.validate(
                    bundle, checkpoint, wanted, device=device, workers=workers, progress=progress, note=print_note
                )
                reports.append(made)
        if not as_json:
            print_verdict(bundle, reports[-1])
    if as_json:
        click.echo(one_document(reports))
    if not all(report.verdict and report.verdict.passed for report in reports):
        sys.exit(1)


@click.command()
@BUNDLE
@click.option("--run", is_flag=True, help="Also run the stages in their vendor's software: openvino, onnxruntime-qnn.")
@AS_JSON
def check(bundle: Path, run: bool, as_json: bool) -> None:
    """BUNDLE's genai_config.json, and each node of its graphs against what its execution provider takes; of a folder
    that install made, what its host asks for."""
    from toolkit import library

    found = library.check(bundle, run=run)
    if as_json:
        click.echo(one_document([found]))
    else:
        for stage in found.stages:
            outside = f", {stage.nodes_outside} are the CPU's on purpose" if stage.nodes_outside else ""
            ep = stage.execution_provider
            click.echo(f"{stage.file}: {stage.nodes_legal} of {stage.nodes} nodes fit {ep}{outside}")
            for condition in stage.conditions:
                click.echo(f"note: {condition}")
        for entry in found.runs:
            taken = "".join(f", {count} nodes on {ep}" for ep, count in entry.nodes.items())
            click.echo(f"{entry.file}: {entry.software} differs from the CPU by {entry.error:.2g}{taken}")
        click.echo("\n".join(found.problems) or (_reads(bundle) if found.stages else "as its host reads it"))
    if not found.passed:
        sys.exit(1)


def _reads(bundle: Path) -> str:
    """From which onnxruntime-genai on a bundle's settings are read."""
    from toolkit.bundle.genai_config import first_releases
    from toolkit.bundle.settings import config_of, read_genai_config

    _, genai = first_releases(config_of(read_genai_config(bundle)).model.type)
    return f"genai_config.json fits the graphs, and genai {genai} and later"


@click.command()
@BUNDLE
@AS_JSON
def verify(bundle: Path, as_json: bool) -> None:
    """Every file of BUNDLE against its size and SHA-256, and files that are not its own."""
    from toolkit import library

    problems = library.verify(bundle, note=print_note)
    print_problems(problems, "every file is as the manifest says", as_json)


@click.command()
@BUNDLE
@click.option("--prompt-tokens", type=int, default=128, show_default=True)
@click.option("--new-tokens", type=int, default=64, show_default=True)
@click.option("--repeat", type=int, default=5, show_default=True)
@ON_CPU
@AS_JSON
def bench(bundle: Path, prompt_tokens: int, new_tokens: int, repeat: int, on_cpu: bool, as_json: bool) -> None:
    """Speed of BUNDLE through onnxruntime-genai, medians over the runs."""
    from toolkit import library

    speed = library.bench(bundle, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeat=repeat, on_cpu=on_cpu)
    if as_json:
        click.echo(one_document([speed]))
        return
    prefill, decode = speed.prefill_tokens_per_s, speed.decode_tokens_per_s
    click.echo(f"prefill {prefill:.1f} tokens/s, decode {decode:.1f} tokens/s, {speed.threads} threads")
    click.echo(
        f"first token {speed.ttft_s:.3f} s, load {speed.load_s:.2f} s, "
        f"peak RSS {speed.peak_rss_bytes / 2**20:.0f} MiB, {repeat} runs"
    )
    if speed.speculation:
        click.echo(said_of_guesses(speed.speculation))


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]})
@BUNDLE
@ON_CPU
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[LM_EVAL_OPTION]...")
def harness(bundle: Path, on_cpu: bool, options: tuple[str, ...]) -> None:
    """lm-evaluation-harness with BUNDLE for its model: toolkit harness BUNDLE --tasks gsm8k --apply_chat_template."""
    from toolkit.evaluate.harness import run_harness

    run_harness(bundle, on_cpu, options)
