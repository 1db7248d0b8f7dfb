"""A hub id through huggingface_hub, from a hub of our own on loopback: whole, resumed after a break, and offline."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gguf_files import from_checkpoint
from tests.loopback_hub import REPO, Hub, hub_environment, loopback_hub
from tests.random_models import make_checkpoint
from toolkit.checkpoint.config import read_config
from toolkit.checkpoint.download import hub_error, resolve_checkpoint
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.checkpoint.remote import HeadersAlone
from toolkit.checkpoint.safetensors import read_header
from toolkit.checkpoint.weights import find_tensors
from toolkit.errors import CheckpointError


@pytest.fixture(scope="module")
def repository(tiny_r1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # 41 MB: huggingface_hub keeps what it has in pieces of 10.
    folder = tmp_path_factory.mktemp("repository") / "hub"
    make_checkpoint("Qwen2", {"vocab_size": 20000, "hidden_size": 256}, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "train.py", "arithmetic.jsonl"):
        shutil.copy(tiny_r1 / name, folder)
    # Other formats of the same weights, and files of training, as repositories hold them.
    (folder / "consolidated.safetensors").write_bytes(b"not asked for")
    (folder / "trainer_state.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.fixture
def hub(repository: Path, tmp_path: Path) -> Iterator[Hub]:
    with loopback_hub(Path(shutil.copytree(repository, tmp_path / "hub"))) as server:
        yield server


def _run(hub: Hub, home: Path, *words: str, offline: str = "0") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "toolkit", *words]
    return subprocess.run(
        command, env=hub_environment(hub, home, offline), capture_output=True, text=True, encoding="utf-8"
    )


def _export(hub: Hub, home: Path, out: Path, offline: str) -> subprocess.CompletedProcess[str]:
    words = ["export", "cpu", "--checkpoint", REPO, "--no-validate", "--quality", "fast", "--out", str(out)]
    return _run(hub, home, *words, offline=offline)


def test_hub_id_is_downloaded_resumed_and_then_found_offline(hub: Hub, tmp_path: Path) -> None:
    broken = _export(hub, tmp_path / "home", tmp_path / "b", offline="0")
    assert broken.returncode == 2 and "run again to resume" in broken.stderr.splitlines()[-1]
    hub.mended = True
    done = _export(hub, tmp_path / "home", tmp_path / "b", offline="0")
    assert done.returncode == 0, done.stderr
    weights = [(command, wanted) for command, path, wanted in hub.requests if path.endswith(".safetensors")]
    data = (hub.folder / "model.safetensors").read_bytes()
    resumed = [int(wanted.removeprefix("bytes=").rstrip("-")) for _, wanted in weights if wanted]
    assert any(10 << 20 <= start <= len(data) // 2 for start in resumed), weights
    fetched = {path.rsplit("/", 1)[-1] for command, path, _ in hub.requests if command == "GET"}
    assert "model.safetensors" in fetched and "consolidated.safetensors" not in fetched
    assert not any(name.endswith((".py", ".jsonl", "trainer_state.json")) for name in fetched)
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text(encoding="utf-8"))
    entry = {"name": "model.safetensors", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["checkpoint"] == [entry]
    before = len(hub.requests)
    assert _export(hub, tmp_path / "home", tmp_path / "offline", offline="1").returncode == 0
    assert len(hub.requests) == before
    missing = _export(hub, tmp_path / "empty", tmp_path / "none", offline="1")
    assert missing.returncode == 2 and "could not be downloaded" in missing.stderr.splitlines()[-1]
    assert "on the local disk and outgoing traffic has been disabled: " in missing.stderr.splitlines()[-1]


def test_a_plan_and_a_look_fetch_headers_alone(hub: Hub, tmp_path: Path) -> None:
    size = (hub.folder / "model.safetensors").stat().st_size
    words = ["export", "cpu", "--checkpoint", REPO, "--dry-run", "--json"]
    done = _run(hub, tmp_path / "home", *words)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["download_bytes"] == size and plan["weights"] > 1e6
    looked = json.loads(_run(hub, tmp_path / "home", "inspect", REPO, "--json").stdout)
    assert looked["files"] == [{"name": "model.safetensors", "bytes": size}] and looked["dtypes"] == {"F32": 27}
    assert looked["hidden_size"] == 256 and looked["download_bytes"] == size
    # Half a percent of the file: what a header fits into, twice.
    assert hub.sent["model.safetensors"] <= 2 * (1 << 17) < size / 100
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    # The same plan as from the whole model, which then is looked at where it lies.
    hub.broken = hub.mended = True
    assert _export(hub, tmp_path / "home", tmp_path / "b", offline="0").returncode == 0
    whole = json.loads(_run(hub, tmp_path / "home", *words, "--quality", "fast", offline="1").stdout)
    assert "download_bytes" not in whole and whole["files"][-1] == plan["files"][-1]


def test_a_header_longer_than_the_first_request_is_fetched_whole(hub: Hub, tmp_path: Path) -> None:
    path = hub.folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    padded = data[8 : 8 + length] + b" " * 300_000
    path.write_bytes(len(padded).to_bytes(8, "little") + padded + data[8 + length :])
    looked = _run(hub, tmp_path / "home", "inspect", REPO, "--json")
    assert looked.returncode == 0, looked.stderr
    assert json.loads(looked.stdout)["dtypes"] == {"F32": 27}
    path.write_bytes((1 << 60).to_bytes(8, "little") + data[8:])
    refused = _run(hub, tmp_path / "home", "inspect", REPO)
    assert refused.returncode == 2 and f"claims a header of {1 << 60} bytes" in refused.stderr.splitlines()[-1]


def test_a_gguf_file_is_planned_by_its_header_and_then_downloaded_alone(hub: Hub, tmp_path: Path) -> None:
    path = from_checkpoint(hub.folder).write(hub.folder / "small.gguf")
    place = f"{REPO}:small.gguf"
    looked = _run(hub, tmp_path / "home", "inspect", place, "--json")
    assert looked.returncode == 0, looked.stderr
    facts = json.loads(looked.stdout)
    assert facts["files"] == [{"name": "small.gguf", "bytes": path.stat().st_size}] and facts["dtypes"] == {"F32": 27}
    assert facts["download_bytes"] == path.stat().st_size and facts["file_type"] == "F32"
    assert hub.sent["small.gguf"] <= (2 << 20) + 1 < path.stat().st_size / 10
    words = [
        "export",
        "cpu",
        "--checkpoint",
        place,
        "--precision",
        "fp32",
        "--no-validate",
        "--set",
        "context_length=64",
    ]
    planned = _run(hub, tmp_path / "home", *words, "--dry-run", "--json")
    assert planned.returncode == 0 and json.loads(planned.stdout)["source"]["file_type"] == "F32", planned.stderr
    assert not list((tmp_path / "home").rglob("*.gguf"))
    done = _run(hub, tmp_path / "home", *words, "--out", str(tmp_path / "b"))
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["checkpoint"][0]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert manifest["recipe"]["name"] == "small-cpu" and manifest["recipe"]["model"] == place
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    offline = _run(hub, tmp_path / "home", "inspect", place, "--json", offline="1")
    assert offline.returncode == 0 and "download_bytes" not in json.loads(offline.stdout), offline.stderr
    missing = _run(hub, tmp_path / "home", "inspect", f"{REPO}:none.gguf")
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1, missing.stderr


@pytest.mark.parametrize(
    ("file", "said"),
    [("pytorch_model.bin", "holds .bin pickles, which are never loaded"), ("small.gguf", "holds a GGUF file")],
)
def test_a_repository_of_another_format_is_called_so(hub: Hub, tmp_path: Path, file: str, said: str) -> None:
    (hub.folder / "model.safetensors").rename(hub.folder / file)
    (hub.folder / "consolidated.safetensors").unlink()
    for done in (_run(hub, tmp_path / "home", "inspect", REPO), _export(hub, tmp_path / "home", tmp_path / "b", "0")):
        assert done.returncode == 2 and f"{REPO} {said}" in done.stderr.splitlines()[-1], done.stderr
        assert "again" not in done.stderr.splitlines()[-1]


def test_a_revision_is_asked_for(hub: Hub, tmp_path: Path) -> None:
    assert _run(hub, tmp_path / "home", "inspect", REPO, "--revision", "v1").returncode == 0
    assert any("/revision/v1" in path for _, path, _ in hub.requests)
    unknown = _run(hub, tmp_path / "home", "inspect", REPO, "--revision", "v2")
    assert unknown.returncode == 2 and f"{REPO} has no revision 'v2'" in unknown.stderr.splitlines()[-1]
    local = _run(hub, tmp_path / "home", "export", "cpu", "--checkpoint", str(hub.folder), "--revision", "v1")
    assert local.returncode == 2 and "a revision is for hub ids" in local.stderr.splitlines()[-1]


def test_weights_that_are_not_here_cannot_be_read(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config(hub.folder)
    refs = find_tensors(hub.folder, config, read_header).refs
    source = HeadersAlone(REPO, refs, {hub.folder / "model.safetensors": 1})
    name = source.names()[0]
    reads = (lambda: source.read(name), lambda: source.read_rows(name, 0, 1), lambda: next(iter(source.scan(1 << 20))))
    for read in reads:
        with pytest.raises(CheckpointError, match=f"of {REPO} the headers alone are here"):
            read()


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (OSError("It broke. Try again."), "It broke; run again"),
        (ValueError(), "ValueError; run again"),
        (OSError("Cannot look it up on https://a.b/c.d\nPlease check."), "Cannot look it up on https://a.b/c.d; run"),
    ],
)
def test_a_failed_download_says_a_whole_sentence(raised: Exception, said: str) -> None:
    assert f"a/b could not be downloaded: {said}" in str(hub_error("a/b", None, raised))


def test_a_failed_download_keeps_its_cause() -> None:
    try:
        try:
            raise ConnectionError("Connection refused")
        except ConnectionError as cause:
            raise OSError("The file is not here. Check your connection.") from cause
    except OSError as problem:
        assert "downloaded: The file is not here: Connection refused; run again" in str(hub_error("a/b", None, problem))


def test_a_hub_id_is_sized_by_its_headers_and_got(hub: Hub, tmp_path: Path) -> None:
    home, hub.broken, hub.mended = tmp_path / "home", True, True
    done = _run(hub, home, "recipes", "--hub", REPO, "--model", REPO, "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert (row["kind"], row["target"], row["license"]) == ("hub", "cpu", "mit")
    weights = hub.folder / "model.safetensors"
    assert hub.sent[weights.name] < weights.stat().st_size / 4
    done = _run(hub, home, "get", REPO, "--quality", "fast", "--out", str(tmp_path / "b"))
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "b" / "manifest.json").read_text(encoding="utf-8"))
    # Without a text nothing is left open before the export: the forecast is the bundle.
    assert sum(file["bytes"] for file in made["files"] if file["name"].endswith(".data")) <= row["bundle_bytes"]
    assert "is the best that is here" in done.stderr


def test_a_url_is_copied_once_and_file_is_a_path(
    tiny_r1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsspec's own archive reader stands for all that it reads: what is no part of a checkpoint stays there."""
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    with zipfile.ZipFile(tmp_path / "models.zip", "w") as archive:
        for path in tiny_r1.iterdir():
            archive.write(path, f"tiny/{path.name}")
        archive.writestr("tiny/optimizer.pt", "state")
    url = f"zip://tiny::file://{tmp_path.as_posix()}/models.zip"
    folder = resolve_checkpoint(url)
    expected = open_checkpoint(tiny_r1).source
    found = open_checkpoint(folder).source
    assert [(origin.name, origin.bytes) for origin in found.identity()] == [
        (origin.name, origin.bytes) for origin in expected.identity()
    ]
    assert not (folder / "optimizer.pt").exists() and (folder / "tokenizer.json").is_file()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert resolve_checkpoint(url) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert resolve_checkpoint(tiny_r1.as_uri()) == tiny_r1


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nothing://bucket/model", "nothing://bucket/model is no URL that fsspec reads"),
        ("memory://no/such/folder", "no/such/folder holds no file"),
        ("zip://tiny::file:///no/such.zip", "cannot be read"),
    ],
)
def test_a_url_that_cannot_be_read_is_one_line(url: str, said: str) -> None:
    with pytest.raises(CheckpointError) as problem:
        resolve_checkpoint(url)
    assert said in str(problem.value) and "\n" not in str(problem.value)
    with pytest.raises(CheckpointError, match="a revision is for hub ids"):
        resolve_checkpoint(url, "main")
