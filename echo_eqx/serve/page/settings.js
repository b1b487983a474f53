// The fold of settings: speed, and what the server says of its sampler.

import { make } from "./dom.js";

const SPEED = {
  name: "speed",
  type: "float",
  min: 0.25,
  max: 4,
  default: 1,
  help: "Above 1 speaks faster, below 1 slower; how closely depends on the model.",
};

export class Settings {
  #list;
  #rows = [];

  constructor(list) {
    this.#list = list;
    list.addEventListener("input", () => this.#mark());
  }

  // `table` as in the answer of /v1/settings.
  show(table) {
    this.#rows = [SPEED, ...table].map((setting) => makeRow(setting));
    this.#list.replaceChildren(...this.#rows.map((row) => row.node));
  }

  // What differs from the server's defaults.
  get values() {
    const changed = this.#rows.filter(isChanged);
    return Object.fromEntries(changed.map((row) => [row.setting.name, valueOf(row)]));
  }

  set values(values) {
    for (const row of this.#rows) {
      row.input.value = values[row.setting.name] ?? row.setting.default ?? "";
    }
    this.#mark();
  }

  #mark() {
    for (const row of this.#rows) row.node.classList.toggle("changed", isChanged(row));
  }
}

function valueOf({ setting, input }) {
  return setting.type === "choice" ? input.value : Number(input.value);
}

// An empty field stands for the default.
function isChanged(row) {
  return row.input.value !== "" && valueOf(row) !== row.setting.default;
}

function makeRow(setting) {
  const id = `setting-${setting.name}`;
  const input = setting.type === "choice" ? makeChoice(setting) : makeNumber(setting);
  input.id = id;
  input.setAttribute("aria-describedby", `${id}-note`);
  const label = make("label", { htmlFor: id, textContent: setting.name });
  const note = make("p", { id: `${id}-note`, className: "note" }, ...withCode(explain(setting)));
  const node = make("div", { className: "setting" }, make("div", {}, label, input), note);
  return { setting, input, node };
}

function makeChoice(setting) {
  const options = setting.choices.map((value) => make("option", { value, textContent: value }));
  const select = make("select", {}, ...options);
  select.value = setting.default;
  return select;
}

function makeNumber({ type, min, max, default: value }) {
  const step = type === "int" ? 1 : "any";
  return make("input", { type: "number", min, max, step, value: value ?? "" });
}

function explain(setting) {
  if (setting.type === "choice") return `${setting.help} Default: ${setting.default}.`;
  const value = setting.default === null ? "empty" : setting.default;
  const help = setting.help.replace("None for", "Empty for");
  return `${help} ${setting.min} to ${setting.max}; default: ${value}.`;
}

// Text between backticks as code.
function withCode(text) {
  return text.split("`").map((part, i) => (i % 2 ? make("code", { textContent: part }) : part));
}
