// The editor: a passage is selected, an instruction typed, and the rewrite forms in place, to be accepted or not.

import { Failure, stream } from "./api.js";
import { dress } from "./canvas.js";
import { count, element, paced, say, sentence } from "./dom.js";
import { figures } from "./figures.js";
import { tab } from "./store.js";

const points = (text) => [...text].length; // characters as the server counts them

export class Editor {
  constructor(settings, place) {
    this.settings = settings;
    this.running = null;
    this.past = [];
    this.text = element("textarea.page-text", {
      id: "text", "aria-label": "Text", spellcheck: "false",
      placeholder: "Write or paste a text. Select a passage, and say below what is to become of it.",
      oninput: () => this.changed(), onscroll: () => this.mirror(),
    });
    this.back = element("div.page-text.behind-text", { "aria-hidden": "true" });
    const group = { tabindex: -1, hidden: true, role: "group", "aria-label": "The rewrite, in place" };
    this.review = element("div.page-text.review", group);
    this.sheet = element("div.sheet", {}, this.back, this.text, this.review);
    this.instruction = element("input", {
      id: "instruction", "aria-label": "Instruction", placeholder: "What is to be done, such as: Correct the spelling.",
      autocomplete: "off", oninput: () => this.keep(),
    });
    this.go = element("button.primary", { type: "submit" }, "Rewrite");
    this.about = element("p.quiet.hint", { "aria-live": "polite" });
    this.undo = element("button", { type: "button", onclick: () => this.takeBack(), disabled: true }, "Undo");
    const submitted = (event) => {
      event.preventDefault();
      if (this.running) this.running.abort(); else this.rewrite();
    };
    this.form = element("form.composer", { "aria-label": "Rewrite", onsubmit: submitted },
      this.instruction, this.undo, this.go, this.about);
    this.accept = element("button.primary", { type: "button", onclick: () => this.decide(true) }, "Accept");
    this.reject = element("button", { type: "button", onclick: () => this.decide(false) }, "Reject");
    this.another = element("button", { type: "button", onclick: () => this.rewrite(this.again + 1) }, "Another");
    this.verdict = element("div.verdict", { role: "group", "aria-label": "The rewrite", hidden: true },
      this.accept, this.reject, this.another);
    this.told = element("div.told");
    place.append(element("div.scroll", {}, element("div.column", {}, this.sheet, this.verdict, this.told)), this.form);
    document.addEventListener("selectionchange", () => { if (document.activeElement === this.text) this.mark(); });
    this.review.addEventListener("keydown", (event) => { if (event.key === "Escape") this.decide(false); });
    const kept = tab.get("edit", { text: "", instruction: "" });
    this.text.value = kept.text;
    this.instruction.value = kept.instruction;
    this.span = [0, 0];
    this.draw = paced((canvas) => this.paint(canvas));
    this.changed();
  }

  // The editor is seen: sizes can be told.
  shown() { this.mirror(); }

  keep() { tab.set("edit", { text: this.text.value, instruction: this.instruction.value }); }

  changed() {
    this.mark();
    this.keep();
  }

  mark() {
    const { selectionStart: start, selectionEnd: end, value } = this.text;
    this.span = start === end ? [0, value.length] : [start, end];
    this.selected = start !== end;
    const what = this.selected ? `${count(points(value.slice(start, end)), "character")} selected`
      : "Nothing is selected: the whole text is rewritten";
    this.about.textContent = value ? what : "";
    this.mirror();
  }

  // The selection stays visible while the instruction is typed.
  mirror() {
    const { value } = this.text, [start, end] = this.span;
    const marked = this.selected
      ? [value.slice(0, start), element("mark", {}, value.slice(start, end)), value.slice(end)] : [value];
    this.back.replaceChildren(...marked, "\n");
    this.text.style.height = "auto";
    this.text.style.height = `${Math.max(this.text.scrollHeight, 220)}px`;
  }

  async rewrite(again = 0) {
    this.again = again;
    const input = this.text.value, [start, end] = this.span, instruction = this.instruction.value;
    if (!input.trim()) { this.text.focus(); return; }
    if (!instruction.trim()) {
      this.instruction.focus();
      this.about.textContent = "Say what is to be done with it.";
      return;
    }
    const control = this.running = new AbortController();
    this.result = null;
    this.hole = element("ins.forming");
    const removed = element("del", {}, input.slice(start, end));
    this.review.replaceChildren(input.slice(0, start), removed, this.hole, input.slice(end));
    this.mode("running");
    say("Rewriting");
    const fields = this.settings.fields("edit", again);
    fields.diffusion.span = [points(input.slice(0, start)), points(input.slice(0, end))];
    const began = performance.now();
    try {
      let diffusion, usage;
      for await (const chunk of stream("/v1/edits", { input, instruction, ...fields }, control.signal)) {
        if (chunk.canvas) this.draw(chunk.canvas);
        if (chunk.choices[0]) ({ diffusion } = chunk.choices[0]);
        usage = chunk.usage ?? usage;
      }
      this.result = { passage: diffusion.passage, start, end };
      this.hole.replaceChildren(diffusion.passage);
      this.hole.classList.remove("forming");
      this.told.replaceChildren(figures({ usage, diffusion, wall: (performance.now() - began) / 1000 }));
      this.settings.measured(diffusion);
      this.running = null;
      this.mode("deciding");
      say(`Rewritten: ${diffusion.passage || "nothing"}`);
      this.accept.focus();
    } catch (failure) {
      this.running = null;
      this.mode("writing");
      if (failure.name === "AbortError") { say("Stopped"); return; }
      const text = failure instanceof Failure ? failure.message : "Something went wrong in this page.";
      if (!(failure instanceof Failure)) console.error(failure);
      this.told.replaceChildren(element("div.notice.error", { role: "alert" }, element("p", {}, sentence(text))));
    }
  }

  // The passage as it stands at a step.
  paint({ text, entropy, accepted, pinned, trial }) {
    if (!this.running) return;
    const places = pinned.flatMap((pin, i) => (pin ? [] : [i]));
    while (this.hole.childElementCount > places.length) this.hole.lastElementChild.remove();
    while (this.hole.childElementCount < places.length) this.hole.append(element("span.token"));
    places.forEach((place, i) => dress(this.hole.children[i], text[place], entropy[place], accepted[place]));
    this.about.textContent = `Attempt ${trial + 1}`;
  }

  decide(yes) {
    if (this.running) { this.running.abort(); return; }
    if (!this.result) return;
    const { passage, start, end } = this.result;
    if (yes) {
      this.past.push({ text: this.text.value, start, end });
      this.text.setRangeText(passage, start, end, "select");
    }
    this.result = null;
    this.told.replaceChildren();
    this.mode("writing");
    if (!yes) this.text.setSelectionRange(start, end);
    this.text.focus();
    this.changed();
    say(yes ? "Accepted" : "Rejected");
  }

  takeBack() {
    const before = this.past.pop();
    if (!before) return;
    this.text.value = before.text;
    this.text.focus();
    this.text.setSelectionRange(before.start, before.end);
    this.mode("writing");
    this.changed();
    say("Taken back");
  }

  mode(now) {
    const writing = now === "writing";
    this.text.hidden = this.back.hidden = !writing;
    this.review.hidden = writing;
    this.verdict.hidden = now !== "deciding";
    this.instruction.readOnly = now === "deciding";
    this.go.textContent = now === "running" ? "Stop" : "Rewrite";
    this.go.classList.toggle("stop", now === "running");
    this.go.disabled = now === "deciding";
    this.undo.disabled = !writing || this.past.length === 0;
    if (now === "running") {
      this.told.replaceChildren();
      this.about.textContent = "Reading";
      this.review.scrollIntoView({ block: "nearest" });
    }
    if (now === "deciding") this.about.textContent = "Accept, reject, or draw another";
    if (writing) this.mark();
  }
}
