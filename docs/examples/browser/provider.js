// What a bundle is computed with: the GPU through WebGPU, or the CPU through WebAssembly.

/** Which execution provider of onnxruntime-web a bundle gets, and in words why, by its manifest; `wanted` is "webgpu" or
 * "wasm". Scales of `cpu` bundles are bfloat16, which the WebGPU build of onnxruntime-web casts nowhere. */
export async function chosenProvider(wanted, { recipe, precision }) {
  if (wanted === "wasm") return wasm("as asked");
  const isFloat32 = precision === "fp32";
  if (recipe.target === "cpu" && !isFloat32) return wasm("a bundle for the CPU: WebGPU takes those of target webgpu");
  if (!navigator.gpu) {
    const why = self.isSecureContext ? "" : ", which browsers offer to pages of https and localhost alone";
    return wasm(`no WebGPU in this browser${why}`);
  }
  const adapter = await navigator.gpu.requestAdapter();
  if (adapter === null) return wasm("WebGPU finds no graphics adapter");
  if (!isFloat32 && !adapter.features.has("shader-f16")) return wasm("the graphics adapter computes no float16");
  return { name: "webgpu", reason: adapter.info.description || adapter.info.vendor || "a graphics adapter" };
}

function wasm(reason) {
  return { name: "wasm", reason };
}

/** How many threads WebAssembly may have: one where the page is not isolated from other sites. */
export function threadsHere(wanted) {
  if (!self.crossOriginIsolated) return 1;
  return wanted || navigator.hardwareConcurrency || 1;
}
