// Settings, each with what it costs by the pace of the last answer.

import { $, count, element, seconds, sentence } from "./dom.js";
import { browser } from "./store.js";

const DEFAULTS = { system: "", thinking: false, effort: "", watch: true };
const NUMBERS = ["max_tokens", "steps", "entropy_bound", "commit", "seed"];
const NAMES = {
  max_tokens: "Most tokens", steps: "Most steps per canvas", entropy_bound: "Entropy bound", commit: "Commit",
  seed: "Seed",
};

export class Settings {
  constructor(card) {
    this.card = card;
    this.own = card.diffusion;
    this.known = Object.fromEntries(this.own.settings.map((setting) => [setting.name, setting]));
    this.values = { ...DEFAULTS, ...browser.get("settings", {}) };
    this.paces = browser.get("paces", {});
    this.dialog = $("settings");
    this.build();
  }

  // Seconds of a step, measured by the last answer of this model.
  get pace() { return this.paces[this.card.id] ?? null; }

  measured(diffusion) {
    if (!diffusion.steps) return;
    this.paces[this.card.id] = diffusion.seconds.steps / diffusion.steps;
    browser.set("paces", this.paces);
    this.tell();
  }

  // The fields of a request, for "chat" or "edit". again: how often it was asked before, for other seeds.
  fields(what, again = 0) {
    const { values } = this;
    const body = { model: this.card.id, stream: true, stream_options: { include_usage: true } };
    const own = { events: what === "edit" || values.watch };
    if (values.effort) own.effort = values.effort;
    for (const name of NUMBERS) {
      if (values[name] === undefined || (name === "max_tokens" && what === "edit")) continue;
      if (name === "max_tokens" || name === "seed") body[name] = values[name];
      else own[name] = values[name];
    }
    if (body.seed !== undefined) body.seed += again;
    if (what === "chat" && values.thinking && this.own.chat) body.reasoning_effort = "high";
    return { ...body, diffusion: own };
  }

  open() { this.tell(); this.dialog.showModal(); }

  build() {
    const { values, known } = this;
    const field = (name, label, control, ...more) => {
      const cost = element("span.cost.quiet", { id: `cost-${name}` });
      control.setAttribute("aria-describedby", `cost-${name}`);
      return element("div.field", {}, element("label", { for: control.id }, label), control, ...more, cost);
    };
    const change = (name, value) => {
      if (value === undefined) delete values[name]; else values[name] = value;
      browser.set("settings", values);
      this.tell();
    };
    const toggle = (name, label) => {
      const control = element("input", {
        type: "checkbox", role: "switch", id: `set-${name}`, checked: values[name],
        onchange: () => change(name, control.checked),
      });
      return field(name, label, control);
    };
    const number = (name) => {
      const { least, most, real, default: usual } = known[name];
      const control = element("input", {
        type: "number", id: `set-${name}`, min: least, max: most, step: real ? "any" : 1, value: values[name] ?? "",
        placeholder: name === "seed" ? "random" : name === "max_tokens" ? "what fits" : usual,
        onchange: () => {
          control.setCustomValidity("");
          if (control.reportValidity()) change(name, control.value === "" ? undefined : Number(control.value));
        },
      });
      return field(name, NAMES[name], control);
    };
    const effort = element("select", { id: "set-effort", onchange: () => change("effort", effort.value) },
      element("option", { value: "" }, "usual"),
      ...this.own.efforts.map(({ name }) =>
        element("option", { value: name, selected: values.effort === name }, name)));
    const system = element("textarea", {
      id: "set-system", rows: 2, onchange: () => change("system", system.value),
    }, values.system);
    this.dialog.replaceChildren(element("form", { method: "dialog" },
      element("div.row.between", {}, element("h2", { id: "settings-title" }, "Settings"),
        element("button.icon", { "aria-label": "Close", value: "close" }, "✕")),
      this.own.chat ? field("system", "System message", system) : null,
      this.own.chat ? toggle("thinking", "Think first") : null,
      field("effort", "Effort", effort),
      ...NUMBERS.filter((name) => name in known).map(number),
      toggle("watch", "Watch the canvas"),
      element("div.row.between", {},
        element("button", { type: "button", onclick: () => this.reset() }, "Reset"),
        element("button.primary", { value: "close" }, "Done"))));
    this.dialog.addEventListener("click", (event) => { if (event.target === this.dialog) this.dialog.close(); });
    this.tell();
  }

  reset() {
    this.values = { ...DEFAULTS };
    browser.set("settings", this.values);
    this.build();
  }

  // What each costs, with the numbers as they stand.
  tell() {
    const { values, known, own, pace } = this;
    const effort = own.efforts.find(({ name }) => name === values.effort);
    const steps = values.steps ?? effort?.settings.steps ?? known.steps.default;
    const canvas = own.canvas_length;
    const time = (n) => (pace === null ? `${count(n, "step")}` : `${seconds(n * pace)}`);
    const canvases = values.max_tokens ? Math.ceil(values.max_tokens / canvas) : null;
    const size = Math.max(1, Math.round(canvas * 24 / 1024)); // KB of a step's events
    const costs = {
      system: "Read once for each conversation, then kept.",
      thinking: "The thought is written before the answer: as many tokens more as it has.",
      effort: effort ? `${sentence(effort.help)}.`
        : "Low takes fewer steps and is bolder; high takes more and is surer.",
      max_tokens: canvases
        ? `At most ${count(canvases, "canvas")} of ${canvas} tokens: up to ${time(canvases * steps)}.`
        : `As many canvases of ${canvas} tokens as the context of ${own.context} has room for.`,
      steps: pace === null ? `A canvas takes up to ${steps} steps; most settle earlier.`
        : `A step takes ${seconds(pace)} here: up to ${seconds(steps * pace)} a canvas. Most settle earlier.`,
      entropy_bound: "Higher accepts more tokens in a step: fewer steps, more mistakes.",
      commit: values.commit
        ? "Beginnings are final early: text comes sooner and steps are saved, but what stands cannot be revised."
        : "0: text is final when its canvas is. Try 0.02 to have it sooner, in fewer steps; it cannot be revised then.",
      seed: values.seed === undefined ? "Another answer each time."
        : "The same question gives the same answer. Costs nothing.",
      watch: `Sends every step: about ${size} KB each. The computation is the same.`,
    };
    for (const [name, text] of Object.entries(costs)) {
      const place = this.dialog.querySelector(`#cost-${name}`);
      if (place) place.textContent = text;
    }
  }
}
