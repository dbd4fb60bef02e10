// Elements without markup: text stays text.

export const $ = (id) => document.getElementById(id);

// element("button.primary", {type: "button", onclick: f}, "Send", child)
export function element(what, given = {}, ...children) {
  const [tag, ...classes] = what.split(".");
  const made = document.createElement(tag);
  if (classes.length) made.className = classes.join(" ");
  for (const [name, value] of Object.entries(given)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export function drawing(tag, given = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(given)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export const say = (text) => { $("status").textContent = text; };

export const count = (n, noun) => `${n} ${noun}${n === 1 ? "" : noun.endsWith("s") ? "es" : "s"}`;

export function seconds(s) {
  if (s < 0.001) return "0 s";
  if (s < 1) return `${Math.round(s * 1000)} ms`;
  if (s < 60) return `${s.toFixed(s < 10 ? 1 : 0)} s`;
  return `${Math.floor(s / 60)} min ${Math.round(s % 60)} s`;
}

export const sentence = (text) => text.slice(0, 1).toUpperCase() + text.slice(1);

// Calls at most once per frame, with the latest arguments.
export function paced(draw) {
  let waiting = null;
  return (...given) => {
    if (waiting === null) requestAnimationFrame(() => { const now = waiting; waiting = null; draw(...now); });
    waiting = given;
  };
}
