"""An export's time and memory beside the disk's own.

    python -m benchmarks.export_speed RECIPE CHECKPOINT OUT [--set KEY=VALUE …]

The disk's share is reading every byte of the checkpoint and writing as many as the bundle has, with one fsync; before
each of both the checkpoint is dropped from the page cache, where the system allows it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

from benchmarks.command_line import run_toolkit
from toolkit.errors import ToolkitError

CHUNK = 16 << 20


def drop_from_cache(folder: Path) -> None:
    """Asks the system to forget the checkpoint's pages, where it takes such advice."""
    os.sync()
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seconds(folder: Path) -> float:
    """Seconds to read every byte of a checkpoint from the disk."""
    drop_from_cache(folder)
    begin = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.read(CHUNK):
                pass
    return time.perf_counter() - begin


def write_seconds(path: Path, nbytes: int) -> float:
    """Seconds to write so many random bytes to a file and sync it; the file is deleted."""
    block = os.urandom(CHUNK)
    begin = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(nbytes // CHUNK):
            file.write(block)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begin
    path.unlink()
    return seconds


def main(recipe: str, checkpoint: Path, out: Path, options: list[str]) -> None:
    """Exports in a process of its own, then times the disk alone, and prints both with their ratio. Raises ToolkitError
    if the export fails."""
    shutil.rmtree(out, ignore_errors=True)
    drop_from_cache(checkpoint)
    words = ["export", recipe, "--checkpoint", str(checkpoint), "--out", str(out), "--no-validate", *options]
    begin = time.perf_counter()
    run_toolkit(words)
    export = time.perf_counter() - begin
    conversion = json.loads((out / "report.json").read_text(encoding="utf-8"))["conversion"]
    read = read_seconds(checkpoint)
    write = write_seconds(out.with_name("write.bin"), conversion["bytes_written"])
    stages = ", ".join(f"{stage['name']} {stage['wall_s']:.1f}" for stage in conversion["stages"])
    print(f"export {export:.1f} s ({stages}), peak RSS {conversion['peak_rss_bytes'] / 2**20:.0f} MiB")
    ratio = export / (read + write)
    print(f"disk alone: read {read:.1f} s + write {write:.1f} s; export / (read + write) = {ratio:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    asked, options = parser.parse_known_args()
    try:
        main(asked.recipe, asked.checkpoint, asked.out, options)
    except ToolkitError as problem:
        sys.exit(f"error: {problem}")
