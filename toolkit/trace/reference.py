"""A checkpoint's own logits by transformers, in float32: what a traced bundle is compared with.

T tokens, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import CheckpointError
from toolkit.trace.traced import check_packages


class TransformersDecoder:
    """A checkpoint's decoder as transformers opens it, its weights in memory as float32. Raises MachineError where a
    package is missing, CheckpointError for what transformers does not open."""

    def __init__(self, folder: Path) -> None:
        check_packages()
        import torch
        import transformers

        self._torch = torch
        decoders: Any = transformers.AutoModelForCausalLM
        try:
            self._model = decoders.from_pretrained(
                folder,
                torch_dtype=torch.float32,
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                attn_implementation="eager",
            ).eval()
        except (OSError, ValueError, RuntimeError, KeyError) as problem:
            said = " ".join(str(problem).split())[:200]
            raise CheckpointError(f"transformers cannot open {folder}: {said}") from None

    def logits(self, sequences: Sequence[list[int]]) -> Iterator[NDArray[np.float32]]:
        """Yields [T, V] for each sequence."""
        for ids in sequences:
            with self._torch.no_grad():
                made = self._model(input_ids=self._torch.tensor([ids]), use_cache=False).logits[0]
            yield made.float().numpy()
