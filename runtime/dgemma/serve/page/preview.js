// An answer that is HTML, shown while it is written: in a frame without origin, network or scripts of its own.

import { element } from "./dom.js";

const FENCE = /(?:^|\n)(`{3,}|~{3,}) *html[^\n]*\n([\s\S]*?)(?:\n\1|$)/gi;

// The last HTML that a text holds, finished or not; null where there is none.
export function htmlOf(text) {
  const fenced = [...text.matchAll(FENCE)].pop();
  if (fenced) return fenced[2];
  return /^\s*(?:<!doctype html|<html[\s>])/i.test(text) ? text : null;
}

export class Preview {
  constructor() {
    this.frame = element("iframe", { sandbox: "allow-scripts", src: "preview.html", title: "Preview of the answer" });
    const caption = element("figcaption.quiet", {}, "Preview. Scripts and network are off.");
    this.element = element("figure.preview", {}, caption, this.frame);
    this.html = null;
    this.ready = false;
    this.heard = (event) => {
      if (event.source !== this.frame.contentWindow) return;
      if (event.data?.ready) { this.ready = true; this.send(); }
      const height = Number(event.data?.height);
      if (height > 0) this.frame.style.height = `${Math.min(Math.max(height, 96), 560)}px`;
    };
    addEventListener("message", this.heard);
  }

  show(html) {
    if (html === this.html) return;
    this.html = html;
    if (this.ready) this.send();
  }

  send() {
    if (this.html !== null) this.frame.contentWindow?.postMessage(this.html, "*");
  }

  close() { removeEventListener("message", this.heard); }
}
