// A bundle's one graph in a session of onnxruntime-web, and texts going through it.

import { library, ONNXRUNTIME_WEB } from "./libraries.js";

const PAST = "past_key_values";
const PRESENT = "present";

/** Opens the graph with what was chosen. Where WebGPU does not take it, WebAssembly does, and `reason` says so. */
export async function openedGraph(decoder, weights, chosen, threads) {
  try {
    return new Graph(await opened(decoder, weights, chosen.name, threads), chosen, threads);
  } catch (problem) {
    if (chosen.name === "wasm") throw problem;
    const reason = `WebGPU does not take this graph: ${String(problem.message ?? problem).split("\n")[0].slice(0, 300)}`;
    return new Graph(await opened(decoder, weights, "wasm", threads), { name: "wasm", reason }, threads);
  }
}

/** onnxruntime-web in the build for a provider, and its session over `decoder.filename` of `weights`. */
async function opened(decoder, weights, provider, threads) {
  const ort = await library(new URL(`ort.${provider}.min.mjs`, ONNXRUNTIME_WEB));
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  const { [decoder.filename]: graph, ...data } = weights;
  const session = await ort.InferenceSession.create(graph, {
    executionProviders: [provider],
    logSeverityLevel: 3,
    externalData: Object.entries(data).map(([path, bytes]) => ({ path, data: bytes })),
    ...(provider === "webgpu" ? onTheGpu(decoder) : {}),
  });
  return { ort, session };
}

/** Options that leave keys and values where they are computed, and nodes of int64, which shaders have not, out. */
function onTheGpu({ num_hidden_layers: layers, outputs, session_options: options }) {
  const places = {};
  for (const names of [outputs.present_key_names, outputs.present_value_names]) {
    for (let layer = 0; layer < layers; layer += 1) places[names.replace("%d", layer)] = "gpu-buffer";
  }
  const name = "session.layer_assignment_settings";
  return { preferredOutputLocation: places, ...(options[name] ? { extra: { [name]: options[name] } } : {}) };
}

class Graph {
  constructor({ ort, session }, { name, reason }, threads) {
    this.ort = ort;
    this.session = session;
    this.provider = name;
    this.reason = reason;
    this.threads = threads;
  }

  /** Keys and values of no tokens, by the graph's own names, types and shapes. */
  emptyCache() {
    const inputs = this.session.inputMetadata.filter(({ name }) => name.startsWith(PAST));
    return Object.fromEntries(
      inputs.map(({ name, type, shape }) => {
        const dims = shape.map((size, axis) => (axis === 0 ? 1 : typeof size === "number" ? size : 0));
        const values = type === "float32" ? new Float32Array(0) : new Uint16Array(0);
        return [name, new this.ort.Tensor(type, values, dims)];
      }),
    );
  }
}

/** One text on its way through a graph, with the keys and values of what went before. */
export class Run {
  constructor(graph) {
    this._graph = graph;
    this._tokens = 0;
    this._cache = graph.emptyCache();
  }

  /** The likeliest id behind these, which follow those of earlier calls. */
  async next(ids) {
    const { session } = this._graph;
    const found = await session.run({ ...this._cache, ...this._described(ids) });
    this.end();
    for (const name of session.outputNames.filter((name) => name.startsWith(PRESENT))) {
      this._cache[name.replace(PRESENT, PAST)] = found[name];
    }
    return likeliest(found.logits.data);
  }

  /** Gives the memory of keys and values back. */
  end() {
    for (const tensor of Object.values(this._cache)) tensor.dispose();
    this._cache = {};
  }

  /** The graph's other inputs: ids, the mask of all tokens up to them, and their positions where it asks for them. */
  _described(ids) {
    const { ort, session } = this._graph;
    const before = this._tokens;
    this._tokens += ids.length;
    const values = {
      input_ids: ids,
      attention_mask: new Array(this._tokens).fill(1),
      position_ids: ids.map((_, row) => before + row),
    };
    const asked = Object.entries(values).filter(([name]) => session.inputNames.includes(name));
    const tensor = (row) => new ort.Tensor("int64", BigInt64Array.from(row, BigInt), [1, row.length]);
    return Object.fromEntries(asked.map(([name, row]) => [name, tensor(row)]));
  }
}

/** The first id of the largest logit. float16 comes as its bits in browsers without Float16Array: put in order first. */
function likeliest(logits) {
  const isBits = logits instanceof Uint16Array;
  let best = 0;
  let largest = -Infinity;
  for (let id = 0; id < logits.length; id += 1) {
    const value = !isBits ? logits[id] : logits[id] & 0x8000 ? 0x8000 - logits[id] : logits[id];
    if (value > largest) [best, largest] = [id, value];
  }
  return best;
}
