"""Writes the questions that the model is judged on and the text it is calibrated on, traces that train.py never sees."""
import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tiny-r1"))
from generate import example, prompt, text  # noqa: E402

r = random.Random(20260104)
asked = [example(r) for _ in range(300)]
with (HERE / "arithmetic.jsonl").open("w", encoding="utf-8") as file:
    for e in asked:
        kept = {"task": e["task"], "question": e["question"], "answer": e["answer"], "prompt": prompt(e), "text": text(e)}
        file.write(json.dumps(kept, ensure_ascii=False) + "\n")
questions = {e["question"] for e in asked}
fresh = (e for e in iter(lambda: example(r), None) if e["question"] not in questions)
with (HERE / "calibration.jsonl").open("w", encoding="utf-8") as file:
    for _ in range(150):
        file.write(json.dumps({"text": text(next(fresh))}, ensure_ascii=False) + "\n")
