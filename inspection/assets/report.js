"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const number = (value) => (value === null ? "not measured" : Number(value.toPrecision(3)).toString());

// Sorted down, with what was not measured at the end; equal ones stay in the page's order.
const down = (key) => (a, b) => (key(b) ?? -Infinity) - (key(a) ?? -Infinity);
const orders = {
  inversion: down((pair) => pair.inversion_error),
  error: down((pair) => pair.reference_error),
  label: (a, b) => Math.abs(a.label - 0.5) - Math.abs(b.label - 0.5),
  prompt: (a, b) => a.prompt.localeCompare(b.prompt),
  random: (a, b) => a.shuffled - b.shuffled,
};

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// One picture of a pair's sprite: two rows (win, lose), x0 in the first column.
function cell(pair, column, side, label) {
  const count = 1 + pair.timesteps.length * pair.columns.length;
  const made = element("span", "cell");
  made.setAttribute("role", "img");
  made.setAttribute("aria-label", label);
  made.style.backgroundImage = `url(${pair.sprite})`;
  made.style.backgroundSize = `${100 * count}% 200%`;
  made.style.backgroundPosition = `${(100 * column) / (count - 1)}% ${100 * side}%`;
  return made;
}

function card(pair) {
  const button = element("button", "card");
  button.type = "button";
  const sides = element("span", "sides");
  sides.append(cell(pair, 0, 0, "win"), cell(pair, 0, 1, "lose"));
  button.append(sides, element("span", "prompt", pair.prompt || "(empty prompt)"));
  const label = pair.label === 1 ? "" : ` · label ${number(pair.label)}`;
  const trip = pair.inversion_error === null ? "" : ` · round trip ${number(pair.inversion_error)}`;
  button.append(element("span", "numbers", `E_ref ${number(pair.reference_error)}${trip}${label}`));
  button.addEventListener("click", () => open(pair));
  const item = element("li");
  item.append(button);
  return item;
}

let shown = [];
let current = null;
for (const pair of data.pairs) pair.card = card(pair);

function refresh() {
  const words = byId("query").value.toLowerCase().split(/\s+/).filter(Boolean);
  const group = byId("group").value;
  shown = data.pairs.filter((pair) => {
    const text = `${pair.prompt} ${pair.pair_id}`.toLowerCase();
    return (group === "all" || pair.groups.includes(group)) && words.every((word) => text.includes(word));
  });
  shown.sort(orders[byId("sort").value]);
  byId("cards").replaceChildren(...shown.map((pair) => pair.card));
  byId("count").textContent = `${shown.length} of ${data.pairs.length} shown`;
}

function cleanBlock(pair, caption) {
  const made = element("section", "step");
  const grid = element("div", "pictures clean");
  grid.append(element("span", "tag win", "win"), element("span", "tag lose", "lose"));
  grid.append(cell(pair, 0, 0, "x0, win"), cell(pair, 0, 1, "x0, lose"));
  made.append(element("h3", "", "x0, clean"), grid, element("p", "", caption));
  return made;
}

function block(title, pair, columns, first, caption) {
  const made = element("section", "step");
  made.append(element("h3", "", title));
  const grid = element("div", "pictures");
  grid.style.setProperty("--columns", columns.length);
  grid.append(element("span"), ...columns.map((name) => element("span", "", name)));
  for (const [side, name] of ["win", "lose"].entries()) {
    grid.append(element("span", `tag ${name}`, name));
    columns.forEach((column, index) => grid.append(cell(pair, first + index, side, `${column}, ${name}, ${title}`)));
  }
  made.append(grid, element("p", "", caption));
  return made;
}

function open(pair) {
  current = pair;
  const at = shown.indexOf(pair);
  byId("place").textContent = `${at + 1} of ${shown.length}`;
  byId("sheet-name").textContent = pair.prompt || "(empty prompt)";
  const facts = [`pair ${pair.pair_id}`, `shard ${pair.shard}`, `P(win preferred) ${number(pair.label)}`];
  if (pair.caption_dropped) facts.push("caption dropped");
  byId("sheet-facts").textContent = facts.join(" · ");
  const trip = `round trip error: ${number(pair.inversion_error)}`;
  const blocks = [cleanBlock(pair, trip)];
  pair.timesteps.forEach((timestep, step) => {
    const [win, lose] = pair.errors[step];
    const caption = `E_ref: win ${number(win)}, lose ${number(lose)}`;
    blocks.push(block(`t = ${timestep}`, pair, pair.columns, 1 + step * pair.columns.length, caption));
  });
  byId("steps").replaceChildren(...blocks);
  const legend = [ramp(pair.columns.includes("|delta|") ? "|delta|" : "|target|", "viridis", "≥ 2 (unit Gaussian: 1)")];
  if (pair.error_top !== null) legend.push(ramp("target − delta", "magma", `≥ ${number(pair.error_top)} (square-root scale)`));
  legend.push(element("span", "", data.note));
  byId("legend").replaceChildren(...legend);
  if (!byId("sheet").open) byId("sheet").showModal();
  byId("sheet").scrollTop = 0;
}

function ramp(name, colours, top) {
  const made = element("span", "", `${name}, RMS over channels: 0`);
  made.append(element("i", `ramp ${colours}`), top);
  return made;
}

function step(by) {
  if (shown.length) open(shown[(shown.indexOf(current) + by + shown.length) % shown.length]);
}

byId("query").addEventListener("input", refresh);
byId("group").addEventListener("change", refresh);
byId("sort").addEventListener("change", refresh);
byId("controls").addEventListener("submit", (event) => event.preventDefault());
byId("previous").addEventListener("click", () => step(-1));
byId("next").addEventListener("click", () => step(1));
byId("close").addEventListener("click", () => byId("sheet").close());
byId("sheet").addEventListener("click", (event) => event.target === byId("sheet") && byId("sheet").close());
byId("sheet").addEventListener("close", () => current && current.card.firstChild.focus());
document.addEventListener("keydown", (event) => {
  const inSheet = byId("sheet").open;
  if (inSheet && event.key === "ArrowLeft") step(-1);
  if (inSheet && event.key === "ArrowRight") step(1);
  if (!inSheet && event.key === "/" && !/INPUT|SELECT/.test(document.activeElement.tagName)) {
    event.preventDefault();
    byId("query").focus();
  }
});
byId("sheet").style.setProperty("--ratio", data.ratio);
byId("cards").style.setProperty("--ratio", data.ratio);
refresh();
