"""Chat templates of a folder through jinja2 and onnxruntime-genai: how many come out alike as they stand, how many as
the toolkit writes them, and which do not.

    python -m benchmarks.templates FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from toolkit.errors import UnsupportedError
from toolkit.evaluate.renders import TemplateJob, as_it_stands, best_template

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def main(folder: Path) -> None:
    """One line for each template that is an exception, and the counts at the end."""
    counts = dict.fromkeys(("templates", "alike as they stand", "alike as written", "of these not changed"), 0)
    for number, path in enumerate(sorted(folder.rglob("*.jinja"))):
        if number % 20 == 0:
            print(f"{number} tried: {counts}", file=sys.stderr, flush=True)
        job = TemplateJob(path.read_bytes().decode("utf-8"), TOKENS)
        try:
            before = as_it_stands(job)
            counts["templates"] += 1
            counts["alike as they stand"] += not before.differs
            made = best_template(job)
        except UnsupportedError as problem:
            print(f"refused  {path.name}: {problem}", flush=True)
            continue
        counts["alike as written"] += not made.differs
        counts["of these not changed"] += not made.differs and not made.changes
        if made.differs:
            print(f"differs  {path.name}: {', '.join(made.differs)}", flush=True)
    print(", ".join(f"{name}: {count}" for name, count in counts.items()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
