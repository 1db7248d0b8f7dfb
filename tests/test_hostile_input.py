"""Input that is made to hurt: one line, in no time, in little memory. A beginning of the campaign's directed cases."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import called
from toolkit.checkpoint.config import parse_config
from toolkit.checkpoint.safetensors import read_header
from toolkit.errors import CheckpointError, RecipeError
from toolkit.graph.htp_faults import htp_faults
from toolkit.recipe import load_recipe

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{chr(98 + k)}: &{chr(98 + k)} [{', '.join([f'*{chr(97 + k)}'] * 9)}]" for k in range(9)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "anchors and aliases are not read"),
        ("x: !!int y", "cannot be read"),
        ("x: !!timestamp y", "cannot be read"),
        ("x: 2001-99-99", "cannot be read"),
        ("x: !!python/object:os.system y", "cannot be read"),
        ("[" * 5000, "cannot be read"),
        ("", "is empty"),
    ],
)
def test_yaml_that_is_no_recipe_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=said) as found:
        load_recipe(str(path))
    assert len(str(found.value)) < 500 and "\n" not in str(found.value)


@pytest.mark.parametrize("value", ["&a [*a]", "!!int x", "2001-99-99", "[" * 5000])
def test_a_change_that_is_no_value_is_one_line(value: str) -> None:
    with pytest.raises(RecipeError, match="is not YAML of a recipe") as found:
        load_recipe("tiny-r1-cpu", [f"context_length={value}"])
    assert len(str(found.value)) < 400


def test_an_error_line_is_of_bounded_length() -> None:
    done = called("export", "tiny-r1-cpu", "--set", "context_length='" + "x" * 50_000 + "'", "--dry-run")
    assert done.returncode == 2 and len(done.stderr.splitlines()[-1]) < 1100


@pytest.mark.parametrize("dtype", [[], {}, None, 7, "X" * 1000])
def test_a_dtype_of_another_kind_is_one_line(dtype: Any, tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": dtype, "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    with pytest.raises(CheckpointError, match="x has dtype") as found:
        read_header(tmp_path / "model.safetensors")
    assert len(str(found.value)) < 300


@pytest.mark.parametrize("layers", [1001, 2147483648, 10**400])
def test_layers_without_bound_are_refused(layers: int, tiny_r1: Path) -> None:
    raw = json.loads((tiny_r1 / "config.json").read_text(encoding="utf-8"))
    with pytest.raises(CheckpointError, match="up to 1000"):
        parse_config(raw | {"num_hidden_layers": layers}, Path("config.json"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_in_a_weights_place_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is no regular file"):
        read_header(tmp_path / "model.safetensors")


def test_a_hard_linked_bundle_is_checked_as_any(tmp_path: Path) -> None:
    """Bundles made in one pass share files, and so does any copy by links."""
    words = ["export", "tiny-r1-qnn", "--quality", "fast", "--no-validate", "--no-compile"]
    assert called(*words, "--out", str(tmp_path / "b")).returncode == 0
    shutil.copytree(tmp_path / "b", tmp_path / "linked", copy_function=os.link)
    stages = ["context", "iterator"]
    assert htp_faults(tmp_path / "linked", stages) == []
    done = called("check", str(tmp_path / "linked"))
    assert done.returncode == 0, done.stdout + done.stderr
    # The scales are read from the data file: planted ones are seen.
    (tmp_path / "linked" / "transformer.onnx.data").unlink()
    size = (tmp_path / "b" / "transformer.onnx.data").stat().st_size
    (tmp_path / "linked" / "transformer.onnx.data").write_bytes(b"\x11" * size)
    assert htp_faults(tmp_path / "linked", stages) != []
