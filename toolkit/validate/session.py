"""A bundle opened: through ORT for the logits of every position, through onnxruntime-genai for text."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
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

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """[T, V] for one sequence, from an empty cache."""
        tokens = np.array([ids], np.int64)
        feed: dict[str, NDArray[np.int64] | NDArray[np.float32]] = {
            names.INPUT_IDS: tokens,
            names.ATTENTION_MASK: np.ones_like(tokens),
        }
        for value in self.session.get_inputs():
            if value.name not in feed:
                feed[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        (logits,) = self.session.run([names.LOGITS], feed)
        return np.asarray(np.asarray(logits)[0])


def greedy_tokens(bundle: Path, prompt: list[int], new_tokens: int) -> list[int]:
    """The continuation onnxruntime-genai makes, token by token, ended by eos or `new_tokens`."""
    og, model, _ = open_model(bundle)
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=len(prompt) + new_tokens)
    generator = og.Generator(model, params)
    generator.append_tokens(prompt)
    made: list[int] = []
    while len(made) < new_tokens and not generator.is_done():
        generator.generate_next_token()
        made.append(int(generator.get_next_tokens()[0]))
    return made


def stream_text(bundle: Path, question: str, max_new_tokens: int) -> Iterator[str]:
    """Text pieces of the answer to one question, with the bundle's chat template around it."""
    og, model, _ = open_model(bundle)
    tokenizer = og.Tokenizer(model)
    message = json.dumps([{"role": "user", "content": question}], ensure_ascii=False)
    prompt = tokenizer.encode(tokenizer.apply_chat_template(message, add_generation_prompt=True))
    params = og.GeneratorParams(model)
    limit = json.loads((bundle / names.GENAI_CONFIG_FILE).read_text(encoding="utf-8"))["model"]["context_length"]
    params.set_search_options(max_length=min(len(prompt) + max_new_tokens, limit))
    generator = og.Generator(model, params)
    generator.append_tokens(prompt)
    stream = tokenizer.create_stream()
    while not generator.is_done():
        generator.generate_next_token()
        yield stream.decode(generator.get_next_tokens()[0])


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
