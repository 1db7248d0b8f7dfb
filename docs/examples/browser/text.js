// A bundle's tokenizer and chat template, through Hugging Face's libraries.

import { BundleError } from "./files.js";
import { JINJA, library, TOKENIZERS } from "./libraries.js";

/** Reads both from a bundle's files. Throws BundleError where there is none. */
export async function openedText(files) {
  const settings = await files.json("tokenizer_config.json");
  const template = settings.chat_template ?? (await files.textIfThere("chat_template.jinja"));
  if (!template) throw new BundleError(`${files.folder} has no chat template: a browser's page needs one`);
  const [{ Tokenizer }, { Template }] = [await library(TOKENIZERS), await library(JINJA)];
  return new Text(new Tokenizer(await files.json("tokenizer.json"), settings), new Template(template), settings);
}

class Text {
  constructor(tokenizer, template, settings) {
    this._tokenizer = tokenizer;
    this._template = template;
    this._special = {};
    for (const [name, token] of Object.entries(settings)) {
      if (name.endsWith("_token") && token) this._special[name] = token.content ?? token;
    }
  }

  /** Messages of `role` and `content` as the ids of one prompt that asks for an answer. */
  prompt(messages) {
    const text = this._template.render({ messages, add_generation_prompt: true, ...this._special });
    return this._tokenizer.encode(text, { add_special_tokens: false }).ids;
  }

  /** A new text that is written token by token. */
  stream() {
    return new TextStream((ids) => this._tokenizer.decode(ids, { skip_special_tokens: false }));
  }
}

/** Pieces of a text as its tokens come; a letter whose bytes are not all there waits for the next token. */
class TextStream {
  constructor(decode) {
    this._decode = (ids) => (ids.length === 0 ? "" : decode(ids));
    this._ids = [];
    this._from = 0;
    this._told = 0;
  }

  /** What one more token adds. Decoded behind those before it: some tokenizers drop a text's first space. */
  add(id) {
    this._ids.push(id);
    const text = this._decode(this._ids.slice(this._from));
    if (text.endsWith("\uFFFD")) return "";
    const before = this._decode(this._ids.slice(this._from, this._told));
    [this._from, this._told] = [this._told, this._ids.length];
    return text.slice(before.length);
  }
}
