// The bundle in a worker, so that the page answers its reader while a graph runs. It is told `{open}`, `{ask}` and
// `{stop}`, and tells `{loaded, of}`, `{opened}`, `{token}`, `{ended}` and `{error}`.

import { openTextModel } from "./text-model.js";

let model = null;
let isStopped = false;

onmessage = ({ data }) => {
  if (data.stop) isStopped = true;
  const doing = data.open ? open(data.open) : data.ask ? answer(data.ask) : null;
  doing?.catch((problem) => postMessage({ error: oneLine(problem) }));
};

async function open({ folder, provider, threads }) {
  const told = (loaded, of) => postMessage({ loaded, of });
  model = await openTextModel(folder, { provider, threads, told });
  const { contextLength, reason } = model;
  postMessage({ opened: { provider: model.provider, threads: model.threads, contextLength, reason } });
}

async function answer({ messages, maxNewTokens }) {
  isStopped = false;
  const ids = model.prompt(messages);
  const begun = performance.now();
  const tokens = model.generate(ids, maxNewTokens);
  let first = begun;
  for (let written = 0; ; written += 1) {
    const { done, value } = isStopped ? await tokens.return("stopped") : await tokens.next();
    if (written === 0) first = performance.now();
    if (done) {
      const seconds = (performance.now() - first) / 1000;
      postMessage({ ended: { why: value, promptTokens: ids.length, newTokens: written, ttft: (first - begun) / 1000, seconds } });
      return;
    }
    postMessage({ token: value });
    await otherMessages();
  }
}

/** Lets a message that waits be heard before the next token. */
function otherMessages() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}

/** What went wrong, in a line. WebAssembly throws an address, a number, where it is out of memory. */
function oneLine(problem) {
  if (typeof problem === "number") return "WebAssembly stopped, most likely out of its 4 GiB: take a smaller model";
  return String(problem.message ?? problem).split("\n")[0];
}
