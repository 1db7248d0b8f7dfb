"use strict";
// Text of a model as Markdown with LaTeX: parsed by marked, cleaned by DOMPurify, formulas drawn by KaTeX.
const FORMULA = /^(?:\$\$([\s\S]+?)\$\$|\\\[([\s\S]+?)\\\]|\\\(([\s\S]+?)\\\)|\$([^\s$](?:[^$\n]*[^\s$])?)\$(?!\d)|(\\boxed\{(?:[^{}]|\{[^{}]*\})*\}))/;
const escaped = (text) => text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
marked.use({ gfm: true, breaks: true, extensions: [{
  name: "formula", level: "inline",
  start: (text) => { const at = text.search(/\$|\\[[(]|\\boxed\{/); return at < 0 ? undefined : at; },
  tokenizer(text) {
    const found = FORMULA.exec(text);
    if (!found) return undefined;
    const tex = found.slice(1).find((part) => part !== undefined);
    return { type: "formula", raw: found[0], tex, display: found[1] !== undefined || found[2] !== undefined };
  },
  renderer: (token) => `<span class="formula" data-tex="${escaped(token.tex)}" data-display="${token.display}"></span>`,
}] });

function showText(element, text) {
  // Images would be fetched, and forms could pose as the page's own.
  element.innerHTML = DOMPurify.sanitize(marked.parse(text), {
    FORBID_TAGS: ["style", "img", "form", "input", "button", "textarea", "select", "video", "audio", "svg", "math"],
    FORBID_ATTR: ["style", "id", "name"],
  });
  for (const link of element.querySelectorAll("a")) { link.target = "_blank"; link.rel = "noopener noreferrer"; }
  for (const place of element.querySelectorAll("span.formula")) {
    // A screen reader is told the formula as it was written.
    place.setAttribute("role", "math"); place.setAttribute("aria-label", place.dataset.tex);
    katex.render(place.dataset.tex, place,
      { displayMode: place.dataset.display === "true", throwOnError: false, trust: false, output: "html", maxExpand: 200, maxSize: 20 });
  }
}
