// A family P(y | omega) of three answers, omega in the plane: its Fisher metric and FI, all computed here.

const SVG = "http://www.w3.org/2000/svg";
const ANSWERS = ["A", "B", "C"];
const CORNERS = [[20, 250], [280, 250], [150, 25]]; // of the triangle, in the picture's units
const PLANE = { left: 340, top: 20, side: 240, reach: 2, box: [310, 0, 290, 300] }; // omega from -reach to reach
const RADIUS = 0.25; // information length of the ellipse
const STEPS = 120; // of a drawn curve

const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
const softmax = (z) => {
  const powers = z.map((x) => Math.exp(x - Math.max(...z)));
  const total = powers.reduce((a, b) => a + b);
  return powers.map((x) => x / total);
};

function probabilities(family, omega) {
  const hidden = family.inner.map((row, i) => Math.tanh(dot(row, omega) + family.shift[i]));
  return [softmax(family.outer.map((row, k) => family.bias[k] + dot(row, hidden))), hidden];
}

// P, class gradients s, metric G, and FI along `direction`, of the pair, and damped; see method 1 and 1a.
export function measure(family, omega, degrees, lambda) {
  const [P, hidden] = probabilities(family, omega);
  const slope = (k, d) => hidden.reduce((sum, h, i) => sum + family.outer[k][i] * (1 - h * h) * family.inner[i][d], 0);
  const raw = P.map((_, k) => [slope(k, 0), slope(k, 1)]);
  const mean = [0, 1].map((d) => dot(P, raw.map((row) => row[d])));
  const s = raw.map((row) => [row[0] - mean[0], row[1] - mean[1]]);
  const G = [0, 1].map((i) => [0, 1].map((j) => P.reduce((sum, p, k) => sum + p * s[k][i] * s[k][j], 0)));
  const chosen = P.indexOf(Math.max(...P));
  const df = s[chosen].map((x) => -x);
  const angle = (degrees * Math.PI) / 180;
  const u = [Math.cos(angle), Math.sin(angle)];
  const length2 = dot(u, [dot(G[0], u), dot(G[1], u)]);
  const pair = (damp) => {
    const [a, b, c] = [G[0][0] + damp, G[0][1], G[1][1] + damp];
    const determinant = a * c - b * b;
    return (c * df[0] ** 2 - 2 * b * df[0] * df[1] + a * df[1] ** 2) / determinant;
  };
  const odds = P.reduce((sum, p, k) => sum + (k === chosen ? 0 : p), 0) / P[chosen];
  return { P, G, df, u, chosen, length2, along: dot(df, u) ** 2 / length2, pair: pair(0), damped: pair(lambda), odds };
}

const onTriangle = (P) => [0, 1].map((i) => dot(P, CORNERS.map((corner) => corner[i])));
const onPlane = (omega) => {
  const scale = PLANE.side / (2 * PLANE.reach);
  return [PLANE.left + (omega[0] + PLANE.reach) * scale, PLANE.top + (PLANE.reach - omega[1]) * scale];
};
const fromPlane = (x, y) => {
  const scale = (2 * PLANE.reach) / PLANE.side;
  const clip = (v) => Math.min(PLANE.reach, Math.max(-PLANE.reach, Math.round(v * 20) / 20));
  return [clip((x - PLANE.left) * scale - PLANE.reach), clip(PLANE.reach - (y - PLANE.top) * scale)];
};
const path = (points, close = "") => "M" + points.map((p) => p.map((v) => v.toFixed(1)).join(" ")).join("L") + close;

// Points of the ellipse of information length RADIUS around omega.
function ellipse(G, omega) {
  const middle = (G[0][0] + G[1][1]) / 2;
  const apart = Math.hypot((G[0][0] - G[1][1]) / 2, G[0][1]);
  const turn = 0.5 * Math.atan2(2 * G[0][1], G[0][0] - G[1][1]);
  const axes = [middle + apart, middle - apart].map((mu) => RADIUS / Math.sqrt(Math.max(mu, 1e-9)));
  return Array.from({ length: STEPS }, (_, i) => {
    const t = (2 * Math.PI * i) / STEPS;
    const [x, y] = [axes[0] * Math.cos(t), axes[1] * Math.sin(t)];
    return [omega[0] + x * Math.cos(turn) - y * Math.sin(turn), omega[1] + x * Math.sin(turn) + y * Math.cos(turn)];
  });
}

function add(parent, name, attributes = {}, text = "") {
  const node = parent.appendChild(document.createElementNS(SVG, name));
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}

// Two pictures of one coordinate system, side by side where there is room.
function drawing(el) {
  const row = el.appendChild(document.createElement("div"));
  row.className = "explorer-pictures";
  const left = add(row, "svg", { viewBox: "0 0 300 300", role: "img" });
  add(left, "path", { class: "frame", d: path(CORNERS, "Z") });
  const places = [[8, 268], [283, 268], [145, 18]];
  ANSWERS.forEach((letter, k) => add(left, "text", { x: places[k][0], y: places[k][1] }, letter));
  add(left, "text", { x: 150, y: 290, class: "middle" }, "P, a point among the answers");
  const right = add(row, "svg", { viewBox: PLANE.box.join(" "), role: "img" });
  const clip = add(right, "clipPath", { id: `plane-${crypto.randomUUID()}` });
  const square = { x: PLANE.left, y: PLANE.top, width: PLANE.side, height: PLANE.side };
  add(clip, "rect", square);
  add(right, "rect", { class: "frame plane", ...square });
  add(right, "text", { x: PLANE.left + PLANE.side / 2, y: 280, class: "middle" }, "ω₁, from −2 to 2");
  add(right, "text", { transform: `translate(${PLANE.left - 8} 140) rotate(-90)`, class: "middle" }, "ω₂, from −2 to 2");
  const plane = add(right, "g", { "clip-path": `url(#${clip.id})` });
  const paths = (parent, names) => Object.fromEntries(names.map((name) => [name, add(parent, "path", { class: name })]));
  return {
    left: { svg: left, ...paths(left, ["line", "ring"]), point: add(left, "circle", { class: "point", r: 5 }) },
    right: { svg: right, ...paths(plane, ["line", "ring", "gradient"]), point: add(plane, "circle", { class: "point", r: 5 }) },
  };
}

function slider(parent, label, range, changed) {
  const box = parent.appendChild(document.createElement("label"));
  const name = box.appendChild(document.createElement("span"));
  const input = box.appendChild(document.createElement("input"));
  const value = box.appendChild(document.createElement("output"));
  Object.assign(input, { type: "range", ...range });
  name.textContent = label;
  input.addEventListener("input", () => changed(Number(input.value)));
  return (number, text) => {
    input.value = number;
    input.setAttribute("aria-valuetext", text);
    value.textContent = text;
  };
}

function render({ model, el }) {
  el.classList.add("explorer");
  const title = el.appendChild(document.createElement("div"));
  title.className = "explorer-title";
  title.textContent = model.get("title");
  const picture = drawing(el);
  const controls = el.appendChild(document.createElement("div"));
  controls.className = "explorer-controls";
  const legend = el.appendChild(document.createElement("p"));
  legend.className = "explorer-legend";
  legend.textContent =
    "Dot: the perturbation, and the answers it gives; click or drag in the square to move it. Blue line: all steps " +
    "along u. Dashed: steps of information length " + RADIUS + ". Thick orange: the gradient of −log P of the answer.";
  const table = el.appendChild(document.createElement("div"));
  table.className = "explorer-numbers";
  table.setAttribute("aria-live", "polite");

  const put = (name, value) => {
    model.set(name, value);
    model.save_changes();
  };
  const place = { min: -PLANE.reach, max: PLANE.reach, step: 0.05 };
  const shown = {
    first: slider(controls, "ω₁", place, (v) => put("omega", [v, model.get("omega")[1]])),
    second: slider(controls, "ω₂", place, (v) => put("omega", [model.get("omega")[0], v])),
    degrees: slider(controls, "direction u", { min: 0, max: 179, step: 1 }, (v) => put("degrees", v)),
    decade: slider(controls, "damping λ", { min: -6, max: 1, step: 0.25 }, (v) => put("decade", v)),
  };
  const move = (event) => {
    const box = picture.right.svg.getBoundingClientRect();
    const scale = PLANE.box[2] / box.width;
    const [x, y] = [PLANE.box[0] + (event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    if (x >= PLANE.left && x <= PLANE.left + PLANE.side && y >= PLANE.top && y <= PLANE.top + PLANE.side) {
      put("omega", fromPlane(x, y));
    }
  };
  picture.right.svg.addEventListener("pointerdown", move);
  picture.right.svg.addEventListener("pointermove", (event) => event.buttons && move(event));

  const show = () => {
    const family = model.get("family");
    const [omega, degrees, lambda] = [model.get("omega"), model.get("degrees"), 10 ** model.get("decade")];
    const m = measure(family, omega, degrees, lambda);
    const image = (points) => points.map((q) => onTriangle(probabilities(family, q)[0]));
    const line = Array.from({ length: STEPS + 1 }, (_, i) => {
      const t = (8 * i) / STEPS - 4;
      return [omega[0] + t * m.u[0], omega[1] + t * m.u[1]];
    });
    const ring = ellipse(m.G, omega);
    picture.left.line.setAttribute("d", path(image(line)));
    picture.left.ring.setAttribute("d", path(image(ring), "Z"));
    picture.right.line.setAttribute("d", path(line.map(onPlane)));
    picture.right.ring.setAttribute("d", path(ring.map(onPlane), "Z"));
    const size = Math.hypot(...m.df) || 1;
    const tip = [omega[0] + (0.8 * m.df[0]) / size, omega[1] + (0.8 * m.df[1]) / size];
    picture.right.gradient.setAttribute("d", path([omega, tip].map(onPlane)));
    for (const [circle, at] of [[picture.left.point, onTriangle(m.P)], [picture.right.point, onPlane(omega)]]) {
      circle.setAttribute("cx", at[0]);
      circle.setAttribute("cy", at[1]);
    }
    shown.first(omega[0], omega[0].toFixed(2));
    shown.second(omega[1], omega[1].toFixed(2));
    shown.degrees(degrees, `${degrees}°`);
    shown.decade(model.get("decade"), lambda.toPrecision(2));
    const numbers = {
      "P(A), P(B), P(C)": m.P.map((p) => p.toFixed(3)).join(", "),
      "information length of a unit step along u": Math.sqrt(m.length2).toFixed(3),
      "FI along u alone": m.along.toFixed(3),
      "FI of the pair, exact": m.pair.toFixed(3),
      "its ceiling, the odds against the answer": m.odds.toFixed(3),
      "FI of the pair, damped by λ": m.damped.toFixed(3),
    };
    table.replaceChildren(...Object.entries(numbers).map(([name, value]) => {
      const row = document.createElement("div");
      row.innerHTML = `<span>${name}</span><b>${value}</b>`;
      return row;
    }));
    picture.left.svg.setAttribute("aria-label",
      `A triangle whose corners are the answers; the point P is ${m.P.map((p) => p.toFixed(2)).join(", ")}.`);
    picture.right.svg.setAttribute("aria-label",
      `The plane of perturbations; FI along u is ${m.along.toFixed(3)} of at most ${m.odds.toFixed(3)}.`);
  };
  for (const name of ["omega", "degrees", "decade"]) model.on(`change:${name}`, show);
  show();
}
export default { render };
