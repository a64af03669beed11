"use strict";
// The sheet of a pair, and the parts that cards have too.
function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// One picture of a sheet's sprite: two rows (win, lose), x0 in the first column.
function cell(sheet, column, side, label) {
  const count = 1 + sheet.timesteps.length * sheet.columns.length;
  const made = element("span", "cell");
  made.setAttribute("role", "img");
  made.setAttribute("aria-label", label);
  made.style.backgroundImage = `url(${sheet.sprite})`;
  made.style.backgroundSize = `${100 * count}% 200%`;
  made.style.backgroundPosition = `${(100 * column) / (count - 1)}% ${100 * side}%`;
  return made;
}

function cleanBlock(pair, caption) {
  const { sheet } = pair;
  const made = element("section", "step");
  const grid = element("div", "pictures clean");
  grid.append(element("span", "tag win", "win"), element("span", "tag lose", "lose"));
  for (const [side, name] of ["win", "lose"].entries()) {
    if (!sheet.full.length) {
      grid.append(cell(sheet, 0, side, `x0, ${name}`));
      continue;
    }
    const button = element("button", "full");
    button.type = "button";
    button.setAttribute("aria-pressed", "false");
    button.setAttribute("aria-label", `x0, ${name}: full size`);
    const image = element("img");
    image.alt = `x0, ${name}`;
    image.src = sheet.full[side];
    button.append(image);
    button.addEventListener("click", () => {
      const large = made.classList.toggle("large");
      for (const each of made.querySelectorAll(".full")) each.setAttribute("aria-pressed", String(large));
    });
    grid.append(button);
  }
  made.append(element("h3", "", "x0, clean"), grid, element("p", "", caption));
  return made;
}

function block(title, sheet, first, caption) {
  const made = element("section", "step");
  made.append(element("h3", "", title));
  const grid = element("div", "pictures");
  grid.style.setProperty("--columns", sheet.columns.length);
  grid.append(element("span"), ...sheet.columns.map((name) => element("span", "", name)));
  for (const [side, name] of ["win", "lose"].entries()) {
    grid.append(element("span", `tag ${name}`, name));
    sheet.columns.forEach((column, index) => grid.append(cell(sheet, first + index, side, `${column}, ${name}, ${title}`)));
  }
  made.append(grid, element("p", "", caption));
  return made;
}

function open(pair) {
  state.pair = pair.index;
  const { sheet } = pair;
  const at = shown.indexOf(pair);
  byId("place").textContent = at < 0 ? "" : `${at + 1} of ${shown.length}`;
  byId("sheet-name").textContent = pair.prompt || "(empty prompt)";
  const facts = [`pair ${pair.pair_id}`, `shard ${pair.shard}`, `P(win preferred) ${number(pair.label)}`, `E_ref ${number(pair.reference_error)}`, `win/lose gap ${number(pair.gap)}`];
  if (pair.caption_dropped) facts.push("caption dropped");
  byId("sheet-facts").textContent = facts.join(" · ");
  const [win, lose] = pair.inversion_errors;
  const trip = `round trip error: win ${number(win)}, lose ${number(lose)}`;
  if (sheet) {
    const blocks = [cleanBlock(pair, trip)];
    sheet.timesteps.forEach((timestep, step) => {
      const [first, second] = sheet.errors[step];
      const caption = `E_ref: win ${number(first)}, lose ${number(second)}`;
      blocks.push(block(`t = ${timestep}`, sheet, 1 + step * sheet.columns.length, caption));
    });
    byId("steps").replaceChildren(...blocks);
    const size = sheet.columns.find((name) => name.startsWith("|"));
    const legend = [ramp(size, "viridis", size === "|noise - x0|" ? "≥ 2" : "≥ 2 (unit Gaussian: 1)")];
    if (sheet.error_top !== null) legend.push(ramp(sheet.columns.at(-1), "magma", `≥ ${number(sheet.error_top)} (square-root scale)`));
    legend.push(element("span", "", data.note));
    byId("legend").replaceChildren(...legend);
  } else {
    const words = element("p", "", `${trip}. Its timesteps: ${pair.timesteps.join(", ")}. This page has no picture of it; this command makes one:`);
    byId("steps").replaceChildren(words, element("code", "", data.sheet_command.replace("PAIR_ID", () => quoted(pair.pair_id))));
    byId("legend").replaceChildren();
  }
  showMark(pair);
  if (!byId("sheet").open) byId("sheet").showModal();
  byId("sheet").scrollTop = 0;
  remember();
}

// As a POSIX shell takes it.
const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'"'"'`)}'`);

function showMark(pair) {
  byId("mark").disabled = !pair.listable;
  byId("mark").setAttribute("aria-pressed", String(marked.has(pair.index)));
  byId("mark").textContent = marked.has(pair.index) ? "Marked" : "Mark";
}

function markOpen() {
  const pair = data.pairs[state.pair];
  mark(pair, !marked.has(pair.index));
  showMark(pair);
}

function ramp(name, colours, top) {
  const made = element("span", "", `${name}, RMS over channels: 0`);
  made.append(element("i", `ramp ${colours}`), top);
  return made;
}

function step(by) {
  if (shown.length) open(shown[(shown.indexOf(data.pairs[state.pair]) + by + shown.length) % shown.length]);
}

function closed() {
  const at = shown.indexOf(data.pairs[state.pair]);
  const pair = state.pair;
  state.pair = null;
  if (at >= 0 && Math.floor(at / PAGE) !== state.page) {
    state.page = Math.floor(at / PAGE);
    refresh();
  } else {
    remember();
  }
  byId(`pair-${pair}`)?.querySelector("button").focus();
}
