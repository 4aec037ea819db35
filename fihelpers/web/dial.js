// Stored pictures, lines and bars, one set for each position of a slider; a menu chooses between sliders.

const SVG = "http://www.w3.org/2000/svg";
const CHART = { width: 420, height: 240, left: 52, right: 10, top: 10, bottom: 42 };
const COLOURS = 6; // line-0 to line-5 in explorer.css

function add(parent, name, attributes = {}, text = "") {
  const node = parent.appendChild(document.createElementNS(SVG, name));
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}

function make(parent, name, className = "", text = "") {
  const node = parent.appendChild(document.createElement(name));
  if (className) node.className = className;
  node.textContent = text;
  return node;
}

// About five round numbers from low to high.
function ticks(low, high) {
  const rough = (high - low) / 5 || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 2.5, 5, 10].find((m) => m * power >= rough);
  const first = Math.ceil(low / step - 1e-9);
  const count = Math.floor(high / step + 1e-9) - first + 1;
  return Array.from({ length: count }, (_, i) => Number(((first + i) * step).toPrecision(6)));
}

function chart(parent, position, axes) {
  const svg = add(parent, "svg", { viewBox: `0 0 ${CHART.width} ${CHART.height}`, role: "img" });
  const xs = position.lines.flatMap((line) => line.x);
  const [low, high] = [Math.min(...xs), Math.max(...xs)];
  const [bottom, top] = axes.limits;
  const wide = CHART.width - CHART.left - CHART.right;
  const tall = CHART.height - CHART.top - CHART.bottom;
  const x = (v) => CHART.left + (wide * (v - low)) / (high - low || 1);
  const y = (v) => CHART.top + tall * (1 - (v - bottom) / (top - bottom));
  for (const v of ticks(bottom, top)) {
    add(svg, "path", { class: "grid", d: `M${CHART.left} ${y(v)}h${wide}` });
    add(svg, "text", { x: CHART.left - 6, y: y(v) + 4, class: "end" }, String(v));
  }
  for (const v of ticks(low, high)) add(svg, "text", { x: x(v), y: CHART.height - 26, class: "middle" }, String(v));
  add(svg, "text", { x: CHART.left + wide / 2, y: CHART.height - 6, class: "middle" }, axes.x);
  const name = { transform: `translate(14 ${CHART.top + tall / 2}) rotate(-90)`, class: "middle" };
  add(svg, "text", name, axes.y);
  if (position.marker !== null) {
    add(svg, "path", { class: "marker", d: `M${x(position.marker)} ${CHART.top}v${tall}` });
  }
  position.lines.forEach((line, i) => {
    const points = (values) => line.x.map((v, j) => `${x(v).toFixed(1)} ${y(values[j]).toFixed(1)}`);
    if (line.low) {
      const band = [...points(line.low), ...points(line.high).reverse()];
      add(svg, "path", { class: `band line-${i % COLOURS}`, d: `M${band.join("L")}Z` });
    }
    add(svg, "path", { class: `stroke line-${i % COLOURS}`, d: `M${points(line.y).join("L")}` });
  });
  svg.setAttribute("aria-label", `${axes.y} against ${axes.x}: ${position.note}`);
  const key = make(parent, "div", "explorer-key");
  position.lines.forEach((line, i) => make(make(key, "span", `line-${i % COLOURS}`), "i").after(line.name));
}

function bars(parent, position, largest) {
  for (const bar of position.bars) {
    const row = make(parent, "div", "explorer-bar");
    make(row, "span", "", bar.name);
    make(make(row, "span", "track"), "i").style.width = `${(100 * Math.max(0, bar.value)) / largest}%`;
    make(row, "b", "", bar.text);
  }
}

function render({ model, el }) {
  el.classList.add("explorer");
  make(el, "div", "explorer-title", model.get("title"));
  const controls = make(el, "div", "explorer-controls");
  const groups = model.get("groups");
  const put = (values) => {
    for (const [name, value] of Object.entries(values)) model.set(name, value);
    model.save_changes();
  };
  const menu = document.createElement("select");
  if (groups.length > 1) {
    const box = make(controls, "label");
    make(box, "span", "", model.get("choice"));
    box.append(menu);
    groups.forEach((group, i) => make(menu, "option", "", group.name).setAttribute("value", i));
    menu.addEventListener("change", () => {
      const last = groups[Number(menu.value)].positions.length - 1;
      put({ group: Number(menu.value), position: Math.min(model.get("position"), last) });
    });
  }
  const box = make(controls, "label");
  make(box, "span", "", model.get("dial"));
  const input = box.appendChild(document.createElement("input"));
  Object.assign(input, { type: "range", min: 0, step: 1 });
  input.addEventListener("input", () => put({ position: Number(input.value) }));
  const value = make(box, "output");
  const pictures = make(el, "div", "explorer-pictures small");
  const lines = make(el, "div");
  const table = make(el, "div");
  const note = make(el, "p", "explorer-legend");
  note.setAttribute("aria-live", "polite");

  const show = () => {
    const positions = groups[model.get("group")].positions;
    const position = positions[model.get("position")];
    menu.value = model.get("group");
    input.max = positions.length - 1;
    input.value = model.get("position");
    input.setAttribute("aria-valuetext", position.label);
    value.textContent = position.label;
    for (const part of [pictures, lines, table]) part.replaceChildren();
    for (const shown of position.pictures) {
      const figure = make(pictures, "figure");
      Object.assign(figure.appendChild(document.createElement("img")), {
        src: model.get("images")[shown.image], alt: shown.caption });
      make(figure, "figcaption", "", shown.caption);
    }
    if (position.lines.length) chart(lines, position, model.get("axes"));
    bars(table, position, model.get("largest"));
    note.textContent = position.note;
  };
  model.on("change:group change:position", show);
  show();
}
export default { render };
