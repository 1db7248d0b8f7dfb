"""How many questions of a JSONL (`prompt`, `answer`) a bundle answers, greedily: accuracy.py BUNDLE [JSONL]."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer

from toolkit.validate.session import open_model

TESTS = Path(__file__).resolve().parent.parent / "tests" / "data" / "tiny-r1.test.jsonl"


def main(bundle: Path, questions: Path) -> None:
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    og, model, _ = open_model(bundle)
    right = total = 0
    for line in questions.read_text(encoding="utf-8").splitlines():
        question = json.loads(line)
        prompt = tokenizer.encode(question["prompt"], add_special_tokens=False).ids
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=len(prompt) + 300)
        generator = og.Generator(model, params)
        generator.append_tokens(prompt)
        made: list[int] = []
        while not generator.is_done():
            generator.generate_next_token()
            made.append(int(generator.get_next_tokens()[0]))
        answer = tokenizer.decode(made, skip_special_tokens=True).split("</think>")[-1].strip()
        right, total = right + (answer == question["answer"]), total + 1
    print(f"{right} of {total} right, {100 * right / total:.1f}%")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else TESTS)
