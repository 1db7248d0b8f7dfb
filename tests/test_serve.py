"""`toolkit serve` through the openai client and plain HTTP, over real bundles of tiny-r1 in processes of their own."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

import toolkit
from tests.exports import Exports
from tests.served import ROOT, Served, one_thread, served, with_tools
from toolkit.evaluate.text_model import TextOptions
from toolkit.serve.body import MOST_BODY_BYTES
from toolkit.serve.engine import Engine, Kept
from toolkit.serve.guard import Doors
from toolkit.serve.job import Job
from toolkit.serve.process import BundleProcess

QUESTIONS = ["Add 4 and 5.", *(f"Add {100 + 37 * k} and {200 + 91 * k}." for k in range(1, 8))]
# Hundreds of tokens: a short answer could be whole before anybody leaves or stops it.
NUMBERS = {"type": "array", "items": {"type": "integer"}, "minItems": 200}
LONG = {
    "messages": [{"role": "user", "content": QUESTIONS[1]}],
    "response_format": {"type": "json_schema", "json_schema": {"name": "numbers", "schema": NUMBERS}},
}


@pytest.fixture(scope="module")
def bundle(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return one_thread(exports.copy(tmp_path_factory.mktemp("served") / "tiny-r1-cpu", "cpu"))


@pytest.fixture(scope="module")
def server(bundle: Path, exports: Exports) -> Iterator[Served]:
    other = with_tools(one_thread(exports.copy(bundle.parent / "with-tools", "cpu")))
    with served(bundle, other, "--keep", "2") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Served) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60)


def _asked(client: Any, question: str, **options: Any) -> Any:
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(**{"model": "tiny-r1-cpu", "messages": messages, **options})


def _streamed(client: Any, question: str, **options: Any) -> tuple[str, str, list[Any]]:
    """Thought and answer of a streamed reply, joined, and its chunks."""
    chunks = list(_asked(client, question, stream=True, **options))
    parts = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    thought = "".join(getattr(part, "reasoning_content", None) or "" for part in parts)
    return thought, "".join(part.content or "" for part in parts), chunks


def test_an_answer_is_what_generate_says(client: Any, bundle: Path) -> None:
    said, expected = _asked(client, QUESTIONS[0]), toolkit.generate(bundle, QUESTIONS[0])
    message = said.choices[0].message
    assert (message.content, message.reasoning_content) == (expected.text, expected.thought)
    assert expected.text == "9" and said.choices[0].finish_reason == "stop"
    assert (said.usage.prompt_tokens, said.usage.completion_tokens) == (expected.prompt_tokens, expected.new_tokens)
    assert said.usage.total_tokens == expected.prompt_tokens + expected.new_tokens
    assert 0 < said.usage.completion_tokens_details.reasoning_tokens < said.usage.completion_tokens


def test_a_stream_is_the_whole_answer(client: Any) -> None:
    for question in (*QUESTIONS[:2], "Spell the word river backwards."):
        thought, text, chunks = _streamed(client, question, stream_options={"include_usage": True})
        message = _asked(client, question).choices[0].message
        assert (thought, text) == (message.reasoning_content, message.content)
        assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-1].usage.completion_tokens > 5
        # A fast model's tokens come several at once, the first by itself.
        assert len(chunks) < chunks[-1].usage.completion_tokens
        assert 0 < len(chunks[1].choices[0].delta.reasoning_content) < 8 < len(thought)


def test_eight_at_once_are_told_what_they_are_told_one_by_one(client: Any) -> None:
    alone = [_streamed(client, question)[:2] for question in QUESTIONS]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda question: _streamed(client, question)[:2], QUESTIONS))
    assert together == alone and len(set(alone)) == 8


def test_a_seed_repeats_an_answer_and_another_does_not(client: Any) -> None:
    wild: dict[str, Any] = {"temperature": 2.0, "top_p": 1.0, "max_tokens": 30, "extra_body": {"top_k": 0}}
    texts = [_streamed(client, QUESTIONS[0], seed=seed, **wild)[:2] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert _streamed(client, QUESTIONS[0], temperature=0)[1] == "9"


def test_max_tokens_cut_and_are_counted(client: Any) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        said = _asked(client, QUESTIONS[0], **{name: 7})
        assert (said.choices[0].finish_reason, said.usage.completion_tokens) == ("length", 7)


def test_stop_strings_end_the_answer_and_not_the_thought(client: Any) -> None:
    whole = _asked(client, QUESTIONS[3]).choices[0].message
    stop = whole.content[1]
    assert stop in whole.reasoning_content
    said = _asked(client, QUESTIONS[3], stop=[stop, "never"]).choices[0]
    assert (said.message.content, said.message.reasoning_content) == (whole.content[0], whole.reasoning_content)
    assert said.finish_reason == "stop"
    assert _streamed(client, QUESTIONS[3], stop=stop)[1] == whole.content[0]


def test_logprobs_are_the_model_s_own(client: Any) -> None:
    said = _asked(client, QUESTIONS[0], logprobs=True, top_logprobs=3).choices[0].logprobs
    assert "".join(token.token for token in said.content).strip() == "9"
    for token in said.content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token  # greedy
        assert sum(math.exp(one.logprob) for one in token.top_logprobs) <= 1 + 1e-6
    assert len(said.reasoning_content) > 20


def test_an_answer_is_json_of_a_schema_after_its_thought(client: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 999}, "is_even": {"type": "boolean"}},
        "required": ["sum", "is_even"],
        "additionalProperties": False,
    }
    wanted: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}}
    said = _asked(client, QUESTIONS[0], response_format=wanted).choices[0]
    assert said.message.reasoning_content == _asked(client, QUESTIONS[0]).choices[0].message.reasoning_content
    answer = json.loads(said.message.content)
    assert answer.keys() == {"sum", "is_even"} and 0 <= answer["sum"] <= 999 and isinstance(answer["is_even"], bool)
    with pytest.raises(openai.BadRequestError, match="cannot hold the answer"):
        wanted["json_schema"] = {"name": "bad", "schema": {"type": "nonsense"}}
        _asked(client, QUESTIONS[0], response_format=wanted)


def test_a_tool_is_called_where_the_template_has_a_place_for_it(client: Any) -> None:
    parameters: dict[str, Any] = {"type": "object", "properties": {"x": {"enum": ["a", "b"]}}, "required": ["x"]}
    parameters["additionalProperties"] = False
    tools = [{"type": "function", "function": {"name": "look", "parameters": parameters}}]
    asked: dict[str, Any] = {"model": "with-tools", "tools": tools, "tool_choice": "required"}
    said = _asked(client, QUESTIONS[0], **asked).choices[0]
    (call,) = said.message.tool_calls
    assert said.finish_reason == "tool_calls" and call.function.name == "look"
    assert json.loads(call.function.arguments)["x"] in ("a", "b")
    _, text, chunks = _streamed(client, QUESTIONS[0], **asked)
    deltas = [delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or []]
    assert [delta.function.arguments for delta in deltas] == [call.function.arguments] and text == ""
    with pytest.raises(openai.BadRequestError, match="no place for tools"):
        _asked(client, QUESTIONS[0], tools=tools)


def test_completions_go_on_with_a_text_as_it_stands(client: Any, bundle: Path) -> None:
    prompt = "<｜begin▁of▁sentence｜><｜User｜>Add 4 and 5.<｜Assistant｜><think>\n"
    said = client.completions.create(model="tiny-r1-cpu", prompt=prompt, logprobs=1)
    expected = toolkit.generate(bundle, "Add 4 and 5.")
    thought, _, text = said.choices[0].text.partition("</think>")
    assert (thought.strip(), text.strip()) == (expected.thought, expected.text)
    assert said.usage.completion_tokens == expected.new_tokens
    stream = client.completions.create(model="tiny-r1-cpu", prompt=prompt, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == said.choices[0].text


def test_responses_tell_thought_and_text(client: Any, bundle: Path) -> None:
    expected = toolkit.generate(bundle, QUESTIONS[1])
    said = client.responses.create(model="tiny-r1-cpu", input=QUESTIONS[1])
    assert said.output_text == expected.text and said.status == "completed"
    assert said.output[0].content[0].text == expected.thought
    events = list(client.responses.create(model="tiny-r1-cpu", input=QUESTIONS[1], stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    told = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(told) == expected.text
    assert events[-1].type == "response.completed" and events[-1].response.output_text == expected.text


def test_earlier_thoughts_never_enter_a_prompt(client: Any) -> None:
    turns = [{"role": "user", "content": "Add 4 and 5."}, {"role": "assistant", "content": "9"}]
    thinking = {"role": "assistant", "content": "<think>\n4 and 5 are 9\n</think>\n9", "reasoning_content": "4 and 5"}
    last = {"role": "user", "content": "Add 1 and 1."}
    counts = {
        client.chat.completions.create(model="tiny-r1-cpu", messages=messages, max_tokens=1).usage.prompt_tokens
        for messages in ([*turns, last], [turns[0], thinking, last])
    }
    assert len(counts) == 1


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"messages": []}, 400, "messages is missing"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "no role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "no text"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "context 1024"),
        ({"model": "../tiny-r1-cpu"}, 404, "no model"),
        ({"n": 2}, 400, "n is not supported"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty is not supported"),
        ({"temperature": 3}, 400, "temperature is 3"),
        ({"temperature": "hot"}, 400, "temperature is 'hot'"),
        ({"max_tokens": 0}, 400, "max_tokens is 0"),
        ({"stop": [""]}, 400, "stop is no text"),
        ({"top_logprobs": 99, "logprobs": True}, 400, "top_logprobs is 99"),
        ({"tool_choice": "required", "tools": [{"type": "x"}]}, 400, "tools is no array"),
        ({"response_format": {"type": "xml"}}, 400, "response_format"),
    ],
)
def test_what_cannot_be_done_is_said(server: Served, change: dict[str, Any], status: int, said: str) -> None:
    asked = {"model": "tiny-r1-cpu", "messages": [{"role": "user", "content": "Add 1 and 1."}], **change}
    with server.client() as http:
        answer = http.post("/v1/chat/completions", json=asked)
    assert answer.status_code == status and said in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"[" * 100_000, b'{"temperature": NaN}', b'{"model": "\\ud800"}', b"\xff{}"]
)
def test_a_body_that_is_no_object_is_refused(server: Served, body: bytes) -> None:
    with server.client() as http:
        answer = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_a_body_has_a_bound_whether_it_tells_its_length_or_not(server: Served) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(MOST_BODY_BYTES // 65536 + 2):
            yield b" " * 65536

    with server.client() as http:
        for content in (pieces(), b" " * (MOST_BODY_BYTES + 1)):
            answer = http.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code == 413


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:8080"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "localhost"}, 200),
        ({"Host": "[::1]:99"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:5", "Origin": "http://localhost:6"}, 403),
        ({"Host": "localhost:5", "Origin": "http://localhost:5"}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
    ],
)
def test_pages_of_other_sites_are_kept_out(server: Served, headers: dict[str, str], status: int) -> None:
    with server.client(**headers) as http:
        assert http.get("/v1/models").status_code == status


def test_a_form_of_another_site_cannot_post(server: Served) -> None:
    asked = json.dumps({"messages": [{"role": "user", "content": "x"}]})
    with server.client() as http:
        answer = http.post("/v1/chat/completions", content=asked, headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415


def test_a_key_is_asked_for_where_one_is_set_and_beyond_loopback(bundle: Path) -> None:
    from tests.command_line import called

    refused = called("serve", str(bundle), "--host", "0.0.0.0")
    assert refused.returncode == 2 and "--api-key" in refused.stderr
    with served(bundle, "--host", "0.0.0.0", "--api-key", "secret", "--allow-host", "Desk.local") as running:
        for headers, status in (
            ({}, 401),
            ({"Authorization": "Bearer wrong"}, 401),
            ({"Authorization": "Bearer secret"}, 200),
            ({"Authorization": "Bearer secret", "Host": "desk.local:1"}, 200),
            ({"Authorization": "Bearer secret", "Host": "evil.example"}, 403),
        ):
            with running.client(**headers) as http:
                assert http.get("/v1/models").status_code == status
                assert http.get("/metrics").status_code == status
        with running.client() as http:
            assert http.get("/health").status_code == http.get("/").status_code == 200
            assert "secret" not in http.get("/").text


def test_no_path_of_the_machine_is_answered(bundle: Path, exports: Exports, tmp_path: Path) -> None:
    broken = exports.copy(tmp_path / "broken", "cpu")
    (broken / "model.onnx").write_bytes(b"no graph")
    with served(broken) as running, running.client() as http:
        answer = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
        pages = [http.get(path) for path in ("/v1/models", "/metrics", "/v1/models/..%2F..", "/static/../app.py")]
        assert answer.status_code == 503
        for page in (answer, *pages):
            assert str(tmp_path) not in page.text and "/tmp" not in page.text
        assert [page.status_code for page in pages] == [200, 200, 404, 404]
    assert any("broken" in line for line in running.said)


@contextmanager
def _held_amid_an_answer(running: Served, http: httpx.Client) -> Iterator[Iterator[str]]:
    """Gives the lines of an answer in whose middle its process is held. One that was whole by then, on a machine with
    much else to do, is read to its end and asked for again."""
    for _ in range(5):
        with http.stream("POST", "/v1/chat/completions", json={**LONG, "stream": True}) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data:")
            running.child.suspend()
            time.sleep(0.2)  # in which the server takes what was made before
            if "toolkit_requests_processing 1" in http.get("/metrics").text:
                yield lines
                return
            running.child.resume()
            assert list(lines)
    pytest.fail("every answer was whole before its process could be held")


def test_beyond_the_queue_is_429_and_a_client_that_leaves_makes_room(bundle: Path) -> None:
    asked = {"messages": [{"role": "user", "content": QUESTIONS[1]}]}
    with served(bundle, "--queue", "1") as running, running.client() as http, ThreadPoolExecutor(1) as pool:
        with _held_amid_an_answer(running, http):
            waiting = pool.submit(running.client().post, "/v1/chat/completions", json=asked)
            _until(lambda: "toolkit_requests_deferred 1" in http.get("/metrics").text)
            answer = http.post("/v1/chat/completions", json=asked)
            assert answer.status_code == 429 and "wait already" in answer.json()["error"]["message"]
            assert not waiting.done()
        running.child.resume()
        assert waiting.result(60).status_code == 200
        figures = http.get("/metrics").text
        assert 'outcome="left"} 1' in figures and "toolkit_requests_rejected_total 1" in figures
        assert "toolkit_requests_deferred 0" in figures and "toolkit_requests_processing 0" in figures


def test_a_client_that_waits_and_leaves_frees_its_place(bundle: Path) -> None:
    asked = {"messages": [{"role": "user", "content": QUESTIONS[1]}]}
    with served(bundle, "--queue", "1") as running, running.client() as http, ThreadPoolExecutor(1) as pool:
        with _held_amid_an_answer(running, http):
            for stream in (False, True):
                with socket.create_connection(("127.0.0.1", running.port)) as left:
                    body = json.dumps({**asked, "stream": stream}).encode()
                    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                    left.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                    _until(lambda: "toolkit_requests_deferred 1" in http.get("/metrics").text)
                    assert http.post("/v1/chat/completions", json=asked).status_code == 429
                _until(lambda: "toolkit_requests_deferred 0" in http.get("/metrics").text)
            waiting = pool.submit(running.client().post, "/v1/chat/completions", json=asked)
            _until(lambda: "toolkit_requests_deferred 1" in http.get("/metrics").text)
        running.child.resume()
        assert waiting.result(60).status_code == 200
        assert 'outcome="left"} 3' in http.get("/metrics").text


def test_a_report_opens_by_a_signed_address_where_a_key_is_set(bundle: Path, exports: Exports) -> None:
    other = exports.copy(bundle.parent / "another one", "cpu")
    for folder in (bundle, other):
        (folder / "report.html").write_text(f"<title>{folder.name}</title>", encoding="utf-8")
    with served(bundle, other, "--api-key", "secret") as running, running.client() as http:
        rows = http.get("/playground/bundles", headers={"Authorization": "Bearer secret"}).json()["bundles"]
        for row, folder in zip(rows, (bundle, other), strict=True):
            assert folder.name in http.get(row["report"]).text and "secret" not in row["report"]
        path, _, query = rows[0]["report"].partition("?")
        signature = query.rpartition("=")[2]
        for address in (
            path,
            f"{path}?until=9999999999&signature={signature}",
            f"{path}?until=1&signature={Doors('secret')._signature(path, 1)}",
            f"{rows[1]['report'].partition('?')[0]}?{query}",
            f"/v1/models?{query}",
            f"{path}?until=x&signature=é",
        ):
            assert http.get(address).status_code == 401


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_missing_package_is_one_line_with_what_to_install(package: str, bundle: Path) -> None:
    program = f"import sys; sys.modules[{package!r}] = None; from toolkit.__main__ import run; run()"
    command = [sys.executable, "-c", program, "serve", str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=ROOT)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [
        f'error: {package} is not installed: pip install "onnx-distill-toolkit[serve]", or starlette and uvicorn'
    ]


def _until(is_so: Any) -> None:
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_bundle_that_rested_longest_makes_room(bundle: Path, exports: Exports) -> None:
    other = one_thread(exports.copy(bundle.parent / "another", "cpu"))
    with served(bundle, other, "--keep", "1") as running:
        client: Any = openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0)
        for model, loads in (("tiny-r1-cpu", 1), ("tiny-r1-cpu", 1), ("another", 2), ("tiny-r1-cpu", 3)):
            assert _asked(client, QUESTIONS[0], model=model).choices[0].message.content == "9"
            with running.client() as http:
                assert f"toolkit_bundle_loads_total {loads}\n" in http.get("/metrics").text
                rows = http.get("/v1/models").json()["data"]
            assert [row["id"] for row in rows if row["is_open"]] == [model]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM that a process could heed")
def test_a_stop_in_the_middle_of_an_answer_ends_it_and_the_server(bundle: Path) -> None:
    with served(bundle) as running:
        with running.client() as http, _held_amid_an_answer(running, http) as lines:
            running.process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert any("being stopped" in line for line in rest) and rest[-2] == "data: [DONE]"
        assert running.process.wait(10) == 143
    assert running.said[-1].startswith("error:") and not any("Traceback" in line for line in running.said)


def test_a_process_that_dies_is_opened_anew(bundle: Path) -> None:
    with served(bundle) as running:
        client: Any = openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0)
        _asked(client, QUESTIONS[0])
        child = running.child
        child.kill()
        child.wait(10)
        assert _asked(client, QUESTIONS[0]).choices[0].message.content == "9"


def test_a_death_that_nobody_has_noticed_costs_no_request(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(0, TextOptions(max_new_tokens=3), prompt="Add 4 and 5.")

    async def ends() -> tuple[list[str], int]:
        engine, kinds = Engine({"one": bundle}, Kept()), []
        # Other tests' children stay: multiprocessing's resource tracker is one of them.
        others = psutil.Process().children()
        try:
            for _ in range(2):
                kinds.append([event.kind async for event in engine.begin("one", job).events()][-1])
                for child in psutil.Process().children():
                    if child not in others:
                        child.kill()
                # As if the system had not told yet: the process is believed to run.
                monkeypatch.setattr(BundleProcess, "is_running", True)
            monkeypatch.undo()
            # One that dies at once each time is not tried for ever.
            monkeypatch.setattr("toolkit.serve.process.CHILD", "toolkit.names")
            kinds.append([event.kind async for event in engine.begin("one", job).events()][-1])
            return kinds, engine.metrics.loads
        finally:
            await engine.close()

    assert asyncio.run(ends()) == (["written", "written", "failed"], 2)


def test_metrics_count_tokens(bundle: Path) -> None:
    with served(bundle) as running, running.client() as http:
        asked = {"messages": [{"role": "user", "content": QUESTIONS[0]}]}
        counts = [http.post("/v1/chat/completions", json=asked).json()["usage"] for _ in range(2)]
        text = http.get("/metrics").text
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(figures["toolkit_prompt_tokens_total"]) == sum(count["prompt_tokens"] for count in counts)
    assert float(figures["toolkit_tokens_predicted_total"]) == sum(count["completion_tokens"] for count in counts)
    assert figures['toolkit_requests_total{model="tiny-r1-cpu",outcome="written"}'] == "2"
