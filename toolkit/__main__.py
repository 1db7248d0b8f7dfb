"""The command line, as `toolkit` and as `python -m toolkit`: what can be stopped from its first line on."""

from __future__ import annotations

import sys

from toolkit.cli.stops import Stopped, heed_stops, ignore_stops


def run() -> None:
    """Runs the command line; a stop before or after it is one line too."""
    heed_stops()
    try:
        from toolkit.cli.commands import main

        main()
    except Stopped as stop:
        print("error: stopped by a signal", file=sys.stderr)
        sys.exit(stop.code)
    finally:
        ignore_stops()


if __name__ == "__main__":
    run()
