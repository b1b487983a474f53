// The form: what to speak, and what became of it.

import { getJSON, hasKey, ServerError, setKey, speak } from "./api.js";
import { Card } from "./card.js";
import { element } from "./dom.js";
import { fileName, History } from "./history.js";
import { Reference } from "./reference.js";
import { Settings } from "./settings.js";
import { Player } from "./sound.js";
import { saveOnDemand, showVoices } from "./voices.js";

const MAX_SEED = 2 ** 32 - 1;
const form = element("form");
const player = new Player();
const settings = new Settings(element("settings-list"));
const reference = new Reference(showError);
const history = new History(player, reuse);
let cards = [];
let running = null; // the AbortController of the requests

function showError(message) {
  element("error").textContent = message;
}

function showStatus(text) {
  if (element("status").textContent !== text) element("status").textContent = text;
}

function askForKey(error) {
  if (error.status !== 401) return;
  element("key-row").hidden = false;
  element("key").focus();
}

async function load() {
  try {
    const [{ models }, { voices }] = await Promise.all([
      getJSON("v1/audio/models"),
      getJSON("v1/audio/voices"),
    ]);
    element("model").textContent = `model: ${models[0].id}`;
    showVoices(voices.filter((voice) => !voice.alias));
    await loadSettings();
  } catch (error) {
    showError(error.message);
  }
}

async function loadSettings() {
  try {
    const { settings: table, limits, allow_uploads: isAllowed } = await getJSON("v1/settings");
    settings.show(table);
    element("save").hidden = !isAllowed;
    // In a request, four characters are three bytes.
    const room = Math.floor(0.75 * limits.max_body_bytes) - limits.max_characters;
    reference.maxBytes = Math.min(limits.max_speaker_bytes, room);
    showError("");
  } catch (error) {
    if (error.status === 401 && !hasKey()) {
      askForKey(error); // which is no error before a key was given
    } else {
      askForKey(error);
      throw error;
    }
  }
}

// Whether all fields have valid values; the first that has not is shown.
function check() {
  const wrong = form.querySelector("input:invalid, textarea:invalid, select:invalid");
  if (!wrong) return true;
  if (element("settings").contains(wrong)) element("settings").open = true;
  wrong.reportValidity();
  return false;
}

async function submit() {
  if (running || !check()) return;
  const controller = new AbortController();
  running = controller;
  player.stop();
  player.wake();
  await reference.stop();
  showError("");
  showButtons();
  const entry = {
    text: element("text").value,
    voice: reference.name,
    settings: settings.values,
  };
  const fields = { input: entry.text, ...entry.settings };
  const first = Number(element("seed").value);
  const count = Math.min(Number(element("count").value), MAX_SEED - first + 1);
  cards = Array.from({ length: count }, (_, i) => new Card(player, first + i));
  element("candidates").replaceChildren(...cards.map((card) => card.node));
  element("candidates").scrollIntoView({ block: "nearest" });
  showStatus("Speaking");
  const started = performance.now();
  try {
    Object.assign(fields, await reference.field());
    player.play(cards[0].sound);
    await Promise.all(cards.map((card) => run(card, fields, entry, controller.signal)));
    const seconds = ((performance.now() - started) / 1000).toFixed(1);
    const failed = cards.find((card) => !card.file);
    showStatus(failed ? "" : `Spoken in ${seconds} s`);
  } catch (error) {
    controller.abort();
    cards.filter((card) => !card.sound.isComplete).forEach((card) => card.fail("", true));
    showError(error.message);
  }
  if (controller.signal.aborted) showStatus("Stopped");
  running = null;
  showButtons();
}

async function run(card, fields, entry, signal) {
  try {
    for await (const part of speak({ ...fields, seed: card.seed }, signal)) {
      if (part instanceof Int16Array) card.sound.add(part);
      else showProgress(card, part);
    }
    const spoken = { ...entry, seed: card.seed };
    card.finish(fileName(spoken));
    await history.add({ ...spoken, file: card.file });
  } catch (error) {
    const isStopped = error.name === "AbortError";
    card.fail(error.message, isStopped);
    if (!isStopped) showError(error.message);
    if (error instanceof ServerError) askForKey(error);
    else if (!isStopped) throw error;
  }
}

// Each step is shown on its card; screen readers hear every quarter.
function showProgress(card, progress) {
  card.showProgress(progress);
  const done = cards.reduce((sum, { progress }) => sum + progress.value, 0);
  const total = cards.reduce((sum, { progress }) => sum + Math.max(progress.max, 1), 0);
  const quarters = Math.floor((4 * done) / Math.max(total, progress.total * cards.length));
  showStatus(`Speaking, ${25 * quarters} % of the steps done`);
}

function stop() {
  running?.abort();
  player.stop();
}

function showButtons() {
  // Not `disabled`, which would take the focus away.
  element("speak").ariaDisabled = String(running !== null);
  element("stop").ariaDisabled = String(!running && !player.sound);
}

function reuse(entry) {
  element("text").value = entry.text;
  element("seed").value = entry.seed;
  settings.values = entry.settings;
  const { options } = element("voice");
  const same = [...options].find((option) => option.value === entry.voice);
  if (same) element("voice").value = same.value;
  else showError(`The voice ${entry.voice} is not here any more.`);
  element("text").focus();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  if (event.key === "Escape") stop();
});
element("stop").addEventListener("click", stop);
element("dice").addEventListener("click", () => {
  element("seed").value = Math.floor(Math.random() * 1e6);
});
element("defaults").addEventListener("click", () => {
  settings.values = {};
});
element("key").addEventListener("change", () => {
  setKey(element("key").value);
  loadSettings().catch((error) => showError(error.message));
});
player.addEventListener("change", showButtons);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  cards.forEach((card) => card.draw());
});
saveOnDemand(reference, showError, showStatus);
history.open();
load();
