"""Runs the command line as `python -m toolkit`."""

from toolkit.cli.commands import main

if __name__ == "__main__":
    main()
