"""A bundle against its checkpoint on the same tokens, in llama.cpp's terms, judged by the recipe's thresholds."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from toolkit import names
from toolkit.bundle.manifest import read_manifest
from toolkit.checkpoint.config import read_config
from toolkit.checkpoint.weights import open_weights
from toolkit.errors import BundleError, CheckpointError
from toolkit.recipe import data_folder
from toolkit.reference.decoder import reference_logits
from toolkit.validate.session import AllPositions

_TEXT_FILE: Final = "validation.jsonl"
_AT_LEAST: Final = ("top1_agreement",)
_FP32_MAX_LOGIT_ERROR: Final = 1e-3


def validate_bundle(bundle: Path, checkpoint: Path, tokens: int) -> dict[str, Any]:
    """Compares, writes `report.json`, returns it. Text is the checkpoint's `validation.jsonl` (`text` per
    line), or the embedded reasoning traces if it brings none.
    """
    manifest = read_manifest(bundle)
    config = read_config(checkpoint)
    sequences = _sequences(checkpoint, tokens)
    expected = reference_logits(config, open_weights(checkpoint, config), sequences)
    session = AllPositions(bundle)
    parity = compare(expected, [session.logits(ids) for ids in sequences], sequences)
    fp32 = manifest["precision"] == "fp32"
    thresholds = {"max_abs_logit_error": _FP32_MAX_LOGIT_ERROR} if fp32 else manifest["recipe"]["validate"]
    report = {
        "schema_version": 1,
        "model": manifest["recipe"]["model"],
        "target": manifest["recipe"]["target"],
        "recipe": manifest["recipe"]["name"],
        "synthetic": manifest["synthetic"],
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "parity": {"reference": "numpy float32 forward of the checkpoint", **parity},
        "verdict": judge(parity, thresholds),
        "not_measured": [
            {"name": name, "reason": "this version does not measure it yet"}
            for name in ("machine", "conversion", "quantization", "partition", "simulator", "tasks", "speed", "ceiling")
        ],
    }
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (bundle / names.REPORT_FILE).write_text(text, encoding="utf-8", newline="\n")
    return report


def compare(
    expected: list[NDArray[np.float32]], actual: list[NDArray[np.float32]], sequences: list[list[int]]
) -> dict[str, float]:
    """KLD(reference || bundle) per position, top-1 agreement and perplexity over all sequences."""
    kld: list[NDArray[np.float64]] = []
    agree, error, losses = [], 0.0, ([], [])  # type: tuple[list[Any], float, tuple[list[Any], list[Any]]]
    for p, q, ids in zip(expected, actual, sequences, strict=True):
        log_p, log_q = _log_softmax(p), _log_softmax(q)
        kld.append((np.exp(log_p) * (log_p - log_q)).sum(axis=-1))
        agree.append(p.argmax(axis=-1) == q.argmax(axis=-1))
        error = max(error, float(np.abs(p - q).max()))
        for store, log in zip(losses, (log_q, log_p), strict=True):
            store.append(-log[np.arange(len(ids) - 1), ids[1:]])
    all_kld, loss = np.concatenate(kld), [float(np.exp(np.concatenate(store).mean())) for store in losses]
    return {
        "tokens": int(all_kld.size),
        "max_abs_logit_error": error,
        "mean_kld": float(all_kld.mean()),
        "median_kld": float(np.median(all_kld)),
        "p99_kld": float(np.quantile(all_kld, 0.99)),
        "p999_kld": float(np.quantile(all_kld, 0.999)),
        "top1_agreement": float(np.concatenate(agree).mean()),
        "perplexity": loss[0],
        "reference_perplexity": loss[1],
    }


def judge(parity: dict[str, float], thresholds: dict[str, float]) -> dict[str, Any]:
    """The verdict; a bundle never passes on no check."""
    checks = []
    for name, threshold in thresholds.items():
        if name not in parity:
            raise BundleError(f"threshold {name!r} is not a parity figure, expected one of {', '.join(parity)}")
        value = parity[name]
        passed = value >= threshold if name in _AT_LEAST else value <= threshold
        checks.append({"name": name, "value": value, "threshold": threshold, "passed": passed})
    return {"passed": bool(checks) and all(check["passed"] for check in checks), "checks": checks}


def _sequences(checkpoint: Path, tokens: int) -> list[list[int]]:
    path = checkpoint / _TEXT_FILE
    if not path.is_file():
        path = data_folder("models") / "tiny-r1" / _TEXT_FILE
    tokenizer = Tokenizer.from_file(str(checkpoint / names.TOKENIZER_FILE))
    sequences: list[list[int]] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            if sum(map(len, sequences)) >= tokens:
                break
            sequences.append(tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids)
    if not sequences:
        raise CheckpointError(f"{path} is empty: expected one JSON object with a `text` per line")
    return sequences


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)))
