// What was spoken here, kept in this browser.

import { element, make, playButton, saveLink } from "./dom.js";
import { fromWAV, Sound } from "./sound.js";

const MAX_ENTRIES = 50;
const MAX_BYTES = 100 * 2 ** 20;
const EMPTY = "What you speak is kept here, in this browser only.";
const UNKEPT = "This browser keeps no history: it is gone when the page is closed.";

// An entry is { id, time, text, voice, seed, settings, file }, where file is a WAV file.
export class History {
  #entries = []; // newest first
  #nodes = new Map();
  #store = null;
  #player;
  #onReuse;

  constructor(player, onReuse) {
    this.#player = player;
    this.#onReuse = onReuse;
    element("clear").addEventListener("click", () => this.#clear());
  }

  async open() {
    try {
      this.#store = await openStore();
      this.#entries.push(...(await this.#ask("readonly", (store) => store.getAll())));
    } catch {
      this.#store = null;
    }
    this.#entries.sort((a, b) => b.time - a.time);
    this.#show();
  }

  async add(entry) {
    entry = { id: crypto.getRandomValues(new Uint32Array(3)).join("-"), time: Date.now(), ...entry };
    this.#entries.unshift(entry);
    await this.#write((store) => store.add(entry));
    let bytes = 0;
    const isKept = this.#entries.map(({ file }, i) => {
      bytes += file.size;
      return i < MAX_ENTRIES && bytes <= MAX_BYTES;
    });
    const removed = this.#entries.filter((_, i) => !isKept[i]);
    this.#entries = this.#entries.filter((_, i) => isKept[i]);
    for (const { id } of removed) await this.#write((store) => store.delete(id));
    this.#show();
  }

  async #remove(entry) {
    this.#entries = this.#entries.filter((other) => other !== entry);
    this.#show();
    await this.#write((store) => store.delete(entry.id));
  }

  async #clear() {
    this.#entries = [];
    this.#show();
    element("history-title").focus();
    await this.#write((store) => store.clear());
  }

  // A store that fails, because it is full or refused, is not used again.
  async #write(change) {
    if (!this.#store) return;
    try {
      await this.#ask("readwrite", change);
    } catch {
      this.#store = null;
      this.#show();
    }
  }

  #ask(mode, question) {
    const transaction = this.#store.transaction("entries", mode);
    const request = question(transaction.objectStore("entries"));
    return new Promise((resolve, reject) => {
      transaction.oncomplete = () => resolve(request.result);
      transaction.onabort = () => reject(transaction.error);
    });
  }

  #show() {
    for (const entry of this.#entries) {
      if (!this.#nodes.has(entry.id)) this.#nodes.set(entry.id, this.#makeNode(entry));
    }
    const ids = new Set(this.#entries.map(({ id }) => id));
    for (const [id, { node, link }] of this.#nodes) {
      if (ids.has(id)) continue;
      if (node.contains(document.activeElement)) element("history-title").focus();
      node.remove();
      URL.revokeObjectURL(link.href);
      this.#nodes.delete(id);
    }
    const list = element("history");
    for (const [i, { id }] of this.#entries.entries()) {
      const { node } = this.#nodes.get(id); // one in its place is left alone, and keeps the focus
      if (list.children[i] !== node) list.insertBefore(node, list.children[i] ?? null);
    }
    element("clear").hidden = !ids.size;
    element("history-note").textContent = this.#store ? (ids.size ? "" : EMPTY) : UNKEPT;
  }

  #makeNode(entry) {
    const when = new Date(entry.time).toLocaleString();
    const voice = entry.voice ? `voice ${entry.voice}` : "the model's own voice";
    const changed = Object.entries(entry.settings).map(([name, value]) => `${name} ${value}`);
    const about = [when, voice, `seed ${entry.seed}`, ...changed].join(", ");
    const open = async () => Sound.of(await fromWAV(entry.file));
    const play = playButton(this.#player, `the speech of ${when}`, null, open);
    const link = saveLink(entry.file, fileName(entry));
    const reuse = make("button", { type: "button", textContent: "Use again" });
    reuse.title = "Fill in its text, seed, settings and voice";
    reuse.addEventListener("click", () => this.#onReuse(entry));
    const remove = make("button", { type: "button", textContent: "Remove" });
    remove.setAttribute("aria-label", `Remove the speech of ${when}`);
    remove.addEventListener("click", () => this.#remove(entry));
    const said = make("p", { className: "said", dir: "auto", textContent: entry.text });
    const note = make("p", { className: "note", textContent: about });
    const actions = make("div", { className: "row" }, play, link, reuse, remove);
    return { node: make("li", {}, said, note, actions), link };
  }
}

// A name that all systems can write.
export function fileName({ text, seed }) {
  const words = text.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? ["speech"];
  return `${words.slice(0, 6).join("-").slice(0, 40)}-${seed}.wav`;
}

function openStore() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("echo_eqx", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("entries", { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("blocked"));
  });
}
