// Markdown to elements. Whatever a model writes: no script, no style, no request leaves this page.

import { Marked } from "./vendor/marked-18.2.1.esm.js";
import purify from "./vendor/dompurify-3.4.18.es.mjs";
import { element } from "./dom.js";

const marked = new Marked({ gfm: true, breaks: true, async: false });
marked.use({ renderer: { checkbox: ({ checked }) => (checked ? "☑ " : "☐ ") } });

const ALLOWED = {
  ALLOWED_TAGS: ("p br hr h1 h2 h3 h4 h5 h6 em strong del s code pre blockquote ul ol li table thead tbody tr th td a"
    + " sup sub kbd details summary").split(" "),
  ALLOWED_ATTR: ["href", "title", "align", "class", "start", "open"],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:|#)/i,
  ALLOW_DATA_ATTR: false,
  RETURN_TRUSTED_TYPE: true,
};

purify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName === "A") {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer nofollow");
  }
  if (node.hasAttribute?.("class") && !/^language-[\w+#.-]+$/.test(node.className)) node.removeAttribute("class");
});

export function render(into, text, done = true) {
  into.innerHTML = purify.sanitize(marked.parse(text), ALLOWED);
  for (const table of into.querySelectorAll("table")) {
    const frame = element("div.wide", { tabindex: 0, role: "region", "aria-label": "Table" });
    table.replaceWith(frame);
    frame.append(table);
  }
  for (const code of into.querySelectorAll("pre > code")) dress(code, done);
}

// A block of code: its language, and a button to copy it.
function dress(code, done) {
  const language = /^language-(.+)$/.exec(code.className)?.[1] ?? "";
  const copy = element("button.small", {
    type: "button",
    onclick: async () => {
      await navigator.clipboard.writeText(code.textContent);
      copy.textContent = "Copied";
      setTimeout(() => { copy.textContent = "Copy"; }, 1500);
    },
  }, "Copy");
  const block = element("div.code");
  code.parentElement.replaceWith(block);
  block.append(element("div.code-head", {}, element("span", {}, language), done ? copy : null), code.parentElement);
  code.parentElement.setAttribute("tabindex", 0);
}
