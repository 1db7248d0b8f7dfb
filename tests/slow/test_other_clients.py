"""Clients that nobody here wrote drive `toolkit serve`: lm-evaluation-harness's `local-chat-completions`, and Vercel's
AI SDK where Node is on the path; each is installed into build/ first."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import toolkit
from tests.graphs import export_bundle
from tests.npm import npm_or_skip
from tests.own_python import python_with
from tests.served import Served, served
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent.parent
QUESTIONS = 20
# Those of a major that runs on Node 18 and later.
VERCEL = ("ai@5.0.277", "@ai-sdk/openai-compatible@1.0.61")
TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 300, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
# Reads {url, model, questions} as JSON; writes what each way of asking brought, a line of JSON in the end.
VERCEL_PROGRAM = """
import { generateText, streamText, generateObject, jsonSchema } from "ai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
const asked = JSON.parse(process.argv[2]);
const baseURL = asked.url + "/v1";
const provider = createOpenAICompatible({ name: "toolkit", baseURL, supportsStructuredOutputs: true });
const model = provider(asked.model);
const [question, other] = asked.questions;
const whole = await generateText({ model, prompt: question });
const messages = [
  { role: "user", content: question }, { role: "assistant", content: whole.text }, { role: "user", content: other },
];
let text = "", thought = "";
for await (const part of streamText({ model, messages }).fullStream) {
  if (part.type === "text-delta") text += part.text;
  if (part.type === "reasoning-delta") thought += part.text;
}
const properties = { sum: { type: "integer", minimum: 0, maximum: 99 } };
const schema = jsonSchema({ type: "object", properties, required: ["sum"], additionalProperties: false });
const { object } = await generateObject({ model, schema, prompt: question });
let refused = "";
try {
  await generateText({ model: provider("none"), prompt: question, maxRetries: 0 });
} catch (problem) { refused = problem.message; }
const told = [whole.reasoningText, whole.text, whole.finishReason, whole.usage];
console.log(JSON.stringify({ whole: told, stream: [thought, text], object, refused }));
"""


@pytest.fixture(scope="module")
def bundle(tiny_r1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = load_recipe("tiny-r1-cpu", ["quality=fast", "bits_per_weight=0"])
    return export_bundle(recipe, open_checkpoint(tiny_r1), tmp_path_factory.mktemp("served") / "tiny-r1-cpu", "int4")


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Served]:
    with served(bundle) as running:
        yield running


@pytest.fixture(scope="module")
def harness() -> Path:
    """A Python that has the harness with what its clients of APIs need; made once and kept."""
    return python_with("harness-api", "-c", "constraints.txt", "lm_eval[api]>=0.4.9")


def test_the_harness_asks_as_the_library_does(
    harness: Path, server: Served, bundle: Path, test_questions: list[dict[str, str]], tmp_path: Path
) -> None:
    rows = test_questions[:QUESTIONS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "sums.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"), encoding="utf-8")
    where = f"model=tiny-r1-cpu,base_url={server.url}/v1/chat/completions,num_concurrent=4,max_retries=1"
    words = ["--model", "local-chat-completions", "--model_args", where, "--apply_chat_template", "--tasks", "sums"]
    words += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "any"}
    done = subprocess.run(
        [harness, "-m", "lm_eval", *words], capture_output=True, text=True, encoding="utf-8", env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    (samples,) = (tmp_path / "out").rglob("samples_sums_*.jsonl")
    said = {row["doc"]["question"]: row["resps"][0][0] for row in _lines(samples)}
    expected = {row["question"]: toolkit.generate(bundle, row["question"], 300).text for row in rows}
    assert said == expected and len(said) > QUESTIONS / 2
    accuracy = json.loads(results.read_text(encoding="utf-8"))["results"]["sums"]["exact_match,none"]
    assert accuracy == pytest.approx(sum(said[row["question"]] == row["answer"] for row in rows) / len(rows))
    assert accuracy > 0.5


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def vercel() -> Path:
    """A folder with Vercel's AI SDK; made once and kept."""
    npm, folder = npm_or_skip(), ROOT / "build" / "vercel-ai"
    if not (folder / "installed").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"private": true}', encoding="utf-8")
        subprocess.run([npm, "install", "--no-audit", "--no-fund", "--silent", *VERCEL], check=True, cwd=folder)
        (folder / "installed").touch()
    return folder


def test_vercel_s_sdk_tells_thought_and_answer_apart(vercel: Path, server: Served, bundle: Path) -> None:
    questions = ["Add 4 and 5.", "Add 1 and 1."]
    (vercel / "talk.mjs").write_text(VERCEL_PROGRAM, encoding="utf-8")
    asked = json.dumps({"url": server.url, "model": "tiny-r1-cpu", "questions": questions})
    words = [str(shutil.which("node")), "talk.mjs", asked]
    done = subprocess.run(words, capture_output=True, text=True, encoding="utf-8", cwd=vercel, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    conversation = toolkit.Conversation(bundle, 400)
    answers = []
    for question in questions:
        for _ in conversation.ask(question):
            pass
        answers.append(conversation.answer)
    thought, text, reason, usage = said["whole"]
    assert (thought, text, reason) == (answers[0].thought, answers[0].text, "stop")
    assert (usage["inputTokens"], usage["outputTokens"]) == (answers[0].prompt_tokens, answers[0].new_tokens)
    assert said["stream"] == [answers[1].thought, answers[1].text]
    assert 0 <= said["object"]["sum"] <= 99 and "no model" in said["refused"]
