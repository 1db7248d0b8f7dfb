// A bundle opened for text in a browser: openTextModel(folder), then generate(prompt(messages)). It needs no page and
// no worker: worker.js is one way to use it.

import { BundleError, Files } from "./files.js";
import { openedGraph, Run } from "./graph.js";
import { chosenProvider, threadsHere } from "./provider.js";
import { openedText } from "./text.js";

// What WebAssembly's addresses reach.
const WASM_BYTES = 4 * 2 ** 30;

/** Opens the bundle in a folder. Of the options, `provider` is "webgpu", which gives way to "wasm" by itself, or
 * "wasm"; `threads` are WebAssembly's, 0 one a core; `told` hears how many bytes of how many have come. Throws
 * BundleError. */
export async function openTextModel(folder, { provider = "webgpu", threads = 0, told = () => {} } = {}) {
  const files = new Files(folder);
  const config = await files.json("genai_config.json");
  const manifest = await files.json("manifest.json");
  const { decoder } = config.model;
  if (!decoder.filename) {
    const target = manifest.recipe.target;
    throw new BundleError(`the bundle is several graphs, for ${target}: a page takes one, of target cpu or webgpu`);
  }
  const text = await openedText(files);
  const chosen = await chosenProvider(provider, manifest);
  const weights = await loaded(files, decoder.filename, manifest, chosen.name, told);
  return new TextModel(config, text, await openedGraph(decoder, weights, chosen, threadsHere(threads)));
}

/** The graph and its data files, by name, once all have come. */
async function loaded(files, graph, manifest, provider, told) {
  const isNeeded = ({ name }) => name === graph || (name.endsWith(".onnx.data") && !name.startsWith("draft."));
  const needed = manifest.files.filter(isNeeded);
  const whole = needed.reduce((sum, { bytes }) => sum + bytes, 0);
  if (provider === "wasm" && whole > WASM_BYTES) {
    throw new BundleError(`the bundle has ${(whole / 2 ** 30).toFixed(1)} GiB, WebAssembly 4: take a smaller model`);
  }
  const found = {};
  let here = 0;
  for (const { name, bytes } of needed) {
    found[name] = await files.bytes(name, bytes, (more) => told((here += more), whole));
  }
  return found;
}

class TextModel {
  constructor(config, text, graph) {
    this.contextLength = config.model.context_length;
    this.provider = graph.provider;
    this.reason = graph.reason;
    this.threads = graph.threads;
    this._stops = [config.model.eos_token_id].flat();
    this._chunk = config.search.chunk_size ?? this.contextLength;
    this._text = text;
    this._graph = graph;
  }

  /** Messages of `role` and `content` as the ids of one prompt, by the bundle's chat template. */
  prompt(messages) {
    return this._text.prompt(messages);
  }

  /** Yields `{id, text}` of each token behind a prompt's ids, the likeliest every time, and returns why the text ends:
   * "stop" for a stop token, which is yielded without text, "length" for `maxNewTokens`, "context" for one that is
   * full. Throws BundleError for a prompt that leaves no room in the context. */
  async *generate(ids, maxNewTokens = Infinity) {
    const room = this.contextLength - ids.length;
    if (room < 1) {
      const size = this.contextLength;
      throw new BundleError(`the conversation has ${ids.length} tokens, the bundle's context ${size}: start anew`);
    }
    const [run, stream] = [new Run(this._graph), this._text.stream()];
    try {
      let id;
      for (let at = 0; at < ids.length; at += this._chunk) id = await run.next(ids.slice(at, at + this._chunk));
      for (let written = 1; ; written += 1) {
        const isStop = this._stops.includes(id);
        yield { id, text: isStop ? "" : stream.add(id) };
        if (isStop) return "stop";
        if (written >= maxNewTokens) return "length";
        if (written >= room) return "context";
        id = await run.next([id]);
      }
    } finally {
      run.end();
    }
  }
}
