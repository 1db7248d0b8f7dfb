"""Milliseconds a decoded token on bare ORT, the cache bound in place, without onnxruntime-genai: bare_ort.py BUNDLE."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

PROMPT, NEW, WARM = 128, 64, 5


def main(bundle: Path) -> None:
    """Decodes NEW tokens after a cache of PROMPT and prints the median, the first WARM left out."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    session = ort.InferenceSession(str(bundle / "model.onnx"), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            cache = np.zeros((1, value.shape[1], PROMPT + NEW, value.shape[3]), np.float32)
            shared = ort.OrtValue.ortvalue_from_numpy(cache)
            binding.bind_ortvalue_input(value.name, shared)
            binding.bind_ortvalue_output(value.name.replace("past_key_values", "present"), shared)
    binding.bind_output("logits")
    times = []
    for length in range(PROMPT + 1, PROMPT + NEW + 1):
        binding.bind_cpu_input("input_ids", np.array([[5]], np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, length), np.int64))
        begin = time.perf_counter()
        session.run_with_iobinding(binding)
        times.append(time.perf_counter() - begin)
    median = statistics.median(times[WARM:])
    print(f"{median * 1e3:.1f} ms a token, {1 / median:.1f} tokens/s")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
