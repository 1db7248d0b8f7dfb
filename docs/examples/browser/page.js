// The page: a conversation with the bundle in the folder that `?bundle=` names, `bundle/` beside the page if nothing
// does. `?provider=wasm` does without WebGPU, `?threads=1` without threads.

const asked = new URLSearchParams(location.search);
const worker = new Worker("worker.js", { type: "module" });
const element = (id) => document.getElementById(id);
const ENDS = {
  stop: "",
  stopped: ", stopped",
  length: ", cut: as many tokens as were asked for",
  context: ", cut: the context is full",
};
const messages = [];
let answer = null;

worker.onmessage = ({ data }) => {
  for (const [what, value] of Object.entries(data)) heard[what]?.(value, data);
};
worker.onerror = (problem) => heard.error(problem.message || "the worker did not start");

const heard = {
  loaded(bytes, { of }) {
    Object.assign(element("bar"), { hidden: false, max: of, value: bytes });
  },
  opened({ provider, threads, reason, contextLength }) {
    const wasm = `WebAssembly, ${threads} thread${threads === 1 ? "" : "s"}`;
    const where = provider === "webgpu" ? "WebGPU" : wasm;
    const alone = provider === "wasm" && !crossOriginIsolated ? "; the server sends no headers that allow threads" : "";
    element("opened").textContent = `${where} (${reason}${alone}), context ${contextLength}`;
    element("bar").hidden = true;
    rests("Ready.");
  },
  token({ id, text }) {
    answer.textContent += text;
    answer.dataset.ids = `${answer.dataset.ids ?? ""} ${id}`.trim();
  },
  ended({ why, promptTokens, newTokens, ttft, seconds }) {
    const speed = newTokens > 1 && seconds > 0 ? `, ${((newTokens - 1) / seconds).toFixed(1)} tokens/s` : "";
    // What was cut is no answer, and thoughts never enter a prompt.
    if (why === "stop") messages.push({ role: "assistant", content: withoutThought(answer.textContent) });
    else messages.pop();
    rests(`${promptTokens} tokens read in ${ttft.toFixed(2)} s, ${newTokens} written${speed}${ENDS[why]}.`);
  },
  error(line) {
    if (answer !== null) messages.pop();
    element("bar").hidden = true;
    rests(`Error: ${line}`, answer !== null);
  },
};

function rests(line, isUsable = true) {
  answer = null;
  element("status").textContent = line;
  element("send").disabled = !isUsable;
  element("stop").hidden = true;
}

function withoutThought(text) {
  return text.split("</think>").at(-1).trim();
}

function turn(role, text) {
  const item = document.createElement("li");
  item.className = role;
  item.textContent = text;
  element("turns").append(item);
  return item;
}

element("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = element("question").value.trim();
  if (!question) return;
  messages.push({ role: "user", content: question });
  turn("user", question);
  answer = turn("assistant", "");
  element("question").value = "";
  element("send").disabled = true;
  element("stop").hidden = false;
  element("status").textContent = "Writing.";
  worker.postMessage({ ask: { messages, maxNewTokens: Number(element("most").value) || 512 } });
});

element("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!element("send").disabled) element("ask").requestSubmit();
});
element("stop").addEventListener("click", () => worker.postMessage({ stop: true }));

worker.postMessage({
  open: {
    folder: new URL(asked.get("bundle") ?? "bundle/", location.href).href,
    provider: asked.get("provider") ?? "webgpu",
    threads: Number(asked.get("threads")) || 0,
  },
});
