"""A bundle's files under settings for the CPU: linked beside it for a while, and never left there for good."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.exports import Exports
from toolkit.bundle.settings import read_settings
from toolkit.evaluate.linked import linked_copy


def test_what_a_killed_process_left_goes_and_what_others_use_stays(exports: Exports, tmp_path: Path) -> None:
    bundle = exports.copy(tmp_path / "b", "qnn")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = {
        f".b-on-cpu-{ended.pid}-x": False,
        f".b-on-cpu-{os.getppid()}-x": True,
        f".bb-on-cpu-{ended.pid}-x": True,
        ".b-on-cpu-x": True,
        ".b-mine": True,
    }
    for name in left:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x", encoding="utf-8")
    with linked_copy(bundle, read_settings(bundle).on_cpu()) as folder:
        assert Path(folder).name.startswith(f".b-on-cpu-{os.getpid()}-")
        made = {path.name for path in Path(folder).iterdir()}
        assert made == {path.name for path in bundle.iterdir()}
        assert (Path(folder) / "embeddings.onnx").samefile(bundle / "embeddings.onnx")
    assert {name: (tmp_path / name).is_dir() for name in left} == left and not Path(folder).exists()
