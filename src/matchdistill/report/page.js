"use strict";
const element = (id) => document.getElementById(id);
const dark = matchMedia("(prefers-color-scheme: dark)");
const templates = JSON.parse(element("templates").textContent);
let printing = false;
const template = () => templates[dark.matches && !printing ? "dark" : "white"];
const plots = [...document.querySelectorAll(".plot")];

async function load() {
  const bytes = Uint8Array.from(atob(element("library").textContent), (letter) => letter.charCodeAt(0));
  const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(unpacked).text();
  document.head.append(script);
  // A chart is drawn when it comes into view, at the size that it has then.
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((entry) => entry.isIntersecting)) {
      observer.unobserve(entry.target);
      draw(entry.target);
    }
  }, { rootMargin: "300px" });
  for (const plot of plots) observer.observe(plot);
}

function draw(plot) {
  if (!window.Plotly || plot.classList.contains("js-plotly-plot")) return;
  const figure = figureOf(plot);
  const layout = { ...figure.layout, template: template() };
  Plotly.newPlot(plot, figure.data, layout, { responsive: true, displaylogo: false, displayModeBar: false });
  plot.on("plotly_afterplot", () => scalable(plot));
  scalable(plot);
}

const figures = new Map();
function figureOf(plot) {
  if (!figures.has(plot)) figures.set(plot, JSON.parse(plot.querySelector("script").textContent));
  return figures.get(plot);
}

// On paper a drawing is scaled to the width that there is, which needs its own size.
function scalable(plot) {
  for (const svg of plot.querySelectorAll(".main-svg")) {
    const [width, height] = [svg.getAttribute("width"), svg.getAttribute("height")];
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    plot.style.setProperty("--shape", `${width} / ${height}`);
  }
}

dark.addEventListener("change", recolour);
function recolour() {
  for (const plot of document.querySelectorAll(".js-plotly-plot")) Plotly.relayout(plot, { template: template() });
}

// Print shows everything: all positions and images, each chart drawn, in black on white.
const opened = [];
addEventListener("beforeprint", () => {
  printing = true;
  for (const part of document.querySelectorAll("[data-of][hidden]:not(.maps)")) {
    part.hidden = false;
    opened.push(() => { part.hidden = true; });
  }
  for (const details of document.querySelectorAll("details:not(.values):not([open])")) {
    details.open = true;
    opened.push(() => { details.open = false; });
  }
  for (const plot of plots) draw(plot);
  if (dark.matches && window.Plotly) recolour();
});
addEventListener("afterprint", () => {
  printing = false;
  for (const close of opened.splice(0)) close();
  if (dark.matches && window.Plotly) recolour();
});

for (const choice of document.querySelectorAll("select.choice")) {
  const choose = () => {
    for (const each of document.querySelectorAll(`[data-of="${choice.dataset.group}"]`)) {
      each.hidden = each.dataset.value !== choice.value;
      // What was drawn before may have had another width.
      if (!each.hidden) for (const plot of each.querySelectorAll(".js-plotly-plot")) Plotly.Plots.resize(plot);
    }
  };
  choice.addEventListener("change", choose);
  choose(); // a browser may keep the choice when the page is loaded again
}

function save(name, address) {
  const link = document.createElement("a");
  [link.download, link.href] = [name, address];
  link.click();
}
const cell = (value) => {
  const text = value === null || value === undefined ? "" : String(value);
  return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
};
const saveRows = (name, rows) =>
  save(`${name}.csv`, URL.createObjectURL(new Blob([rows.map((row) => row.map(cell).join(",") + "\n").join("")], { type: "text/csv" })));
const nameOf = (figure) => (figure.querySelector(".title")?.firstChild?.textContent ?? "chart").trim().toLowerCase().replaceAll(/\W+/g, "-");
// Names are escaped for Plotly alone.
const plain = (text) => new DOMParser().parseFromString(String(text), "text/html").documentElement.textContent;

// Plotly may write many numbers as bytes.
function list(values) {
  if (!values || values.bdata === undefined) return values;
  const kinds = { f8: Float64Array, f4: Float32Array, i1: Int8Array, u1: Uint8Array, i2: Int16Array, u2: Uint16Array, i4: Int32Array, u4: Uint32Array };
  const bytes = Uint8Array.from(atob(values.bdata), (letter) => letter.charCodeAt(0));
  const flat = [...new kinds[values.dtype](bytes.buffer)];
  if (values.shape === undefined) return flat;
  const columns = Number(String(values.shape).split(",").at(-1));
  return Array.from({ length: flat.length / columns }, (_, row) => flat.slice(row * columns, (row + 1) * columns));
}

function rowsOf(figure) {
  const rows = [["series", "x", "y", "value"]];
  for (const trace of figure.data) {
    if (trace.hoverinfo === "skip") continue;
    const [x, y, z] = [list(trace.x), list(trace.y), list(trace.z)];
    if (z) z.forEach((row, i) => row.forEach((value, j) => rows.push(["", x ? plain(x[j]) : j, y ? plain(y[i]) : i, value])));
    else (y ?? x).forEach((_, i) => rows.push([plain(trace.name ?? ""), x ? plain(x[i] ?? "") : i, y ? plain(y[i] ?? "") : "", ""]));
  }
  return rows;
}

for (const button of document.querySelectorAll("button.csv")) {
  const figure = button.closest("figure");
  button.addEventListener("click", () => saveRows(nameOf(figure), rowsOf(figureOf(figure.querySelector(".plot")))));
}
for (const button of document.querySelectorAll("button.png")) {
  const figure = button.closest("figure");
  button.addEventListener("click", async () => {
    const plot = figure.querySelector(".plot");
    draw(plot);
    const background = getComputedStyle(document.body).backgroundColor;
    const { data, layout } = plot;
    const shown = { data, layout: { ...layout, paper_bgcolor: background, plot_bgcolor: background } };
    save(`${nameOf(figure)}.png`, await Plotly.toImage(shown, { format: "png", scale: 2, width: plot.clientWidth, height: plot.clientHeight }));
  });
}
for (const table of document.querySelectorAll("table.download")) {
  const button = document.createElement("button");
  [button.type, button.textContent] = ["button", "CSV"];
  const name = table.parentElement.getAttribute("aria-label").replaceAll(" ", "-");
  button.setAttribute("aria-label", `download as CSV: ${name}`);
  const tools = document.createElement("div");
  tools.className = "tools below";
  tools.append(button);
  table.parentElement.after(tools);
  button.addEventListener("click", () =>
    saveRows(name, [...table.rows].map((row) => [...row.cells].map((each) => each.innerText.replaceAll(/\s+/g, " ").trim()))));
}

// Whoever cannot see a scroll bar is told that there is more.
function mark() {
  for (const part of document.querySelectorAll(".scroll, .maps")) part.classList.toggle("wider", part.scrollWidth > part.clientWidth + 1);
}
mark();
addEventListener("resize", mark);
load();
