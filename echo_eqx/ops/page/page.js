"use strict";

// Curves of all runs that are checked, and samples and settings of one. Every two seconds the page
// asks for what is new; a curve comes in buckets, of which all but the last stay as they are.

const REFRESH_MS = 2000;
const SMOOTHING = 0.95; // of the running mean over the points drawn
const LARGEST = 1e100; // beyond it an axis overflows, and the other runs' curves are gone
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
const COLORS = {
  light: ["#0b62c4", "#c2410c", "#15803d", "#7e22ce", "#b91c5c", "#0e7490", "#854d0e", "#475569"],
  dark: ["#6db3ff", "#ff9d5c", "#5fd68a", "#c9a0ff", "#ff8fb8", "#4fd1e5", "#e3c15b", "#a9b6c6"],
};

const element = (id) => document.getElementById(id);
const dark = matchMedia("(prefers-color-scheme: dark)");
const runs = new Map(); // name -> {shown, number, version, curves, read, unreadable, undrawn, failed}
const stale = new Set(CHARTS.map((chart) => chart.field));
let samplesShown = "";
let aboutShown = "";

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

async function ask(path, parameters = {}) {
  const answer = await fetch(`${path}?${new URLSearchParams(parameters)}`);
  if (!answer.ok) throw new Error((await answer.text()) || answer.statusText);
  return answer.json();
}

function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${(seconds / 3600).toFixed(1)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

// Whether a run is alive: reports come at a pace, though evaluation and saving take their time.
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

function color(run) {
  const colors = COLORS[dark.matches ? "dark" : "light"];
  return colors[run.number % colors.length];
}

function addRun(name) {
  // Many runs at once would be a tangle, so only the first are checked.
  const run = { shown: runs.size < 8, number: runs.size, curves: {}, version: 0, read: 0, undrawn: 0 };
  const box = make("input", { type: "checkbox", checked: run.shown });
  box.addEventListener("change", () => {
    run.shown = box.checked;
    CHARTS.forEach((chart) => stale.add(chart.field));
    refresh();
  });
  run.title = make("b", { textContent: name });
  run.line = make("span");
  run.trouble = make("span", { className: "trouble" });
  const lines = make("div", {}, run.title, run.line, run.trouble);
  run.card = make("label", { className: "run" }, box, lines);
  element("runs").append(run.card);
  element("run").append(make("option", { value: name, textContent: name }));
  runs.set(name, run);
}

function showRuns(overview) {
  const names = overview.runs.map((run) => run.name);
  for (const name of runs.keys()) {
    if (names.includes(name)) continue;
    runs.get(name).card.remove();
    [...element("run").options].find((option) => option.value === name)?.remove();
    runs.delete(name);
    CHARTS.forEach((chart) => stale.add(chart.field));
  }
  for (const status of overview.runs) {
    if (!runs.has(status.name)) addRun(status.name);
    const run = runs.get(status.name);
    const [kind, text] = liveness(status);
    const notes = [text];
    if (run.shown && run.read < 1) notes.push(`${Math.floor(run.read * 100)}% read`);
    if (run.undrawn) notes.push(`${run.undrawn} values are too large to be drawn`);
    if (run.unreadable) notes.push(`${run.unreadable} lines cannot be read`);
    run.line.textContent = notes.join("; ");
    run.line.className = kind;
    run.trouble.textContent = [...status.trouble, ...(run.failed ? [run.failed] : [])].join("; ");
    run.title.style.borderColor = color(run);
  }
  // The first run with samples, until the person chooses another.
  const select = element("run");
  const selected = overview.runs.find((run) => run.name === select.value);
  const heard = overview.runs.find((run) => run.samples !== null);
  if (!runChosen && heard && (selected?.samples ?? null) === null) select.value = heard.name;
  const free = overview.disk_free_bytes;
  const disk = free === null ? "" : `${(free / 2 ** 30).toFixed(1)} GiB of disk free`;
  element("state").textContent = runs.size ? disk : `There is no run yet. ${disk}`;
  for (const id of ["listen", "charts", "settings"]) element(id).hidden = !runs.size;
}

// What goes wrong with one run is told at it, and keeps no other from being shown.
async function readCurves(name, run) {
  try {
    await readNews(name, run);
    run.failed = null;
  } catch (error) {
    run.failed = `its curves cannot be read: ${error.message}`;
  }
}

async function readNews(name, run) {
  const have = Object.entries(run.curves).map(([field, c]) => `${field}:${c.stride}:${c.full}`);
  const news = await ask("data.json", { run: name, version: run.version, have: have.join() });
  if (news.version !== run.version) {
    Object.keys(run.curves).forEach((field) => stale.add(field));
    run.curves = {};
    run.undrawn = 0;
  }
  run.version = news.version;
  run.read = news.read;
  run.unreadable = news.unreadable;
  for (const [field, part] of Object.entries(news.curves)) {
    const known = run.curves[field];
    const join = (key) => [
      ...(known?.[key] ?? []).slice(0, part.start),
      ...(part[key] ?? []).map((value) => (Math.abs(value) > LARGEST ? null : value)),
    ];
    run.curves[field] = {
      stride: part.stride,
      full: part.full,
      step: join("step"),
      mean: join("mean"),
      low: join("low"),
      high: join("high"),
    };
    stale.add(field);
    run.undrawn += (part.mean ?? []).filter((value) => Math.abs(value) > LARGEST).length;
  }
}

// A bucket is drawn as an upright line from its lowest to its highest value.
function raw(curve, scale) {
  if (curve.stride === 1) return { x: curve.step, y: curve.mean.map((y) => y && y * scale) };
  const x = [];
  const y = [];
  curve.step.forEach((step, i) => {
    x.push(step, step);
    y.push(curve.low[i] && curve.low[i] * scale, curve.high[i] && curve.high[i] * scale);
  });
  return { x, y };
}

function smoothed(curve, scale) {
  let sum = 0;
  let weight = 0;
  const y = curve.mean.map((value) => {
    if (value === null) return null;
    sum = SMOOTHING * sum + (1 - SMOOTHING) * value * scale;
    weight = SMOOTHING * weight + (1 - SMOOTHING);
    return sum / weight;
  });
  return { x: curve.step, y };
}

function draw(chart) {
  const traces = [];
  for (const [name, run] of runs) {
    const curve = run.curves[chart.field];
    if (!run.shown || !curve?.mean.some((value) => value !== null)) continue;
    const base = { type: "scatter", name, line: { color: color(run), width: 1.5 } };
    const points = curve.step.length < 2 || chart.markers ? "lines+markers" : "lines";
    traces.push({
      ...base,
      ...raw(curve, chart.scale ?? 1),
      mode: points,
      opacity: chart.smooth ? 0.35 : 1,
    });
    if (chart.smooth) {
      traces.push({
        ...base,
        ...smoothed(curve, chart.scale ?? 1),
        mode: points,
        name: `${name}, smoothed`,
        line: { color: color(run), width: 2.5 },
      });
    }
  }
  const style = getComputedStyle(document.documentElement);
  const axis = {
    gridcolor: style.getPropertyValue("--edge"),
    zerolinecolor: style.getPropertyValue("--edge"),
    automargin: true,
  };
  const layout = {
    uirevision: "kept", // a refresh leaves the person's zoom
    showlegend: false,
    margin: { l: 48, r: 12, t: 12, b: 36 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: style.getPropertyValue("--text"), size: 12 },
    hovermode: "closest",
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", // a finger scrolls the page
    xaxis: { ...axis, title: { text: "step" } },
    yaxis: { ...axis, rangemode: chart.zero ? "tozero" : "normal" },
  };
  if (!traces.length) {
    layout.xaxis.visible = layout.yaxis.visible = false;
    layout.annotations = [{ text: "none reported", showarrow: false, x: 0.5, xref: "paper", y: 0.5, yref: "paper" }];
  }
  const settings = { responsive: true, displaylogo: false, displayModeBar: false };
  const plot = element(`plot-${chart.field}`);
  plot.querySelector(":scope > svg")?.remove();
  return Plotly.react(plot, traces, layout, settings);
}

// Until the browser has shown what was changed, unless no one looks.
function shown() {
  if (document.hidden) return null;
  return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
}

// A curve without axes, since a browser works on Plotly for a second or two when it first comes.
function sketch(chart) {
  const curves = [...runs.values()].map((run) => run.shown && run.curves[chart.field]);
  const points = curves.map((curve) =>
    curve ? curve.step.map((x, i) => [x, curve.mean[i]]).filter(([, y]) => y !== null) : [],
  );
  const span = (values) => {
    const low = values.reduce((a, b) => Math.min(a, b), Infinity);
    const high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    return (value) => (high > low ? (100 * (value - low)) / (high - low) : 50);
  };
  const across = span(points.flat().map(([x]) => x));
  const up = span([...points.flat().map(([, y]) => y), ...(chart.zero ? [0] : [])]);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 100 100");
  svg.setAttribute("preserveAspectRatio", "none");
  [...runs.values()].forEach((run, i) => {
    if (!points[i].length) return;
    const path = document.createElementNS(svg.namespaceURI, "path");
    path.setAttribute("d", `M${points[i].map(([x, y]) => `${across(x)} ${100 - up(y)}`).join("L")}`);
    path.style.stroke = color(run);
    svg.append(path);
  });
  element(`plot-${chart.field}`).replaceChildren(svg);
}

let plotly = null;

// Asked for only now: until it has run, nothing else does.
function loadPlotly() {
  plotly ??= new Promise((done, failed) => {
    const script = make("script", { src: "plotly.js", onload: done });
    script.onerror = () => {
      plotly = null;
      failed(new Error("plotly.js did not come"));
    };
    document.head.append(script);
  });
  return plotly;
}

async function drawStale() {
  if (!stale.size) return;
  if (!window.Plotly) {
    CHARTS.forEach(sketch);
    await shown();
    performance.mark("sketched");
    await loadPlotly();
  }
  for (const chart of CHARTS) {
    if (!stale.delete(chart.field)) continue;
    try {
      await draw(chart);
    } catch (error) {
      element(`plot-${chart.field}`).textContent = `cannot be drawn: ${error.message}`;
    }
    await shown();
    performance.mark("drawn");
  }
}

async function showAbout(name) {
  const about = await ask("about.json", { run: name });
  const text = JSON.stringify([name, about]);
  if (text === aboutShown) return;
  aboutShown = text;
  element("settings-run").textContent = name;
  element("config").textContent = JSON.stringify(about.config, null, 2);
  element("environment").textContent = JSON.stringify(about.environment, null, 2);
}

function player(label, url) {
  const audio = make("audio", { controls: true, preload: "metadata", src: url });
  return make("label", { textContent: label }, audio);
}

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

// The newest samples, unless the person chose others or listens.
async function showDetails() {
  const name = element("run").value;
  if (!name) return;
  await showAbout(name);
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
  if (busy) {
    again = true;
    return;
  }
  busy = true;
  clearTimeout(timer);
  let wait = REFRESH_MS;
  try {
    showRuns(await ask("runs.json"));
    const shown = [...runs].filter(([, run]) => run.shown);
    await Promise.all(shown.map(([name, run]) => readCurves(name, run)));
    if (shown.some(([, run]) => run.read < 1)) wait = 0;
    await drawStale();
    await showDetails();
  } catch (error) {
    element("state").textContent = `No answer from the monitor: ${error.message}`;
  }
  busy = false;
  if (again) wait = 0;
  again = false;
  timer = setTimeout(() => document.hidden || refresh(), wait);
}

for (const chart of CHARTS) {
  const title = make("h2", {}, `${chart.title} `, make("small", { textContent: chart.note ?? "" }));
  const plot = make("div", { id: `plot-${chart.field}`, className: "plot" });
  element("charts").append(
    make("div", { className: chart.field === "loss" ? "chart first" : "chart" }, title, plot),
  );
}
history.replaceState(null, "", location.pathname); // the cookie stands for the token from here on
dark.addEventListener("change", () => {
  CHARTS.forEach((chart) => stale.add(chart.field));
  refresh();
});
document.addEventListener("visibilitychange", () => document.hidden || refresh());
refresh();
