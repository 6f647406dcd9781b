// The page works without this. It adds switches between variants, arrow keys among tokens, and pinned tokens.
"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// -- Switches: of the panels in a group, show the chosen one.
for (const group of all("[data-switch]")) {
  const panels = all(".panel", group);
  const radios = all("input[type=radio]", group);
  if (!radios.length) continue;
  for (const chooser of all(":scope > [hidden]", group)) chooser.hidden = false;
  const show = () => panels.forEach((panel, i) => { panel.hidden = !radios.some((r) => r.checked && Number(r.value) === i); });
  for (const radio of radios) radio.addEventListener("change", show);
  show();
}

// -- A box that scrolls takes the focus, so that the arrow keys move it; the Tab key passes by one that does not need to.
const measured = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
    else target.removeAttribute("tabindex");
  }
});
for (const box of all(".scroll")) measured.observe(box);

// -- Values of tokens: the small box above a token stays on the page.
for (const tip of all(".tip")) {
  const fit = () => {
    tip.style.translate = "";
    const box = tip.getBoundingClientRect();
    const shift = Math.max(4 - box.left, 0) + Math.min(document.documentElement.clientWidth - 4 - box.right, 0);
    if (shift) tip.style.translate = `calc(-50% + ${shift}px)`;
  };
  tip.parentElement.addEventListener("pointerenter", fit);
  tip.parentElement.addEventListener("focus", fit);
}

// -- Arrow keys: a long row or grid of tokens is one stop of the Tab key, and arrows move within it.
for (const group of all("[data-rove]")) {
  const items = all("button, [tabindex]", group);
  const enter = (item) => {
    for (const other of items) other.tabIndex = other === item ? 0 : -1;
  };
  if (items.length) enter(items[0]);
  group.addEventListener("focusin", (event) => { if (items.includes(event.target)) enter(event.target); });
  group.addEventListener("keydown", (event) => {
    const at = items.indexOf(event.target);
    const to = at < 0 ? undefined : {
      ArrowRight: () => items[at + 1],
      ArrowLeft: () => items[at - 1],
      ArrowDown: () => nearest(items, items[at], 1),
      ArrowUp: () => nearest(items, items[at], -1),
      Home: () => items[0],
      End: () => items[items.length - 1],
    }[event.key]?.();
    if (!to) return;
    event.preventDefault();
    to.focus();
  });
}

// The nearest item in the next line below (1) or above (-1).
function nearest(items, from, direction) {
  const middle = (box) => (box.left + box.right) / 2;
  const start = from.getBoundingClientRect();
  let best, least = Infinity;
  for (const item of items) {
    const box = item.getBoundingClientRect();
    const down = direction * (box.top - start.top);
    if (down < start.height / 2) continue;
    const distance = 4 * down + Math.abs(middle(box) - middle(start));
    if (distance < least) [best, least] = [item, distance];
  }
  return best;
}

// -- Heat grids: show the value of the cell under the pointer, or at the arrow keys. The values are those of the table.
for (const figure of all("[data-heat]")) {
  const table = document.getElementById(figure.dataset.heat);
  if (!table) continue;
  const grid = figure.querySelector(".heat");
  const cursor = figure.querySelector(".cursor");
  const says = figure.querySelector("output");
  const units = Number(figure.dataset.units);
  const places = figure.dataset.places.split(" ").map((place) => place.split(",").map(Number));
  const rows = table.tBodies[0].rows;
  let at = [0, 0];

  function show(row, column) {
    at = [row, column];
    const [start, width] = places[column];
    for (const [name, value] of Object.entries({ x: start, y: row, width })) cursor.setAttribute(name, value);
    const head = [...table.tHead.rows].at(-1).cells[column + 1].dataset.name;
    const value = rows[row].cells[column + 1].textContent;
    says.textContent = `${figure.dataset.label} ${rows[row].cells[0].textContent}, ${head}: ${value || "–"}`;
  }

  const follow = (event) => {
    const box = grid.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * units;
    const row = Math.floor(((event.clientY - box.top) / box.height) * rows.length);
    const column = places.findIndex(([start, width]) => x >= start && x < start + width);
    if (column >= 0 && row >= 0 && row < rows.length) show(row, column);
  };
  grid.addEventListener("pointermove", follow);
  grid.addEventListener("pointerdown", follow);

  figure.tabIndex = 0;
  figure.setAttribute("role", "group");
  figure.setAttribute("aria-label", "Grid: arrow keys read its values");
  figure.addEventListener("focus", () => { if (figure.matches(":focus-visible")) show(...at); });
  figure.addEventListener("keydown", (event) => {
    const [row, column] = at;
    const to = {
      ArrowRight: [row, column + 1], ArrowLeft: [row, column - 1], ArrowDown: [row + 1, column], ArrowUp: [row - 1, column],
      Home: [row, 0], End: [row, places.length - 1],
    }[event.key];
    if (!to) return;
    event.preventDefault();
    if (rows[to[0]] && places[to[1]]) show(...to);
  });
}

// -- Pinned tokens: their rank by depth, as lines and as a table.
const source = document.getElementById("data");
const place = document.getElementById("pinned");
if (source && place) {
  const data = JSON.parse(source.textContent);
  const names = new Map(data.tokens);
  const columns = new Map(data.tokens.map(([id], i) => [id, i]));
  const buttons = all("button[value]");
  const plot = place.querySelector(".plot");
  const chips = place.querySelector(".pins");
  const tables = place.querySelector(".tables");
  const said = document.getElementById("said");
  const DASHES = ["none", "7 3", "2 3", "9 3 2 3", "4 2", "12 4"];
  const ACROSS = 8; // tokens of one table: as many as a page is wide
  let pinned = [];
  let marked = null;

  const ranks = (id) => data.ranks.map((row) => row[columns.get(id)]);
  const height = (rank) => 1000 * Math.min(1, Math.max(0, (Math.log(rank) - data.span[0]) / (data.span[1] - data.span[0])));

  function path(kind, text, dash) {
    const made = svg("path", { class: kind, d: text });
    if (dash) made.setAttribute("stroke-dasharray", dash);
    return made;
  }

  const dash = (id) => DASHES[pinned.indexOf(id) % DASHES.length];
  const brief = (name) => (name.length > 14 ? `${name.slice(0, 13)}…` : name);

  // The marked token comes last, and so lies on top. Every line has its name at its end, none on another's.
  function draw() {
    plot.replaceChildren();
    for (const label of all(".end", plot.parentElement)) label.remove();
    const order = pinned.filter((id) => id !== marked).concat(pinned.includes(marked) ? [marked] : []);
    const ends = [];
    for (const id of order) {
      const points = ranks(id).flatMap((rank, i) => (rank > 0 ? [[1000 * data.x[i], height(rank)]] : []));
      const tone = id === marked ? "accent" : "faint";
      plot.append(path(`line ${tone}`, points.map(([x, y], i) => `${i ? "L" : "M"}${x} ${y.toFixed(1)}`).join(""), dash(id)));
      plot.append(path(`dots ${tone}`, points.map(([x, y]) => `M${x} ${y.toFixed(1)}h0`).join("")));
      if (points.length) ends.push({ id, tone, y: points[points.length - 1][1] });
    }
    const apart = Math.min(62, 1000 / Math.max(1, ends.length - 1));
    ends.sort((a, b) => a.y - b.y);
    ends.forEach((end, i) => { if (i) end.y = Math.max(end.y, ends[i - 1].y + apart); });
    ends.reverse().forEach((end, i) => { end.y = Math.min(end.y, i ? ends[i - 1].y - apart : 1000); });
    for (const { id, tone, y } of ends) {
      const label = svg("text", { class: `end ${tone}`, x: "100%", y: `${(y / 10).toFixed(1)}%`, dx: 6, dy: ".32em" });
      label.textContent = brief(names.get(id));
      plot.after(label);
    }
    for (const chip of chips.children) chip.classList.toggle("marked", Number(chip.dataset.id) === marked);
    for (const cell of all("[data-id]", tables)) cell.classList.toggle("best", Number(cell.dataset.id) === marked);
  }

  function mark(id) {
    marked = id;
    draw();
  }

  function element(name, text, attributes = {}) {
    const made = document.createElement(name);
    made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  function svg(name, attributes) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  function key(id) {
    const made = svg("svg", { viewBox: "0 0 26 8", width: 26, height: 8, "aria-hidden": "true" });
    made.append(path("line", "M0 4H26", dash(id)));
    return made;
  }

  const word = (id) => element("bdi", names.get(id), names.get(id).length > 20 ? { class: "long" } : {});

  // Depths go down, as in the grids, and tokens across: a deep model makes a long table, not a wide one.
  function table(ids) {
    const made = element("table", "", { class: "plain ranks" });
    const line = made.createTHead().insertRow();
    line.append(element("th", "Depth", { scope: "col", class: "n" }));
    for (const id of ids) {
      const head = element("th", "", { scope: "col", class: "n", "data-id": id });
      head.append(word(id));
      line.append(head);
    }
    const body = made.createTBody();
    data.depths.forEach((depth, i) => {
      const row = body.insertRow();
      row.append(element("th", depth, { scope: "row", class: "n" }));
      for (const id of ids) {
        const rank = data.ranks[i][columns.get(id)];
        row.append(element("td", rank > 0 ? rank.toLocaleString("en") : "–", { class: "n", "data-id": id }));
      }
    });
    return made;
  }

  function fill() {
    chips.replaceChildren(...pinned.map((id) => {
      const item = element("li", "", { "data-id": id });
      const button = element("button", "", { type: "button", "aria-label": `Unpin ${names.get(id)}` });
      button.append(key(id), word(id), element("span", "×", { "aria-hidden": "true" }));
      button.addEventListener("click", () => {
        const next = item.nextElementSibling || item.previousElementSibling;
        const following = next && Number(next.dataset.id);
        toggle(id);
        chips.querySelector(`[data-id="${following}"] button`)?.focus();
      });
      button.addEventListener("focus", () => mark(id));
      item.addEventListener("pointerenter", () => mark(id));
      item.append(button);
      return item;
    }));
    const groups = Array.from({ length: Math.ceil(pinned.length / ACROSS) }, (_, i) => pinned.slice(ACROSS * i, ACROSS * (i + 1)));
    tables.replaceChildren(...groups.map(table));
    for (const button of buttons) button.setAttribute("aria-pressed", String(pinned.includes(Number(button.value))));
    place.hidden = !pinned.length;
  }

  function toggle(id) {
    const there = pinned.includes(id);
    pinned = there ? pinned.filter((other) => other !== id) : [...pinned, id];
    if (!there || marked === id) marked = there ? pinned[pinned.length - 1] ?? null : id;
    fill();
    draw();
    const depths = ranks(id).map((rank, i) => `${rank} at ${data.depths[i]}`).join(", ");
    said.textContent = there ? `${names.get(id)} unpinned` : `${names.get(id)} pinned: rank by depth ${depths}`;
  }

  for (const button of buttons) button.addEventListener("click", () => toggle(Number(button.value)));
  fill();
  if (data.pinned !== null) toggle(data.pinned);
}

// -- Print all details: paper has no summary to open.
addEventListener("beforeprint", () => { for (const details of all("details")) details.open = true; });
