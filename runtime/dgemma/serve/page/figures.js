// A run's figures, and where its time went.

import { count, element, seconds } from "./dom.js";

const PARTS = [
  ["waiting", "in the queue"],
  ["prompt", "reading the prompt"],
  ["steps", "denoising"],
  ["others", "others’ turns and the way here"],
];

// usage and diffusion as the server tells them; wall: seconds from the question to the end.
export function figures({ usage, diffusion, wall, reason }) {
  const spent = { ...diffusion.seconds };
  spent.others = Math.max(0, wall - spent.waiting - spent.prompt - spent.steps);
  const total = PARTS.reduce((sum, [name]) => sum + spent[name], 0) || 1;
  const speed = usage && spent.steps > 0 ? usage.completion_tokens / spent.steps : 0;
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  const facts = [
    usage ? count(usage.completion_tokens, "token") : null,
    count(diffusion.steps, "step"),
    speed ? `${speed < 10 ? speed.toFixed(1) : Math.round(speed)} tokens/s` : null,
    diffusion.converged ? "converged" : "not converged",
    reason === "length" ? "cut at the most tokens" : null,
    diffusion.fault ? { empty: "an empty answer", loop: "ends in a loop" }[diffusion.fault] : null,
    cached ? `${cached} of ${usage.prompt_tokens} prompt tokens reused` : null,
    `seed ${diffusion.seed}`,
  ].filter(Boolean);
  const told = PARTS.map(([name, what]) => `${seconds(spent[name])} ${what}`);
  const bar = element("div.spent", { role: "img", "aria-label": `Where the time went: ${told.join(", ")}` });
  for (const [name] of PARTS) {
    const part = element(`span.part-${name}`);
    part.style.setProperty("flex-grow", spent[name] / total);
    bar.append(part);
  }
  const legend = element("ul.spent-legend", { "aria-hidden": "true" },
    ...PARTS.map(([name, what], i) =>
      spent[name] / total < 0.002 ? null : element("li", {}, element(`span.key.part-${name}`), told[i])));
  const list = element("ul.facts", { "aria-label": "Figures" }, ...facts.map((fact) => element("li", {}, fact)));
  const seen = (event) => event.target.scrollIntoView({ block: "nearest" });
  const summary = element("summary", {}, `${seconds(wall)} in all`);
  return element("div.figures", {}, list, element("details", { ontoggle: seen }, summary, bar, legend));
}
