"""Places and files that are none: pipes, devices, folders, loops of links, names that no file system takes, no text."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_line import ROOT, called
from tests.hostile.parsers import EXPORT, GENERATE
from tests.hostile.sandbox import Sandbox

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes, devices and such names are POSIX systems'")
_RUN = [sys.executable, "-m", "toolkit"]


def _refused(said: str, *words: str) -> None:
    done = called(*words)
    assert done.returncode == 2, done
    assert done.stderr.splitlines()[-1].startswith("error: ") and said in done.stderr, done.stderr
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr and len(done.stderr) < 3000


def _zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


KINDS: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "device": _zeros,
    "folder": Path.mkdir,
    "loop": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
    ],
)
def test_a_file_of_a_checkpoint_that_is_none(kind: str, name: str, sandbox: Sandbox) -> None:
    path, kept = sandbox.root / "checkpoint" / name, sandbox.root / "kept"
    there = path.exists()
    if there:
        path.rename(kept)
    KINDS[kind](path)
    try:
        done = called(*sandbox.words(EXPORT))
        optional = kind == "loop" and name.split(".")[0] in ("generation_config", "special_tokens_map", "chat_template")
        assert done.returncode in ((0, 2) if optional or name == "tokenizer_config.json" else (2,)), done
        assert done.stderr.count("error: ") == (done.returncode == 2) and "Traceback" not in done.stderr
    finally:
        path.rmdir() if kind == "folder" else path.unlink()
        if there:
            kept.rename(path)
        sandbox.cleared()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["manifest.json", "genai_config.json", "model.onnx", "model.onnx.data", "reasoning.json", "tokenizer.json"]
)
def test_a_file_of_a_bundle_that_is_none(kind: str, name: str, sandbox: Sandbox) -> None:
    path, kept = sandbox.root / "bundle" / name, sandbox.root / "kept"
    path.rename(kept)
    KINDS[kind](path)
    try:
        for command in (("check", "{bundle}"), ("verify", "{bundle}"), ("inspect", "{bundle}"), GENERATE):
            done = called(*sandbox.words(command))
            assert done.returncode in (0, 1, 2) and "Traceback" not in done.stderr, (command, done)
            assert done.stderr.count("error: ") == (done.returncode == 2), (command, done.stderr)
            if command[0] == "verify":
                assert done.returncode in (1, 2)
    finally:
        path.rmdir() if kind == "folder" else path.unlink()
        kept.rename(path)


@pytest.mark.parametrize(
    ("option", "kind", "said"),
    [
        ("--text", "pipe", "no regular file"),
        ("--text", "device", "no regular file"),
        ("--task", "pipe", "no regular file"),
        ("--task", "folder", "no regular file"),
        ("--calibration", "pipe", "no regular file"),
        ("--calibration", "device", "no regular file"),
    ],
)
def test_a_text_that_is_none(option: str, kind: str, said: str, sandbox: Sandbox, tmp_path: Path) -> None:
    KINDS[kind](tmp_path / "x.jsonl")
    words = [word for word in sandbox.words(EXPORT) if word != "--no-validate"]
    quality = ["--quality", "balanced"] if option == "--calibration" else []
    _refused(said, *words, *quality, option, str(tmp_path / "x.jsonl"))


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
def test_a_recipe_that_is_none(kind: str, sandbox: Sandbox, tmp_path: Path) -> None:
    KINDS[kind](tmp_path / "x.yaml")
    _refused("", "export", str(tmp_path / "x.yaml"), *sandbox.words(EXPORT)[2:])


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("/", "cannot be a bundle"),
        ("{tmp}/" + "x" * 300, "File name too long"),
        ("{tmp}/" + "x" * 250, "File name too long"),
        ("{tmp}/loop", "link that leads nowhere"),
        ("{tmp}/loop/x", ""),
        ("{tmp}/file/x", "is no folder"),
        ("{tmp}/no\udcffutf", "no text"),
        ("{tmp}/a\nb", "no text"),
        ("{tmp}/a\x07b", "no text"),
        ("/dev/null", "is not a bundle"),
        ("/proc/x", ""),
    ],
)
def test_an_out_that_is_no_place(out: str, said: str, sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    words = sandbox.words(EXPORT)
    words[words.index("--out") + 1] = out.replace("{tmp}", str(tmp_path))
    _refused(said, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


@pytest.mark.parametrize("command", ["check", "verify", "inspect", "compile", "generate", "validate", "bench"])
@pytest.mark.parametrize("name", ["x" * 300, "loop", "gone", "file", "", "no\udcffutf", "a\nb", "/"])
def test_a_bundle_that_is_none(command: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    more = ["--prompt", "x"] if command == "generate" else []
    _refused("", command, "/" if name == "/" else str(tmp_path / name), *more)


@pytest.mark.parametrize("name", ["x" * 300, "loop", "gone", "file", "no\udcffutf"])
def test_a_checkpoint_or_recipe_that_is_none(name: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    _refused("", "export", "cpu", "--checkpoint", str(tmp_path / name), "--out", str(tmp_path / "out"))
    _refused("", "export", str(tmp_path / name), "--out", str(tmp_path / "out"))
    _refused("", "export", name, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def _run(words: list[str], folder: Path, stdout: int | Path) -> tuple[int, str]:
    with open(stdout, "wb") if isinstance(stdout, Path) else open(os.devnull, "wb") as out:
        done = subprocess.run(
            [*_RUN, *words],
            stdout=out,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            text=True,
            encoding="utf-8",
        )
    return done.returncode, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_full_device_for_stdout_is_one_line(more: list[str], sandbox: Sandbox) -> None:
    code, said = _run(["verify", str(sandbox.root / "bundle"), *more], ROOT, Path("/dev/full"))
    assert code == 2 and said.count("\n") == 1 and "No space left on device" in said


def test_a_folder_that_is_gone_is_one_line(sandbox: Sandbox, tmp_path: Path) -> None:
    gone = "import os, sys, tempfile; os.chdir(tempfile.mkdtemp()); os.rmdir(os.getcwd());"
    code = f"{gone} sys.argv = ['toolkit', *sys.argv[1:]]; from toolkit.cli.commands import main; main()"
    words = [
        sys.executable,
        "-c",
        code,
        "export",
        "cpu",
        "--checkpoint",
        str(sandbox.root / "checkpoint"),
        "--out",
        "q",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, encoding="utf-8", env=environment)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(
        "error: the folder that this runs in is gone"
    )
