"""lm-evaluation-harness over a bundle: `toolkit harness BUNDLE --tasks …`, or from Python

    from lm_eval import simple_evaluate
    from toolkit.evaluate.harness import BundleLM
    print(simple_evaluate(BundleLM("build/14b-cpu"), tasks=["gsm8k"], apply_chat_template=True, limit=50)["results"])

The only module that imports lm_eval, of the extra `harness`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from toolkit import names
from toolkit.bundle.reasoning import END_OF_THOUGHT
from toolkit.bundle.settings import read_settings
from toolkit.errors import BundleError, MachineError, RecipeError
from toolkit.evaluate.chat_prompt import ChatTemplate
from toolkit.evaluate.likelihood import Likelihood
from toolkit.evaluate.positions import open_positions
from toolkit.evaluate.session import OpenModel, open_model
from toolkit.evaluate.thought import after_thought

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError:
    raise MachineError("lm_eval is not installed: pip install lm_eval, or this package's extra `harness`") from None

_LENGTHS: Final = ("max_gen_toks", "max_new_tokens", "max_tokens")
_SAMPLING: Final = ("temperature", "top_p", "top_k")


@register_model("toolkit")
class BundleLM(LM):  # type: ignore[misc]
    """A bundle as lm_eval's model `toolkit`.

    Likelihoods come from the bundle's graphs on the CPU, text from onnxruntime-genai (`on_cpu` there too, whatever the
    bundle is made for). What is generated begins after the thought, so that stop strings, filters and metrics see the
    answer; a thought that never ends answers nothing. Raises BundleError or MachineError as `open_model` does.
    """

    def __init__(self, bundle: str | Path, on_cpu: bool = False) -> None:
        super().__init__()
        self._bundle, self._on_cpu = Path(bundle), on_cpu
        self._settings = read_settings(self._bundle)
        path = self._bundle / names.TOKENIZER_FILE
        if not path.is_file():
            raise BundleError(f"{self._bundle} has no {path.name}: a synthetic bundle has no words, only speed")
        self._tokenizer = Tokenizer.from_file(str(path))
        bos = self._settings.bos_token_id
        self._bos = "" if bos is None else self._tokenizer.id_to_token(bos) or ""
        self._prefix_id = self._settings.eos_token_ids[0] if bos is None else bos
        self._length = self._settings.context_length
        self._likelihood: Likelihood | None = None
        self._opened: OpenModel | None = None
        self._template: ChatTemplate | None = None

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Any = None) -> BundleLM:
        """Opens the bundle of `bundle=PATH,on_cpu=True`; the harness's own batch size and device mean nothing here."""
        return cls.create_from_arg_obj(dict(pair.split("=", 1) for pair in arg_string.split(",")))

    @classmethod
    def create_from_arg_obj(cls, arg_dict: Mapping[str, Any], additional_config: Any = None) -> BundleLM:
        """As `create_from_arg_string`, from the arguments as a mapping."""
        if "bundle" not in arg_dict or arg_dict.keys() - {"bundle", "on_cpu"}:
            given = ", ".join(arg_dict) or "none"
            raise RecipeError(f"the model's arguments are {given}: expected bundle=PATH, and on_cpu=True or not")
        return cls(str(arg_dict["bundle"]), str(arg_dict.get("on_cpu", False)).lower() == "true")

    @property
    def tokenizer_name(self) -> str:
        """Returns what the harness keys its request cache by."""
        return str(self._bundle.resolve())

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns a conversation as one prompt, by the bundle's chat template."""
        if self._template is None:
            self._template = ChatTemplate(self._bundle, self._model())
        return self._template.render(chat_history, add_generation_prompt)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns (log-likelihood, whether greedy) of each (context, continuation)."""
        scorer, results = self._scorer(), []
        for request in requests:
            results.append(scorer.of_continuation(*request.args))
            self.cache_hook.add_partial("loglikelihood", request.args, results[-1])
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each whole text."""
        scorer, results = self._scorer(), []
        for request in requests:
            results.append(scorer.of_text(*request.args))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns what each context is answered with, up to the first stop string.

        Without `max_gen_toks` an answer has what the context leaves. Raises RecipeError for an option that cannot be
        honoured or a context that leaves no room.
        """
        results = []
        for request in requests:
            context, options = request.args
            results.append(self._generated(context, options))
            self.cache_hook.add_partial("generate_until", request.args, results[-1])
        return results

    def _generated(self, context: str, options: Mapping[str, Any]) -> str:
        stops, new_tokens, search = _search_options(options, self._length)
        prompt = self._encode(context)
        room = self._settings.room_after(len(prompt), new_tokens)
        if room < 1:
            raise RecipeError(
                f"a prompt of {len(prompt)} tokens leaves no room in the bundle's context of {self._length}: ask for "
                "fewer examples in it (num_fewshot), or export with a larger --set context_length"
            )
        ids: list[int] = []
        for token in self._model().stream(prompt, room, **search):
            ids.append(token)
            if stops and (answer := self._answer(context, ids)) is not None and any(s in answer for s in stops):
                break
        answer = self._answer(context, ids) or ""
        return answer[: min((answer.index(s) for s in stops if s in answer), default=len(answer))]

    def _answer(self, context: str, ids: list[int]) -> str | None:
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        answer = after_thought(context, text)
        return answer.lstrip() if answer is not None and END_OF_THOUGHT in text else answer

    def _encode(self, text: str, special: bool = True) -> list[int]:
        special = special and not (self._bos and text.startswith(self._bos))
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    def _scorer(self) -> Likelihood:
        if self._likelihood is None:
            positions = open_positions(self._bundle)
            self._likelihood = Likelihood(positions.logits, self._encode, self._prefix_id, self._length)
        return self._likelihood

    def _model(self) -> OpenModel:
        if self._opened is None:
            self._opened = open_model(self._bundle, self._on_cpu)
        return self._opened


def run_harness(bundle: Path, on_cpu: bool, options: Sequence[str]) -> None:
    """lm_eval's own command line with a bundle for its model.

    Raises RecipeError for a bundle that the command line cannot name.
    """
    from lm_eval.__main__ import cli_evaluate

    read_settings(bundle)
    path = bundle.resolve()
    if "," in str(path):
        raise RecipeError(f"lm_eval parts its arguments at commas, and {path} has one: move the bundle")
    given, arguments = sys.argv, f"bundle={path}" + (",on_cpu=True" if on_cpu else "")
    sys.argv = ["lm_eval", "--model", "toolkit", "--model_args", arguments, *options]
    try:
        cli_evaluate()
    finally:
        sys.argv = given


def _search_options(options: Mapping[str, Any], length: int) -> tuple[list[str], int, dict[str, Any]]:
    """(stop strings, new tokens, onnxruntime-genai's search options) of a request's generation options."""
    if unknown := options.keys() - {"until", "do_sample", *_LENGTHS, *_SAMPLING}:
        known = ", ".join(("until", "do_sample", *_LENGTHS, *_SAMPLING))
        raise RecipeError(f"generation option {min(unknown)!r} is not supported, expected {known}")
    until = options.get("until") or []
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    new_tokens = next((int(options[key]) for key in _LENGTHS if options.get(key) is not None), length)
    sampling = {key: options[key] for key in _SAMPLING if options.get(key) is not None}
    # Without a word about sampling a temperature asks for it; a temperature of 0 never does.
    if not options.get("do_sample", sampling.get("temperature", 0) > 0) or sampling.get("temperature") == 0:
        return stops, new_tokens, {"do_sample": False}
    return stops, new_tokens, {"do_sample": True, **sampling}
