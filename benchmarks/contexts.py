"""How fast a bundle is behind a text of many tokens: `python -m benchmarks.contexts BUNDLE --filled 1024 4096`.

One cache is filled once. At each mark the table has the tokens a second of the prompt up to there, of its last stretch
alone, and of single tokens behind it; these are taken back, so that the prompt goes on. Each line says what else the
machine had to do.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from toolkit.evaluate.session import open_model


def main() -> None:
    """Prints a line for each mark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--filled", type=int, nargs="+", default=[1024, 4096, 8192, 16256])
    parser.add_argument("--new-tokens", type=int, default=24)
    given = parser.parse_args()
    opened, marks = open_model(given.bundle), sorted(given.filled)
    prompt = [i % min(opened.settings.vocab_size, 256) for i in range(marks[-1])]
    length = opened.settings.length_for(marks[-1], given.new_tokens)
    params = opened.og.GeneratorParams(opened.model)
    params.set_search_options(do_sample=False, min_length=length, max_length=length)
    generator, done, seconds = opened.fresh(params), 0, 0.0
    print("| filled | prompt up to here | its last stretch | single tokens | load |\n|---|---|---|---|---|")
    for mark in marks:
        start = time.perf_counter()
        generator.append_tokens(prompt[done:mark])
        stretch = time.perf_counter() - start
        # The first new token comes of the prompt's logits.
        generator.generate_next_token()
        start = time.perf_counter()
        for _ in range(given.new_tokens - 1):
            generator.generate_next_token()
        decode = (given.new_tokens - 1) / (time.perf_counter() - start)
        generator.rewind_to(mark)
        seconds += stretch
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        rates = f"{mark / seconds:.1f} | {(mark - done) / stretch:.1f} | {decode:.1f}"
        print(f"| {mark} | {rates} | {load:.1f} |", flush=True)
        done = mark


if __name__ == "__main__":
    main()
