"""The command that serves bundles: serve."""

from __future__ import annotations

import threading
import webbrowser
from pathlib import Path

import click

from toolkit.cli.options import ON_CPU


@click.command()
@click.argument("bundles", nargs=-1, type=click.Path(path_type=Path), metavar="[BUNDLE]...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Beyond loopback it needs --api-key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one.")
@click.option("--api-key", envvar="TOOLKIT_API_KEY", help="What clients have to send [$TOOLKIT_API_KEY].")
@click.option("--allow-host", multiple=True, metavar="NAME", help="A name this server is reached by. Repeatable.")
@click.option("--keep", type=click.IntRange(min=1), default=1, show_default=True, help="Bundles open at once.")
@click.option("--queue", type=click.IntRange(min=0), default=16, show_default=True, help="Requests that may wait.")
@click.option("--allow-get", is_flag=True, help="Let pages get models though the server is not this machine's alone.")
@click.option("--open", "opens", is_flag=True, help="Show the playground in this machine's browser.")
@ON_CPU
def serve(
    bundles: tuple[Path, ...],
    host: str,
    port: int,
    api_key: str | None,
    allow_host: tuple[str, ...],
    keep: int,
    queue: int,
    allow_get: bool,
    opens: bool,
    on_cpu: bool,
) -> None:
    """A playground and OpenAI's API over each BUNDLE, those in build/ if none is named.

    Listens on this machine alone unless --host says otherwise. Needs the extra `serve`.
    """
    from toolkit.serve import start

    def listens(url: str, served: str) -> None:
        click.echo(f"the playground: {url}, OpenAI's API below /v1: {served}", err=True)
        if opens:
            threading.Thread(target=webbrowser.open, args=[url], daemon=True).start()

    start(bundles, host, port, api_key or None, allow_host, keep, queue, on_cpu, allow_get, listens)
