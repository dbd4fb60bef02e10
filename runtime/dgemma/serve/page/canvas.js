// A canvas while it settles, and afterwards step by step: every token in the colour of its entropy.

import { count, drawing, element, paced } from "./dom.js";

const MARK = /^<[^<>\s]+>$/;
const STILL = matchMedia("(prefers-reduced-motion: reduce)");
const MOST = 4; // nats: as uncertain as it is shown

export const uncertainty = (entropy) => Math.min(1, Math.log1p(8 * entropy) / Math.log1p(8 * MOST));

// Makes a span show a token, touching only what differs from what it shows.
export function dress(span, text, entropy, accepted, { final = false, behind = false } = {}) {
  if (behind && MARK.test(text)) text = "·"; // filler would be a wall of names
  if (span.shown !== text) {
    if (span.shown !== undefined && !STILL.matches) span.animate([{ opacity: 0.3 }, { opacity: 1 }], 180);
    span.textContent = span.shown = text;
    span.classList.toggle("mark", MARK.test(text));
  }
  const u = uncertainty(entropy).toFixed(3);
  if (span.u !== u) span.style.setProperty("--u", span.u = u);
  span.classList.toggle("open", !accepted);
  span.classList.toggle("final", final);
  span.classList.toggle("behind", behind);
}

export class CanvasView {
  constructor(id) {
    this.steps = [];
    this.at = -1;
    this.following = true;
    this.chosen = -1;
    this.tokens = element("div.tokens", {
      tabindex: 0, role: "group", "aria-label": "Tokens of the canvas; arrow keys tell about each",
      onkeydown: (event) => this.walk(event), onmousemove: (event) => this.point(event),
      onmouseleave: () => this.choose(-1),
    });
    this.slider = element("input", {
      type: "range", min: 0, max: 0, value: 0, "aria-label": "Step", id: `${id}-step`,
      oninput: () => { this.pause(); this.following = false; this.show(Number(this.slider.value)); },
    });
    const replay = { type: "button", "aria-label": "Replay", title: "Replay", onclick: () => this.replay() };
    this.button = element("button.icon", replay, symbol("M7 4.5v11l8.5-5.5z"));
    this.status = element("output.quiet", { for: `${id}-step` });
    this.readout = element("p.readout.quiet", { "aria-live": "polite" });
    this.title = element("span", {}, "Settling");
    const curve = { class: "spark", viewBox: "0 0 100 20", preserveAspectRatio: "none", "aria-hidden": "true" };
    this.spark = drawing("svg", curve, drawing("polyline"));
    const seen = () => { if (this.element.open && this.ended) this.element.scrollIntoView({ block: "nearest" }); };
    this.element = element("details.canvas", { open: true, ontoggle: seen },
      element("summary", {}, this.title, this.spark),
      this.tokens,
      element("div.controls", {}, this.button, this.slider, this.status),
      element("div.row", {}, this.readout, element("span.legend-line", {},
        element("span.quiet", {}, "certain"),
        element("span.legend", { "aria-hidden": "true" }),
        element("span.quiet", {}, "uncertain"))));
    this.draw = paced((index) => this.paint(index));
  }

  add(step) {
    this.steps.push(step);
    this.slider.max = this.steps.length - 1;
    this.title.textContent = `Canvas ${step.block + 1}, step ${step.step + 1}`;
    if (this.following) this.show(this.steps.length - 1);
  }

  // No step comes any more.
  finish() {
    this.title.textContent = `How it settled: ${count(this.steps.length, "step")}`;
    this.element.classList.add("finished");
    this.element.open = false;
    this.ended = true;
  }

  show(index) {
    this.at = index;
    this.slider.value = index;
    this.draw(index);
  }

  paint(index) {
    const step = this.steps[index];
    if (!step) return;
    const { text, entropy, accepted } = step;
    while (this.tokens.childElementCount > text.length) this.tokens.lastElementChild.remove();
    while (this.tokens.childElementCount < text.length) this.tokens.append(element("span.token"));
    const end = step.end ?? text.length;
    [...this.tokens.children].forEach((span, i) =>
      dress(span, text[i], entropy[i], accepted[i], { final: i < step.final, behind: i > end }));
    const kept = accepted.filter(Boolean).length;
    const mean = `entropy ${step.mean_entropy.toFixed(3)}`;
    this.status.textContent = `${index + 1} of ${this.steps.length} · ${mean} · ${kept} of ${text.length} accepted`;
    const number = `Canvas ${step.block + 1}, step ${step.step + 1}`;
    this.slider.setAttribute("aria-valuetext", `${number}: ${this.status.textContent}`);
    this.sketch(index);
    if (this.chosen >= 0) this.choose(Math.min(this.chosen, text.length - 1));
  }

  // A line of mean entropies, on a scale of roots so that small ones are seen.
  sketch(index) {
    const means = this.steps.map((step) => Math.sqrt(step.mean_entropy));
    const most = Math.max(...means, 1e-9), last = Math.max(means.length - 1, 1);
    const points = means.map((mean, i) => `${(100 * i / last).toFixed(2)},${(18.5 - 17 * mean / most).toFixed(2)}`);
    this.spark.firstElementChild.setAttribute("points", points.join(" "));
    this.spark.style.setProperty("--at", index / last);
  }

  replay() {
    if (this.timer) { this.pause(); return; }
    this.following = false;
    let index = this.at >= this.steps.length - 1 ? 0 : this.at + 1;
    const go = () => {
      this.show(index++);
      if (index >= this.steps.length) this.pause();
      else this.timer = setTimeout(go, 160);
    };
    this.button.replaceChildren(symbol("M6.5 4.5h2.5v11H6.5zM11 4.5h2.5v11H11z"));
    this.button.setAttribute("aria-label", "Pause");
    this.timer = 1;
    go();
  }

  pause() {
    clearTimeout(this.timer);
    this.timer = null;
    this.button.replaceChildren(symbol("M7 4.5v11l8.5-5.5z"));
    this.button.setAttribute("aria-label", "Replay");
  }

  walk(event) {
    const by = { ArrowRight: 1, ArrowLeft: -1, Home: -1e6, End: 1e6 }[event.key];
    if (!by) return;
    event.preventDefault();
    this.choose(Math.max(0, Math.min(this.tokens.childElementCount - 1, this.chosen + by)));
  }

  point(event) {
    const span = event.target.closest(".token");
    if (span) this.choose([...this.tokens.children].indexOf(span));
  }

  choose(index) {
    this.tokens.querySelector(".chosen")?.classList.remove("chosen");
    this.chosen = index;
    const step = this.steps[this.at];
    if (index < 0 || !step) { this.readout.textContent = ""; return; }
    this.tokens.children[index]?.classList.add("chosen");
    const written = JSON.stringify(step.text[index]);
    const state = index < step.final ? "final" : step.accepted[index] ? "accepted" : "open";
    this.readout.textContent = `${index + 1}: ${written} · ${step.entropy[index].toFixed(3)} nats · ${state}`;
  }
}

const symbol = (path) => drawing("svg", { viewBox: "0 0 20 20", "aria-hidden": "true" },
  drawing("path", { class: "solid", d: path }));
