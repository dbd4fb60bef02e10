// What is kept: the conversation and the text for this tab, settings and theme for this browser. Keys never.

const read = (where, name, otherwise) => {
  try { return JSON.parse(where.getItem(name)) ?? otherwise; } catch { return otherwise; }
};
const write = (where, name, value) => {
  try { where.setItem(name, JSON.stringify(value)); } catch { /* full, or forbidden: it is forgotten at a reload */ }
};

export const tab = {
  get: (name, otherwise) => read(sessionStorage, `dgemma.${name}`, otherwise),
  set: (name, value) => write(sessionStorage, `dgemma.${name}`, value),
};
export const browser = {
  get: (name, otherwise) => read(localStorage, `dgemma.${name}`, otherwise),
  set: (name, value) => write(localStorage, `dgemma.${name}`, value),
};
