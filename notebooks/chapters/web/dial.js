// Stored pictures, lines and bars, one set for each position of a slider; menus choose between sliders.

const SVG = "http://www.w3.org/2000/svg";
const CHART = { width: 420, height: 240, left: 52, right: 28, top: 10, bottom: 46 };
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
  return Array.from({ length: count }, (_, i) => {
    const at = Number(((first + i) * step).toPrecision(6));
    return { at, text: String(at) };
  });
}

function chart(parent, position, axes) {
  const svg = add(parent, "svg", { viewBox: `0 0 ${CHART.width} ${CHART.height}`, role: "img" });
  const xs = [...position.lines.flatMap((line) => line.x), ...(axes.ticks || []).map((tick) => tick.at)];
  const [low, high] = [Math.min(...xs), Math.max(...xs)];
  const [bottom, top] = axes.limits;
  const wide = CHART.width - CHART.left - CHART.right;
  const tall = CHART.height - CHART.top - CHART.bottom;
  const x = (v) => CHART.left + (wide * (v - low)) / (high - low || 1);
  const y = (v) => CHART.top + tall * (1 - (Math.min(top, Math.max(bottom, v)) - bottom) / (top - bottom));
  for (const { at, text } of ticks(bottom, top)) {
    add(svg, "path", { class: "grid", d: `M${CHART.left} ${y(at)}h${wide}` });
    add(svg, "text", { x: CHART.left - 6, y: y(at) + 4, class: "end" }, text);
  }
  for (const { at, text } of axes.ticks || ticks(low, high)) {
    add(svg, "text", { x: x(at), y: CHART.height - 28, class: "middle" }, text);
  }
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
  position.lines.forEach((line, i) => {
    make(make(key, "span"), "i", `stroke-${i % COLOURS} line-${i % COLOURS}`).after(line.name);
  });
}

function bars(parent, position, title) {
  if (position.bars.length) make(parent, "div", "explorer-legend", title);
  for (const bar of position.bars) {
    const row = make(parent, "div", "explorer-bar");
    make(row, "span", "", bar.name);
    make(make(row, "span", "track"), "i").style.width = `${100 * Math.max(0, bar.value)}%`;
    make(row, "b", "", bar.text);
  }
}

function picture(parent, source, caption) {
  const figure = make(parent, "figure");
  Object.assign(figure.appendChild(document.createElement("img")), { src: source, alt: caption });
  make(figure, "figcaption", "", caption);
}

function labelled(parent, name, control) {
  const box = make(parent, "label");
  make(box, "span", "", name);
  box.append(control);
  return box;
}

// A box that asks the kernel for a value between the stored ones; it stays hidden where no kernel answers.
function live(parent, model, options, show) {
  const form = make(parent, "form", "explorer-live");
  form.hidden = true;
  const input = document.createElement("input");
  Object.assign(input, { type: "number", step: "any", required: true });
  const name = labelled(form, "", input).firstChild;
  const button = make(form, "button", "", "Compute");
  const answer = make(form, "output");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    answer.textContent = "Computing ...";
    model.send({ options: options(), value: Number(input.value) });
  });
  model.on("msg:custom", (message) => {
    if (message.live) {
      const { label, start, low, high } = message.live;
      name.textContent = label;
      Object.assign(input, { value: start, min: low, max: high });
      form.hidden = false;
    }
    if (message.position || message.error) answer.textContent = message.error || "";
    if (message.position) show(message.position, message.images);
  });
  button.type = "submit";
  model.send({ live: true });
}

function render({ model, el }) {
  el.classList.add("explorer");
  make(el, "div", "explorer-title", model.get("title"));
  make(el, "p", "explorer-legend", model.get("caption"));
  const controls = make(el, "div", "explorer-controls");
  const groups = model.get("groups");
  const put = (values) => {
    for (const [name, value] of Object.entries(values)) model.set(name, value);
    model.save_changes();
  };
  const menus = model.get("menus").map(({ name, options }) => {
    const menu = document.createElement("select");
    options.forEach((option, i) => make(menu, "option", "", option).setAttribute("value", i));
    if (options.length > 1) labelled(controls, name, menu);
    menu.addEventListener("change", () => {
      const group = menus.reduce((place, one) => place * one.options.length + Number(one.value), 0);
      put({ group, position: Math.min(model.get("position"), groups[group].length - 1) });
    });
    return menu;
  });
  const input = document.createElement("input");
  Object.assign(input, { type: "range", min: 0, step: 1 });
  input.addEventListener("input", () => put({ position: Number(input.value) }));
  const value = make(labelled(controls, model.get("dial"), input), "output");
  const note = make(el, "p", "explorer-note");
  note.setAttribute("aria-live", "polite");
  const parts = ["explorer-pictures small", "explorer-chart", ""].map((name) => make(el, "div", name));

  const draw = (position, images) => {
    for (const part of parts) part.replaceChildren();
    for (const { image, caption } of position.pictures) picture(parts[0], images[image], caption);
    if (position.lines.length) chart(parts[1], position, model.get("axes"));
    bars(parts[2], position, model.get("bars"));
    note.textContent = position.note;
  };
  const show = () => {
    let rest = model.get("group");
    for (const menu of [...menus].reverse()) {
      menu.value = rest % menu.options.length;
      rest = Math.floor(rest / menu.options.length);
    }
    const positions = groups[model.get("group")];
    const position = positions[model.get("position")];
    input.max = positions.length - 1;
    input.value = model.get("position");
    input.setAttribute("aria-valuetext", position.label);
    value.textContent = position.label;
    draw(position, model.get("images"));
  };
  live(el, model, () => menus.map((menu) => menu.selectedOptions[0].textContent), draw);
  model.on("change:group change:position", show);
  show();
}
export default { render };
