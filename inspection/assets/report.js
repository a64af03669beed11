const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const number = (value) => (value === null ? "not measured" : Number(value.toPrecision(3)).toString());
const PAGE = 60;

data.pairs.forEach((pair, index) => {
  pair.index = index;
  const measured = pair.inversion_errors.filter((value) => value !== null);
  pair.inversion_error = measured.length ? Math.max(...measured) : null;
  pair.against = pair.gap !== null && pair.label !== null && pair.label < 0.5 ? -pair.gap : pair.gap;
  pair.text = `${pair.prompt} ${pair.pair_id}`.toLowerCase();
});

// Sorted down, with what was not measured at the end; equal ones stay in the page's order.
const down = (key) => (a, b) => (key(b) ?? -Infinity) - (key(a) ?? -Infinity) || 0;
const orders = {
  inversion: down((pair) => pair.inversion_error),
  error: down((pair) => pair.reference_error),
  gap: down((pair) => pair.against),
  label: (a, b) => Math.abs(a.label - 0.5) - Math.abs(b.label - 0.5),
  prompt: (a, b) => a.prompt.localeCompare(b.prompt),
  random: (a, b) => a.shuffled - b.shuffled,
};
// What a bar of a plot of this column asks of a pair: one of these values in its range.
const columns = {
  timesteps: (pair) => pair.timesteps,
  reference_error: (pair) => [pair.reference_error],
  gap: (pair) => [pair.gap],
  inversion_errors: (pair) => pair.inversion_errors,
  label: (pair) => [pair.label],
};

// --- what is shown, which the address holds ---
const fresh = () => ({ query: "", group: data.pairs.some((pair) => pair.sheet) ? "drawn" : "all", sort: "inversion", page: 0, range: null, pair: null });
let state = fresh();
const marked = new Set();
let shown = [];

function remember() {
  const words = new URLSearchParams();
  const plain = fresh();
  for (const name of ["query", "group", "sort", "page"]) if (state[name] !== plain[name]) words.set(name, state[name]);
  if (state.range) words.set("range", [state.range.column, state.range.low, state.range.high].join(":"));
  if (marked.size) words.set("marked", [...marked].sort((a, b) => a - b).join("."));
  if (state.pair !== null) words.set("pair", state.pair);
  history.replaceState(null, "", `#${words}`);
}

function recall() {
  const words = new URLSearchParams(location.hash.slice(1));
  state = fresh();
  state.query = words.get("query") ?? "";
  if (document.querySelector(`#group option[value="${CSS.escape(words.get("group") ?? "")}"]`)) state.group = words.get("group");
  if (Object.hasOwn(orders, words.get("sort") ?? "")) state.sort = words.get("sort");
  state.page = Number.parseInt(words.get("page") ?? "0", 10) || 0;
  const [column, low, high] = (words.get("range") ?? "").split(":");
  if (Object.hasOwn(columns, column)) state.range = { column, low: Number(low), high: Number(high) };
  marked.clear();
  for (const word of (words.get("marked") ?? "").split(".")) {
    const pair = word && data.pairs[Number(word)];
    if (pair && pair.listable) marked.add(pair.index);
  }
  const pair = words.has("pair") ? data.pairs[Number(words.get("pair"))] : undefined;
  refresh();
  if (pair) open(pair);
}

function chosenPairs() {
  const words = state.query.toLowerCase().split(/\s+/).filter(Boolean);
  const { range, group } = state;
  const of = range && columns[range.column];
  return data.pairs.filter((pair) =>
    (group === "all" || (group === "drawn" ? pair.sheet : group === "marked" ? marked.has(pair.index) : pair.groups.includes(group))) &&
    words.every((word) => pair.text.includes(word)) &&
    (!range || of(pair).some((value) => value !== null && value >= range.low && value < range.high)));
}

function refresh() {
  byId("query").value = state.query;
  byId("group").value = state.group;
  byId("sort").value = state.sort;
  shown = chosenPairs().sort(orders[state.sort]);
  const last = Math.max(0, Math.ceil(shown.length / PAGE) - 1);
  state.page = Math.min(Math.max(state.page, 0), last);
  const here = shown.slice(state.page * PAGE, (state.page + 1) * PAGE);
  byId("cards").replaceChildren(...here.map(card));
  byId("count").textContent = `${shown.length} of ${data.pairs.length} shown`;
  byId("pages").hidden = last === 0;
  byId("page").textContent = `Page ${state.page + 1} of ${last + 1}`;
  byId("page-before").disabled = state.page === 0;
  byId("page-after").disabled = state.page === last;
  byId("nothing").hidden = shown.length > 0 || data.pairs.length === 0;
  byId("nothing-words").textContent = nothingWords();
  byId("chosen").hidden = state.range === null;
  if (state.range) byId("chosen-words").textContent = `Only pairs with ${rangeWords()}.`;
  for (const bar of document.querySelectorAll("svg[data-column] .bar")) bar.classList.toggle("active", isActive(bar));
  showMarks();
  remember();
}

const columnWords = { timesteps: "a timestep", reference_error: "a reference error", gap: "a win/lose gap", inversion_errors: "an inversion error", label: "a label" };
function rangeWords() {
  const { column, low, high } = state.range;
  const ends = low === -Infinity ? `below ${number(high)}` : high === Infinity ? `of ${number(low)} and more` : `of ${number(low)} to ${number(high)}`;
  return `${columnWords[column]} ${ends}`;
}

function nothingWords() {
  const group = byId("group").selectedOptions[0];
  const parts = [];
  if (state.query) parts.push(`“${state.query}” in prompt or id`);
  if (state.range) parts.push(rangeWords());
  const among = state.group === "all" ? "" : ` among those shown: ${group ? group.textContent.trim() : state.group}`;
  return `No pair has ${parts.join(" and ") || "been marked"}${parts.length ? among : ""}.`;
}

// --- cards ---
function card(pair) {
  const button = element("button", "card");
  button.type = "button";
  if (pair.sheet) {
    const sides = element("span", "sides");
    for (const [side, name] of ["win", "lose"].entries()) {
      const half = element("span", `side ${name}`);
      half.append(cell(pair.sheet, 0, side, name), element("span", `tag ${name}`, name));
      half.lastChild.setAttribute("aria-hidden", "true");
      sides.append(half);
    }
    button.append(sides);
  } else {
    button.append(element("span", "undrawn", "no picture on this page"));
  }
  button.append(element("span", "prompt", pair.prompt || "(empty prompt)"));
  const facts = [`E_ref ${number(pair.reference_error)}`, `gap ${number(pair.gap)}`];
  if (pair.inversion_error !== null) facts.push(`round trip ${number(pair.inversion_error)}`);
  if (pair.label !== 1) facts.push(`label ${number(pair.label)}`);
  button.append(element("span", "numbers", facts.join(" · ")));
  button.addEventListener("click", () => open(pair));
  const check = element("label", "check");
  const box = element("input");
  box.type = "checkbox";
  box.checked = marked.has(pair.index);
  box.disabled = !pair.listable;
  box.addEventListener("change", () => mark(pair, box.checked));
  check.append(box, pair.listable ? `mark ${pair.pair_id}` : "an id that no list can hold");
  const item = element("li", box.checked ? "marked" : "");
  item.id = `pair-${pair.index}`;
  item.append(button, check);
  return item;
}

// --- marks ---
function mark(pair, on) {
  if (!pair.listable) return;
  if (on) marked.add(pair.index);
  else marked.delete(pair.index);
  const item = byId(`pair-${pair.index}`);
  if (item) {
    item.className = on ? "marked" : "";
    item.querySelector("input").checked = on;
  }
  showMarks();
  remember();
}

const list = () => [...marked].sort((a, b) => a - b).map((index) => `${data.pairs[index].pair_id}\n`).join("");

function showMarks() {
  byId("marks").hidden = marked.size === 0;
  byId("marked-count").textContent = `${marked.size} marked`;
  byId("list").value = list();
  byId("copied").textContent = "";
}

async function copy() {
  try {
    await navigator.clipboard.writeText(list());
  } catch {
    byId("list").closest("details").open = true;
    byId("list").select();
    if (!document.execCommand("copy")) {
      byId("copied").textContent = "Copying is not allowed here: the list is selected below.";
      return;
    }
  }
  byId("copied").textContent = `Copied ${marked.size} ids, one a line.`;
}

function download() {
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([list()], { type: "text/plain" }));
  link.download = "except.txt";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// --- plots that choose pairs ---
const bars = (svg) => [...svg.querySelectorAll(".bar")];
function rangeOf(bar) {
  const all = bars(bar.ownerSVGElement);
  // Values beyond a plot's ends stand in its outer bars.
  const low = bar === all[0] ? -Infinity : Number(bar.dataset.low);
  const high = bar === all.at(-1) ? Infinity : Number(bar.dataset.high);
  return { column: bar.ownerSVGElement.dataset.column, low, high };
}

function isActive(bar) {
  const { column, low, high } = rangeOf(bar);
  return state.range !== null && state.range.column === column && state.range.low === low && state.range.high === high;
}

for (const svg of document.querySelectorAll("svg[data-column]")) {
  for (const [place, bar] of bars(svg).entries()) {
    bar.setAttribute("role", "button");
    bar.setAttribute("tabindex", place ? "-1" : "0");
    bar.setAttribute("aria-label", `${bar.querySelector("title").textContent}. Show these pairs.`);
  }
  svg.addEventListener("click", (event) => {
    const bar = event.target.closest(".bar");
    if (bar) change({ range: isActive(bar) ? null : rangeOf(bar), group: "all" });
    if (bar) byId("gallery").scrollIntoView();
  });
  svg.addEventListener("keydown", (event) => {
    const all = bars(svg);
    const at = all.indexOf(event.target);
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      change({ range: isActive(all[at]) ? null : rangeOf(all[at]), group: "all" });
    }
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by && all[at + by]) {
      all[at].setAttribute("tabindex", "-1");
      all[at + by].setAttribute("tabindex", "0");
      all[at + by].focus();
    }
  });
}

// --- events ---
function change(to) {
  state = { ...state, page: 0, ...to };
  refresh();
}

function turn(by) {
  change({ page: state.page + by });
  byId("gallery").scrollIntoView();
}

byId("query").addEventListener("input", () => change({ query: byId("query").value }));
byId("group").addEventListener("change", () => change({ group: byId("group").value }));
byId("sort").addEventListener("change", () => change({ sort: byId("sort").value }));
byId("controls").addEventListener("submit", (event) => event.preventDefault());
byId("page-before").addEventListener("click", () => turn(-1));
byId("page-after").addEventListener("click", () => turn(1));
byId("unchoose").addEventListener("click", () => change({ range: null }));
byId("reset").addEventListener("click", () => change({ query: "", range: null, group: "all" }));
byId("copy").addEventListener("click", copy);
byId("download").addEventListener("click", download);
byId("unmark").addEventListener("click", () => {
  marked.clear();
  refresh();
});
byId("previous").addEventListener("click", () => step(-1));
byId("next").addEventListener("click", () => step(1));
byId("mark").addEventListener("click", markOpen);
byId("close").addEventListener("click", () => byId("sheet").close());
byId("sheet").addEventListener("click", (event) => event.target === byId("sheet") && byId("sheet").close());
byId("sheet").addEventListener("close", closed);
// Links to sections leave the address to the gallery's state.
for (const link of document.querySelectorAll('nav a[href^="#"]')) {
  link.addEventListener("click", (event) => {
    event.preventDefault();
    document.querySelector(link.getAttribute("href")).scrollIntoView();
  });
}
window.addEventListener("hashchange", recall);
document.addEventListener("keydown", (event) => {
  const inSheet = byId("sheet").open;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (inSheet && event.key === "ArrowLeft") step(-1);
  if (inSheet && event.key === "ArrowRight") step(1);
  if (inSheet && event.key.toLowerCase() === "m") markOpen();
  if (!inSheet && event.key === "/" && !/INPUT|SELECT|TEXTAREA/.test(document.activeElement.tagName)) {
    event.preventDefault();
    byId("query").focus();
  }
});
byId("sheet").style.setProperty("--ratio", data.ratio);
byId("cards").style.setProperty("--ratio", data.ratio);
recall();
