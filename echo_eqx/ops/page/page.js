"use strict";

// Curves of all checked runs, and samples and settings of one. Every two seconds the page asks for
// what is new; a curve comes in buckets, and all but its last bucket stay as they are.

const REFRESH_MS = 2000;
const SMOOTHING = 0.95; // of the running mean over buckets
const CHARTS = [
  { field: "loss", title: "Loss", note: "raw, and smoothed over about 20 points", smooth: true },
  { field: "eval_loss", title: "Evaluation loss", markers: true },
  { field: "samples_per_second", title: "Throughput", note: "samples/s", smooth: true, zero: true },
  { field: "step_time_s", title: "Step time", note: "seconds", smooth: true, zero: true },
  {
    field: "data_wait_fraction",
    title: "Waiting for data",
    note: "% of step time",
    scale: 100,
    smooth: true,
    zero: true,
  },
  { field: "grad_norm", title: "Gradient norm", smooth: true },
  { field: "lr", title: "Learning rate", zero: true },
  { field: "skipped_updates", title: "Skipped updates", note: "so far", zero: true },
  { field: "broken_records", title: "Skipped records", note: "so far", zero: true },
  {
    field: "peak_memory_bytes",
    title: "Device memory",
    note: "peak, GiB",
    scale: 1 / 2 ** 30,
    zero: true,
  },
];
// Readable on light and dark backgrounds.
const COLORS =
  ["#2f81e0", "#d9692f", "#2f9e55", "#9a5fe0", "#d94f86", "#1f98ad", "#a8822a", "#77879a"];

const element = (id) => document.getElementById(id);
const plotlyLoaded = new Promise((done) => addEventListener("DOMContentLoaded", done));
const runs = new Map(); // name -> what is known of the run, see addRun
const stale = new Set(); // fields whose chart must be drawn again
const redraw = () => CHARTS.forEach((chart) => stale.add(chart.field));

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

async function ask(path, parameters = {}) {
  const answer = await fetch(`${path}?${new URLSearchParams(parameters)}`);
  if (!answer.ok) throw new Error(answer.statusText);
  return answer.json();
}

function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${(seconds / 3600).toFixed(1)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

// Whether a run is alive: reports come regularly, though evaluating and saving take a while.
function liveness({ step, num_steps, age, every, left, saved }) {
  if (step === null) return ["waiting", "no step yet"];
  const place = `step ${step}${num_steps ? ` of ${num_steps}` : ""}`;
  if (num_steps && step >= num_steps) return ["finished", `finished, ${place}`];
  if (saved) return ["stopped", `stopped and saved, ${place}`];
  const ago = `${place}, reported ${duration(age)} ago`;
  if (!every) return [age < 600 ? "running" : "late", ago];
  const wait = every - age;
  const next = wait >= 0 ? `next in ${duration(wait)}` : `next expected ${duration(-wait)} ago`;
  if (age > Math.max(60, 5 * every)) return ["late", `silent, ${ago}, ${next}`];
  const end = left === null ? "" : `, about ${duration(left)} left`;
  return ["running", `running, ${ago}, ${next}${end}`];
}

const color = (run) => COLORS[run.number % COLORS.length];

function addRun(name) {
  // Curves of many runs at once are unreadable, so only the first few are checked.
  const run = { number: runs.size, shown: runs.size < 8, version: 0, read: 0, curves: {} };
  const box = make("input", { type: "checkbox", checked: run.shown });
  box.addEventListener("change", () => {
    run.shown = box.checked;
    redraw();
    refresh();
  });
  run.title = make("b", { textContent: name });
  run.line = make("span");
  run.problems = make("span", { className: "problems" });
  const lines = make("div", {}, run.title, run.line, run.problems);
  run.card = make("label", { className: "run" }, box, lines);
  run.option = make("option", { value: name, textContent: name });
  element("runs").append(run.card);
  element("run").append(run.option);
  runs.set(name, run);
}

function showRuns(overview) {
  const names = overview.runs.map((status) => status.name);
  for (const [name, run] of runs) {
    if (names.includes(name)) continue;
    run.card.remove();
    run.option.remove();
    runs.delete(name);
    redraw();
  }
  for (const status of overview.runs) {
    if (!runs.has(status.name)) addRun(status.name);
    const run = runs.get(status.name);
    const [kind, text] = liveness(status);
    const notes = [text];
    if (run.shown && run.read < 1) notes.push(`${Math.floor(run.read * 100)}% read`);
    if (run.unreadable) notes.push(`${run.unreadable} lines cannot be read`);
    run.line.textContent = notes.join("; ");
    run.line.className = kind;
    run.problems.textContent = status.problems.join("; ");
    run.title.style.borderColor = color(run);
  }
  // The first run with samples, unless the user chose another.
  const first = overview.runs.find((status) => status.samples !== null);
  if (!runChosen && first) element("run").value = first.name;
  const disk = `${(overview.disk_free_bytes / 2 ** 30).toFixed(1)} GiB of disk free`;
  element("state").textContent = runs.size ? disk : `There is no run yet. ${disk}`;
  for (const id of ["listen", "charts", "settings"]) element(id).hidden = !runs.size;
}

async function readCurves(name, run) {
  const have = Object.entries(run.curves).map(([field, c]) => `${field}:${c.stride}:${c.full}`);
  const news = await ask("data.json", { run: name, version: run.version, have: have.join() });
  if (news.version !== run.version) {
    Object.keys(run.curves).forEach((field) => stale.add(field));
    run.curves = {};
  }
  Object.assign(run, { version: news.version, read: news.read, unreadable: news.unreadable });
  for (const [field, part] of Object.entries(news.curves)) {
    const known = run.curves[field] ?? {};
    for (const key of ["step", "mean", "low", "high"]) {
      part[key] = (known[key] ?? []).slice(0, part.start).concat(part[key] ?? []);
    }
    run.curves[field] = part;
    stale.add(field);
  }
}

const scaled = (values, scale) => values.map((value) => value && value * scale);

// A bucket is drawn as a vertical line from its lowest to its highest value.
function raw(curve, scale) {
  if (curve.stride === 1) return { x: curve.step, y: scaled(curve.mean, scale) };
  const y = curve.low.flatMap((low, i) => [low, curve.high[i]]);
  return { x: curve.step.flatMap((step) => [step, step]), y: scaled(y, scale) };
}

function smoothed(curve, scale) {
  let sum = 0;
  let weight = 0;
  const y = curve.mean.map((value) => {
    if (value === null) return null;
    sum = SMOOTHING * sum + (1 - SMOOTHING) * value;
    weight = SMOOTHING * weight + (1 - SMOOTHING);
    return (scale * sum) / weight;
  });
  return { x: curve.step, y };
}

async function draw(chart) {
  const traces = [];
  for (const [name, run] of runs) {
    const curve = run.curves[chart.field];
    if (!run.shown || !curve?.mean.some((value) => value !== null)) continue;
    const add = (points, name, width, opacity) => {
      const mode = curve.step.length < 2 || chart.markers ? "lines+markers" : "lines";
      traces.push({ ...points, name, mode, opacity, line: { color: color(run), width } });
    };
    const scale = chart.scale ?? 1;
    add(raw(curve, scale), name, 1.5, chart.smooth ? 0.35 : 1);
    if (chart.smooth) add(smoothed(curve, scale), `${name}, smoothed`, 2.5, 1);
  }
  const plot = element(`plot-${chart.field}`);
  plot.parentElement.hidden = !traces.length;
  if (!traces.length) return;
  const style = getComputedStyle(plot.parentElement);
  const edge = style.borderTopColor;
  const axis = { gridcolor: edge, zerolinecolor: edge, automargin: true };
  const layout = {
    uirevision: "kept", // a refresh keeps the zoom
    showlegend: false,
    margin: { l: 48, r: 12, t: 12, b: 36 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: style.color, size: 12 },
    hovermode: "closest",
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", // a finger scrolls the page
    xaxis: { ...axis, title: { text: "step" } },
    yaxis: { ...axis, rangemode: chart.zero ? "tozero" : "normal" },
  };
  const settings = { responsive: true, displaylogo: false, displayModeBar: false };
  await Plotly.react(plot, traces, layout, settings);
}

async function drawStale() {
  await plotlyLoaded;
  for (const chart of CHARTS) {
    if (!stale.delete(chart.field)) continue;
    await draw(chart);
    await new Promise(setTimeout); // the browser stays responsive
  }
}

// Text that did not change is left alone: the user may be selecting in it.
function setText(id, text) {
  if (element(id).textContent !== text) element(id).textContent = text;
}

function player(label, url) {
  const audio = make("audio", { controls: true, preload: "metadata", src: url });
  return make("label", { textContent: label }, audio);
}

let samplesShown = "";

async function showSamples(name, step) {
  const found = await ask("samples.json", { run: name, step });
  const text = JSON.stringify([name, found]);
  if (text === samplesShown) return;
  samplesShown = text;
  element("step").replaceChildren(
    ...found.steps.map((value) => make("option", { value, textContent: value })),
  );
  element("step").value = found.step ?? "";
  element("step-label").hidden = !found.steps.length;
  const cards = found.samples.map((row) => {
    const url = (end) => `samples/${encodeURIComponent(name)}/${found.step}/${row.index}${end}`;
    const players = make("div", { className: "players" });
    if (row.wav) players.append(player("by the model", url(`.wav?${row.wav}`)));
    if (row.original) players.append(player("original", url(`.original.wav?${row.original}`)));
    if (row.ref) players.append(player("reference voice", url(`.ref.wav?${row.ref}`)));
    const text = make("p", { textContent: row.text ?? "" });
    return make("article", { className: "sample" }, text, players);
  });
  if (found.count > cards.length) cards.push(`${cards.length} of ${found.count} are shown`);
  element("samples").replaceChildren(...(cards.length ? cards : ["none yet"]));
}

// The newest samples, unless the user chose others or is listening.
async function showDetails() {
  const name = element("run").value;
  if (!name) return;
  const about = await ask("about.json", { run: name });
  setText("settings-run", name);
  setText("config", about.config ?? "");
  setText("environment", about.environment ?? "");
  const playing = [...document.querySelectorAll("audio")].some((audio) => !audio.paused);
  if (!playing) await showSamples(name, chosenStep);
}

let chosenStep = "";
let runChosen = false;
element("run").addEventListener("change", () => {
  runChosen = true;
  chosenStep = "";
  refresh();
});
element("step").addEventListener("change", () => {
  const select = element("step");
  chosenStep = select.selectedIndex === 0 ? "" : select.value;
  refresh();
});

let timer = 0;
let busy = false;
let again = false;

async function refresh() {
  again = busy;
  if (busy) return;
  busy = true;
  clearTimeout(timer);
  let wait = REFRESH_MS;
  try {
    showRuns(await ask("runs.json"));
    const shown = [...runs].filter(([, run]) => run.shown);
    await Promise.all(shown.map(([name, run]) => readCurves(name, run)));
    if (shown.some(([, run]) => run.read < 1)) wait = 0;
    await showDetails();
    await drawStale();
  } catch (error) {
    element("state").textContent = `No answer from the monitor: ${error.message}`;
  }
  busy = false;
  if (again) wait = 0;
  timer = setTimeout(() => document.hidden || refresh(), wait);
}

for (const chart of CHARTS) {
  const title = make("h2", {}, `${chart.title} `, make("small", { textContent: chart.note ?? "" }));
  const plot = make("div", { id: `plot-${chart.field}`, className: "plot" });
  element("charts").append(
    make("div", { className: chart.field === "loss" ? "chart first" : "chart" }, title, plot),
  );
}
redraw();
history.replaceState(null, "", location.pathname); // from here on the cookie stands for the token
document.addEventListener("visibilitychange", () => document.hidden || refresh());
refresh();
