"""What a power cut may leave: a name is on the disk only after the bytes that it stands for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import called
from tests.hostile.smallest import make_smallest


@pytest.mark.skipif(os.name != "posix", reason="files are told apart by inodes")
def test_every_file_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an export that is calibrated: state between layers, settings, report, and the bundle's folder as a whole."""
    checkpoint, out = make_smallest(tmp_path / "checkpoint"), tmp_path / "out"
    text = "the cat and the dog went to the shop, and then the cat ate 345 cakes. " * 8
    (tmp_path / "text.txt").write_text("\n\n".join([text] * 8), encoding="utf-8")
    synced, named, unsynced = set[int](), list[str](), list[str]()
    fsync, replace = os.fsync, os.replace

    def syncs(descriptor: Any) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def renames(source: Any, target: Any) -> None:
        source, target = Path(source), Path(target)
        files = [path for path in source.rglob("*") if path.is_file()] if source.is_dir() else [source]
        if target.is_relative_to(tmp_path):
            named.append(target.name)
            unsynced.extend(f"{path.name} in {target.name}" for path in files if path.stat().st_ino not in synced)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", syncs)
    monkeypatch.setattr(os, "replace", renames)
    words = ["--checkpoint", str(checkpoint), "--out", str(out), "--quality", "best", "--no-validate"]
    changes = ["--set", "context_length=64", "--set", "calibration_tokens=300"]
    done = called("export", "cpu", *words, *changes, "--calibration", str(tmp_path / "text.txt"))
    assert done.returncode == 0, done.stderr
    assert unsynced == [] and named[-1] == "out"
    assert {"hidden-1.f32", "before-1.npz", "progress.json", "request.json", "manifest.json"} <= set(named)
    assert out.stat().st_ino in synced and tmp_path.stat().st_ino in synced
