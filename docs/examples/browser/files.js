// A bundle's files, from the folder where a server has them.

/** What keeps a bundle from being opened or asked, in one line. */
export class BundleError extends Error {}

/** The files of one bundle: `folder` is its address, relative to the page or whole. */
export class Files {
  constructor(folder) {
    this.folder = new URL(folder.endsWith("/") ? folder : `${folder}/`, self.location.href);
  }

  /** The object in a JSON file. Throws BundleError where the folder has no such file. */
  async json(name) {
    const text = await (await this.#response(name)).text();
    try {
      return JSON.parse(text);
    } catch {
      throw new BundleError(`${this.folder}${name} is no JSON: expected the file that \`toolkit export\` wrote`);
    }
  }

  /** The text of a file, or null where there is none. */
  async textIfThere(name) {
    const response = await fetch(new URL(name, this.folder));
    return response.ok ? response.text() : null;
  }

  /** A file of `size` bytes, which `told` hears the arrival of. Throws BundleError for another size, or for one that
   * the browser has no room for. */
  async bytes(name, size, told) {
    const reader = (await this.#response(name)).body.getReader();
    const whole = room(name, size);
    let at = 0;
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      if (at + part.value.length <= size) whole.set(part.value, at);
      at += part.value.length;
      told(part.value.length);
    }
    if (at !== size) {
      throw new BundleError(`${this.folder}${name} has ${at} bytes, the manifest says ${size}: copy the bundle again`);
    }
    return whole;
  }

  async #response(name) {
    const address = new URL(name, this.folder);
    const response = await fetch(address).catch((problem) => {
      throw new BundleError(`${address} cannot be reached: ${problem.message}`);
    });
    if (response.ok) return response;
    throw new BundleError(
      `${this.folder} has no ${name} (HTTP ${response.status}): expected the folder that \`toolkit export\` made`,
    );
  }
}

function room(name, size) {
  try {
    return new Uint8Array(size);
  } catch {
    throw new BundleError(`${name} has ${(size / 2 ** 30).toFixed(1)} GiB, more than this browser gives a page`);
  }
}
