"""Other tools' 4-bit files of the same checkpoint, measured as the toolkit's own are.

Each tool is optional and lives under build/peers, in an environment of its own. A tool that is missing or fails costs
its rows and one line.
"""
