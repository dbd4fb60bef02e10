// The conversation.

import { Failure, stream } from "./api.js";
import { CanvasView } from "./canvas.js";
import { $, count, element, paced, say, sentence } from "./dom.js";
import { figures } from "./figures.js";
import { render } from "./markdown.js";
import { Preview, htmlOf } from "./preview.js";
import { tab } from "./store.js";

let made = 0;

// One answer: its thought, its text, its canvas, its figures.
class AnswerView {
  constructor() {
    this.content = this.thinking = "";
    this.draft = null;
    this.id = `answer-${++made}`;
    this.thought = element("div.prose");
    this.thoughtTitle = element("summary", {}, "Thinking");
    this.thoughtBox = element("details.thought", { hidden: true }, this.thoughtTitle, this.thought);
    this.prose = element("div.prose");
    this.shown = element("div");
    this.rest = element("div");
    this.element = element("li.answer", { "aria-label": "Answer" }, this.thoughtBox, this.prose, this.shown, this.rest);
    this.drawn = paced(() => this.paint());
  }

  // Takes a step of the canvas.
  step(canvas) {
    if (!this.canvas) {
      this.canvas = new CanvasView(this.id);
      this.shown.append(this.canvas.element);
    }
    this.canvas.add(canvas);
    this.draft = canvas.draft ?? null;
    this.drawn();
  }

  // Takes final text.
  hear(delta) {
    this.content += delta.content ?? "";
    this.thinking += delta.reasoning_content ?? "";
    this.draft = null;
    this.drawn();
  }

  paint() {
    const content = this.content + (this.draft?.content ?? "");
    const thinking = this.thinking + (this.draft?.reasoning_content ?? "");
    const settling = !this.done;
    this.element.classList.toggle("settling", settling);
    if (thinking.trim()) {
      this.thoughtBox.hidden = false;
      const words = thinking.trim().split(/\s+/).length;
      this.thoughtTitle.textContent = settling && !content.trim() ? "Thinking" : `Thought, ${count(words, "word")}`;
      render(this.thought, thinking, !settling);
    } else this.thoughtBox.hidden = true;
    render(this.prose, content, !settling);
    const html = htmlOf(content);
    if (html !== null) {
      if (!this.preview) {
        this.preview = new Preview();
        this.prose.after(this.preview.element);
      }
      this.preview.show(html);
    }
    this.grew?.();
  }

  end() {
    this.done = true;
    this.draft = null;
    this.canvas?.finish();
    this.paint();
  }

  remove() {
    this.preview?.close();
    this.element.remove();
  }
}

export class Chat {
  constructor(settings) {
    this.settings = settings;
    this.messages = tab.get("chat", []);
    this.views = [];
    this.running = null;
    this.list = $("messages");
    this.box = $("ask");
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.running) this.stop(); else this.send();
    });
    this.box.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        if (!this.running) this.send();
      }
      if (event.key === "Escape" && this.running) this.stop();
    });
    this.box.addEventListener("input", () => { this.fit(); tab.set("ask", this.box.value); });
    this.box.value = tab.get("ask", "");
    this.messages.forEach((message) => this.showOld(message));
    this.fit();
    this.settle();
  }

  fit() {
    this.box.style.height = "auto";
    this.box.style.height = `${Math.min(this.box.scrollHeight, innerHeight * 0.4)}px`;
  }

  // What is allowed, as things stand.
  settle() {
    $("empty").hidden = this.messages.length > 0;
    $("send").textContent = this.running ? "Stop" : "Send";
    $("send").classList.toggle("stop", Boolean(this.running));
    this.list.setAttribute("aria-busy", Boolean(this.running));
    tab.set("chat", this.messages);
  }

  clear() {
    this.stop();
    this.views.forEach((view) => view.remove());
    this.views = [];
    this.messages = [];
    this.list.replaceChildren();
    this.settle();
    this.box.focus();
  }

  stop() { this.running?.abort(); }

  send() {
    const text = this.box.value;
    if (!text.trim()) return;
    this.box.value = "";
    tab.set("ask", "");
    this.fit();
    const message = { role: "user", content: text };
    this.messages.push(message);
    this.list.append(this.asked(message));
    this.answer();
  }

  asked({ content }) {
    return element("li.asked", { "aria-label": "You" }, element("div.bubble", {}, content));
  }

  showOld(message) {
    if (message.role === "user") { this.list.append(this.asked(message)); return; }
    const view = this.newView();
    Object.assign(view, { content: message.content, thinking: message.thinking ?? "" });
    view.end();
    this.finish(view, message);
  }

  newView() {
    const view = new AnswerView();
    view.grew = () => this.follow();
    this.views.push(view);
    this.list.append(view.element);
    return view;
  }

  // Keeps the end in sight for who has not scrolled away from it.
  follow(always = false) {
    const place = $("scroll");
    if (always || place.scrollHeight - place.scrollTop - place.clientHeight < 160) place.scrollTop = place.scrollHeight;
  }

  async answer(again = 0) {
    const view = this.newView();
    const control = this.running = new AbortController();
    this.settle();
    view.element.classList.add("settling");
    this.follow(true);
    say("Answering");
    const message = { role: "assistant", content: "", again };
    const began = performance.now();
    try {
      const { system } = this.settings.values;
      const said = this.messages.filter(({ error, content }) => !error || content)
        .map(({ role, content }) => ({ role, content }));
      const messages = system && this.settings.own.chat ? [{ role: "system", content: system }, ...said] : said;
      const body = { messages, ...this.settings.fields("chat", again) };
      for await (const chunk of stream("/v1/chat/completions", body, control.signal)) {
        if (chunk.canvas) view.step(chunk.canvas);
        const [choice] = chunk.choices;
        if (choice?.delta) view.hear(choice.delta);
        if (choice?.finish_reason) {
          Object.assign(message, { reason: choice.finish_reason, diffusion: choice.diffusion });
        }
        if (chunk.usage) message.usage = chunk.usage;
      }
      message.wall = (performance.now() - began) / 1000;
      this.settings.measured(message.diffusion);
    } catch (failure) {
      if (failure.name === "AbortError") message.stopped = true;
      else if (failure instanceof Failure) message.error = { text: failure.message, retry: failure.retry };
      else { message.error = { text: "Something went wrong in this page.", retry: 0 }; console.error(failure); }
    }
    this.running = null;
    view.end();
    Object.assign(message, { content: view.content, thinking: view.thinking });
    if (message.error && !message.content) view.element.classList.add("failed");
    this.messages.push(message);
    this.finish(view, message);
    this.settle();
    this.follow();
    say(message.error ? "" : message.stopped ? "Stopped" : `Answer: ${view.prose.textContent}`);
  }

  // What stands below an answer.
  finish(view, message) {
    const press = { type: "button", onclick: () => this.again(view, message) };
    const again = (label) => element("button.small", press, label);
    if (message.error) {
      view.rest.append(element("div.notice.error", { role: "alert" },
        element("p", {}, sentence(message.error.text)), this.retry(again("Try again"), message.error)));
      return;
    }
    if (message.stopped) view.rest.append(element("p.notice.quiet", {}, "Stopped."));
    if (!message.content.trim() && !message.stopped) {
      view.rest.append(element("p.notice.quiet", {}, "An empty answer."));
    }
    if (message.diffusion) view.rest.append(figures(message));
    const copy = element("button.small", {
      type: "button", onclick: async () => { await navigator.clipboard.writeText(message.content); say("Copied"); },
    }, "Copy");
    view.rest.append(element("div.actions", {}, message.content ? copy : null, again("Another")));
  }

  // A server that is busy says when to come again.
  retry(button, { retry }) {
    if (!retry) return button;
    let left = retry;
    const tick = () => {
      button.disabled = left > 0;
      button.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
      if (left-- > 0) setTimeout(tick, 1000);
    };
    tick();
    return button;
  }

  // Answers the question again; what came after is forgotten.
  again(view, message) {
    if (this.running) return;
    const at = this.messages.indexOf(message);
    this.messages.length = at;
    while (view.element.nextSibling) view.element.nextSibling.remove();
    this.views.filter((each) => !each.element.isConnected).forEach((each) => each.remove());
    view.remove();
    this.views = this.views.filter((each) => each.element.isConnected);
    this.answer((message.again ?? 0) + 1);
  }
}
