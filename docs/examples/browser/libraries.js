// Where the libraries of package.json are: here, what `npm install` put beside this page. A worker heeds no import map,
// so that they are named by address; it may be one of another site, which the policy in index.html has to allow.

const installed = new URL("node_modules/", import.meta.url);

export const ONNXRUNTIME_WEB = new URL("onnxruntime-web/dist/", installed);
export const TOKENIZERS = new URL("@huggingface/tokenizers/dist/tokenizers.min.mjs", installed);
export const JINJA = new URL("@huggingface/jinja/dist/index.js", installed);

/** The module at an address. Throws an error of one line where it is not. */
export async function library(address) {
  try {
    return await import(address);
  } catch (problem) {
    throw new Error(`${address} cannot be loaded: run \`npm install\` in the page's folder, or see libraries.js`);
  }
}
