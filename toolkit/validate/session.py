"""A bundle opened: through ORT for the logits of every position, through onnxruntime-genai for text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from toolkit import names
from toolkit.errors import BundleError, MachineError


class AllPositions:
    """The bundle's own graph with the last-position gather bypassed in memory, so every token can be judged."""

    def __init__(self, bundle: Path) -> None:
        if not (bundle / names.MODEL_FILE).is_file():
            raise BundleError(f"{bundle} has no {names.MODEL_FILE}: not a bundle this command can judge")
        model = onnx.load(bundle / names.MODEL_FILE, load_external_data=False)
        nodes = {node.name: node for node in model.graph.node}
        hidden, last = nodes["/lm_head/GatherND"].input[0], nodes["/lm_head/Unsqueeze"].output[0]
        for node in model.graph.node:
            if last in node.input and node.name != "/lm_head/Unsqueeze":
                node.input[list(node.input).index(last)] = hidden
        logits = next(value for value in model.graph.output if value.name == names.LOGITS)
        logits.type.tensor_type.shape.dim[1].dim_param = "sequence"
        options = ort.SessionOptions()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle))
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        self.session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def logits(self, ids: list[int], prompt: int | None = None) -> NDArray[np.float32]:
        """[T, V] for one sequence: the first `prompt` tokens (default all) at once, each later one with the cache."""
        stops = [len(ids)] if prompt is None else [prompt, *range(prompt + 1, len(ids) + 1)]
        cache = {
            value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
            for value in self.session.get_inputs()
            if value.name not in (names.INPUT_IDS, names.ATTENTION_MASK)
        }
        outputs = [value.name for value in self.session.get_outputs()]
        pieces, start = [], 0
        for stop in stops:
            tokens = {
                names.INPUT_IDS: np.array([ids[start:stop]], np.int64),
                names.ATTENTION_MASK: np.ones((1, stop), np.int64),
            }
            made = dict(zip(outputs, self.session.run(None, {**tokens, **cache}), strict=True))
            pieces.append(np.asarray(made[names.LOGITS])[0])
            cache = {past: np.asarray(made[past.replace("past_key_values", "present")]) for past in cache}
            start = stop
        return np.concatenate(pieces)


def continuations(bundle: Path, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """What onnxruntime-genai makes of each prompt, greedily, ended by eos or after `new_tokens`."""
    og, model, _ = open_model(bundle)
    made = []
    for prompt in prompts:
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=len(prompt) + new_tokens)
        generator = og.Generator(model, params)
        generator.append_tokens(prompt)
        tokens: list[int] = []
        while len(tokens) < new_tokens and not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        made.append(tokens)
    return made


def open_model(bundle: Path) -> tuple[Any, Any, float]:
    """(the onnxruntime_genai module, the bundle's Model, seconds to load it).

    Raises BundleError for a folder that is none, MachineError if onnxruntime-genai is missing.
    """
    if not (bundle / names.GENAI_CONFIG_FILE).is_file():
        raise BundleError(f"{bundle} has no {names.GENAI_CONFIG_FILE}: not a bundle")
    try:
        import onnxruntime_genai as og
    except ImportError:
        raise MachineError("onnxruntime-genai is not installed: pip install onnxruntime-genai") from None
    start = time.perf_counter()
    return og, og.Model(str(bundle)), time.perf_counter() - start
