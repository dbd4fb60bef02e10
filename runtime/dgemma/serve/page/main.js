// The page: tabs, theme, key, and what they belong to.

import { Failure, card, onKeyWanted } from "./api.js";
import { Chat } from "./chat.js";
import { $, element } from "./dom.js";
import { Editor } from "./editor.js";
import { Settings } from "./settings.js";
import { browser, tab } from "./store.js";

const THEMES = ["", "light", "dark"]; // "": as the system has it

function theme(name) {
  if (name) document.documentElement.dataset.theme = name; else delete document.documentElement.dataset.theme;
  $("theme").title = `Theme: ${name || "as the system"}`;
  browser.set("theme", name);
}
theme(browser.get("theme", ""));
$("theme").addEventListener("click", () => {
  theme(THEMES[(THEMES.indexOf(browser.get("theme", "")) + 1) % THEMES.length]);
});

onKeyWanted((wrong) => new Promise((resolve) => {
  const error = $("key-error");
  error.hidden = !wrong;
  error.textContent = "The server did not take that key.";
  $("key-value").value = "";
  $("key").addEventListener("cancel", (event) => event.preventDefault());
  $("key-form").addEventListener("submit", () => resolve($("key-value").value.trim()), { once: true });
  if (!$("key").open) $("key").showModal();
  $("key-value").focus();
}));

const tabs = ["chat", "edit"];
function choose(name, focus = false) {
  for (const each of tabs) {
    const chosen = each === name, handle = $(`tab-${each}`);
    handle.setAttribute("aria-selected", chosen);
    handle.tabIndex = chosen ? 0 : -1;
    $(each).hidden = !chosen;
    if (chosen && focus) handle.focus();
  }
  $("new").hidden = name !== "chat";
  tab.set("tab", name);
  if (name === "edit") editor?.shown();
}
for (const name of tabs) {
  $(`tab-${name}`).addEventListener("click", () => choose(name));
  $(`tab-${name}`).addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight" || event.key === "ArrowLeft") choose(tabs[1 - tabs.indexOf(name)], true);
  });
}

let editor = null;
async function start() {
  const about = await card();
  $("model").textContent = about.id;
  document.title = `${about.id} · dgemma`;
  const settings = new Settings(about);
  const chat = new Chat(settings);
  editor = new Editor(settings, $("edit"));
  $("new").addEventListener("click", () => chat.clear());
  $("open-settings").addEventListener("click", () => settings.open());
  choose(tab.get("tab", "chat"));
  document.body.classList.add("ready");
  if (matchMedia("(hover: hover)").matches && tab.get("tab", "chat") === "chat") $("ask").focus();
}

start().catch((failure) => {
  if (!(failure instanceof Failure)) console.error(failure);
  const text = failure instanceof Failure ? failure.message : "Something went wrong in this page.";
  const reload = element("button", { onclick: () => location.reload() }, "Try again");
  $("empty").replaceChildren(element("div.notice.error", { role: "alert" }, element("p", {}, text), reload));
});
