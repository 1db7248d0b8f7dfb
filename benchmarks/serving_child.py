"""The process of a bundle in a server that is measured: what it is asked for is written as always, but a prompt that
begins with `bench` and a line feed is run as `toolkit bench` runs one, on the same open model."""

from __future__ import annotations

from typing import Final

from toolkit.evaluate.speed import run_once
from toolkit.evaluate.text_model import TextModel, Written
from toolkit.serve import child
from toolkit.serve.job import WRITTEN, Event, Job

MARK: Final = "bench\n"


def main() -> None:
    """In the child: puts the second way of answering beside the first."""
    served = child.write_text

    def either(model: TextModel, job: Job, orders: child.Orders, out: child.Out) -> Event:
        if job.prompt is None or not job.prompt.startswith(MARK):
            return served(model, job, orders, out)
        prompt = [*model.template.tokenizer.encode(job.prompt.removeprefix(MARK))]
        count = job.options.max_new_tokens or 1
        run = run_once(model._opened, prompt, count, count)
        decode_s = (count - 1) / run.decode_tokens_per_s
        return Event(WRITTEN, written=Written("length", False, len(prompt), count, 0, run.ttft_s, decode_s))

    child.write_text = either
    child.main()


if __name__ == "__main__":
    main()
