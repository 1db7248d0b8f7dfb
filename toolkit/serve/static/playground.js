"use strict";
const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "seed", "max_tokens"];
const columns = [];
let bundles = [];
let stopping = null;

const headers = () => {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
};

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

class Column {
  constructor(index) {
    this.messages = [];
    this.element = $("column").content.firstElementChild.cloneNode(true);
    this.select = this.element.querySelector("select");
    this.turns = this.element.querySelector("ol");
    this.report = this.element.querySelector(".report");
    this.select.onchange = () => this.showReport();
    this.offer(bundles[Math.min(index, bundles.length - 1)].name);
    $("columns").append(this.element);
  }

  offer(name) {
    this.select.replaceChildren(...bundles.map((bundle) => new Option(bundle.name, bundle.name)));
    this.select.value = name;
    this.showReport();
  }

  showReport() {
    const bundle = bundles.find((one) => one.name === this.select.value);
    this.turns.setAttribute("aria-label", `Conversation with ${this.select.value}`);
    this.report.setAttribute("aria-label", `Report of ${this.select.value}`);
    this.report.hidden = !bundle || !bundle.report;
    if (bundle && bundle.report) this.report.href = bundle.report;
  }

  async ask(question, signal) {
    const turn = this.messages.length;
    this.messages.push({ role: "user", content: question });
    const mine = this.turns.appendChild(make("li", "user", question));
    const below = mine.appendChild(make("div", "below"));
    this.button(below, "Edit", question, () => { $("question").value = question; this.cut(turn); $("question").focus(); });
    this.button(below, "Retry", question, () => retry(this, turn, question));
    const answer = this.turns.appendChild(make("li", "assistant"));
    const thought = answer.appendChild(make("details", "thought"));
    const title = thought.appendChild(make("summary", "", "Thinking…"));
    const thoughtText = thought.appendChild(make("div"));
    thought.hidden = true;
    const text = answer.appendChild(make("div", "answer"));
    const figures = answer.appendChild(make("div", "below"));
    const whole = { thought: "", text: "", timings: null, isCut: false, drawn: false };
    const most = $("max_tokens").value;
    const draw = () => {
      whole.drawn = false;
      thought.hidden = !whole.thought;
      thoughtText.textContent = whole.thought;
      title.textContent = whole.text || whole.timings ? "Thought" : "Thinking…";
      showText(text, whole.text);
      this.turns.scrollTop = this.turns.scrollHeight;
    };
    try {
      await this.stream(signal, (chunk) => {
        const choice = (chunk.choices && chunk.choices[0]) || { delta: {} };
        const delta = choice.delta;
        whole.isCut = whole.isCut || choice.finish_reason === "length";
        whole.thought += delta.reasoning_content || "";
        whole.text += delta.content || "";
        whole.timings = chunk.timings || whole.timings;
        if (!whole.drawn) { whole.drawn = true; requestAnimationFrame(draw); }
      });
      figures.append(make("span", "", this.figures(whole.timings)));
      if (whole.isCut) figures.append(make("span", "error", this.whatCut(whole.timings, most)));
    } catch (problem) {
      const left = problem.name === "AbortError";
      figures.append(make("span", left ? "" : "error", left ? "stopped" : problem.message));
    }
    draw();
    this.messages.push({ role: "assistant", content: whole.text });
  }

  figures(timings) {
    if (!timings) return "";
    const speed = timings.predicted_per_second;
    return `${timings.predicted_n} tokens${speed ? `, ${speed.toFixed(1)} tokens/s` : ""}, first after ${Math.round(timings.prompt_ms)} ms`;
  }

  whatCut(timings, most) {
    const isAsked = most !== "" && timings && timings.predicted_n >= Number(most);
    return isAsked ? `cut after the ${most} tokens that are set` : "cut: the context, or the memory for it, is full";
  }

  // A screen reader is told which question a button is for.
  button(place, name, question, act) {
    const button = place.appendChild(make("button", "", name));
    button.setAttribute("aria-label", `${name}: ${question.slice(0, 80)}`);
    button.type = "button";
    button.onclick = act;
  }

  cut(turn) {
    if (stopping) stopping.abort();
    this.messages.length = turn;
    while (this.turns.children.length > turn) this.turns.lastElementChild.remove();
  }

  async stream(signal, take) {
    const system = $("system").value;
    // A question that was stopped, or cut before its answer, leaves no trace in later prompts.
    const answered = this.messages.filter((message, k, all) => message.content !== "" && all[k + 1]?.content !== "");
    const body = { model: this.select.value, stream: true,
      messages: [...(system ? [{ role: "system", content: system }] : []), ...answered] };
    for (const name of NUMBERS) if ($(name).value !== "") body[name] = Number($(name).value);
    const reply = await fetch("/v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
    if (!reply.ok) throw new Error((await reply.json()).error.message);
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    let held = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (held + value).split("\n");
      held = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
        const chunk = JSON.parse(line.slice(6));
        if (chunk.error) throw new Error(chunk.error.message);
        take(chunk);
      }
    }
  }
}

async function talk(asked, question) {
  if (stopping) stopping.abort();
  const mine = stopping = new AbortController();
  $("send").hidden = true; $("stop").hidden = false; $("status").textContent = "Writing…";
  await Promise.all(asked.map((column) => column.ask(question, mine.signal)));
  if (stopping !== mine) return;
  stopping = null;
  $("send").hidden = false; $("stop").hidden = true; $("status").textContent = "Done.";
}

function retry(column, turn, question) { column.cut(turn); talk([column], question); }

async function listBundles() {
  const reply = await fetch("/playground/bundles", { headers: headers() });
  const answer = await reply.json();
  if (!reply.ok) { $("status").textContent = answer.error.message; $("settings").open = true; return; }
  $("status").textContent = "";
  bundles = answer.bundles;
  for (const column of columns) column.offer(column.select.value);
  if (!columns.length && bundles.length) columns.push(new Column(0));
  if (answer.may_get) offerModels();
}

$("ask").onsubmit = (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || !columns.length) return;
  $("question").value = "";
  talk(columns, question);
};
$("question").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("ask").requestSubmit(); }
};
$("stop").onclick = () => { if (stopping) stopping.abort(); };
$("anew").onclick = () => { for (const column of columns) column.cut(0); $("question").focus(); };
$("beside").onclick = () => {
  if (!columns.length) return;
  const two = columns.length === 1;
  if (two) columns.push(new Column(1)); else columns.pop().element.remove();
  $("columns").classList.toggle("two", two);
  $("beside").setAttribute("aria-pressed", String(two));
};
$("key").onchange = listBundles;
addEventListener("DOMContentLoaded", listBundles);
