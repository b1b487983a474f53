// A candidate: its progress, its picture, and its player.

import { drawSpectrogram, drawWave } from "./drawing.js";
import { make, playButton, saveLink } from "./dom.js";
import { RATE } from "./api.js";
import { Sound, toWAV } from "./sound.js";

export class Card {
  sound = new Sound();
  #player;
  #frame = 0; // the request of the next animation
  #drawn = 0; // samples in the picture

  constructor(player, seed) {
    this.#player = player;
    this.seed = seed;
    const name = `seed ${seed}`;
    this.note = make("span", { className: "note", textContent: "waiting" });
    this.progress = make("progress", { max: 1, value: 0 });
    this.progress.setAttribute("aria-label", `Progress of ${name}`);
    this.wave = make("canvas", { className: "wave" });
    this.spectrogram = make("canvas", { className: "spectrogram" });
    this.cursor = make("div", { className: "cursor" });
    this.picture = make("div", { className: "picture" }, this.wave, this.spectrogram, this.cursor);
    this.picture.setAttribute("role", "img");
    this.picture.setAttribute("aria-label", `Waveform and spectrogram of ${name}`);
    this.range = make("input", { type: "range", min: 0, max: 0, step: 0.01, value: 0 });
    this.range.setAttribute("aria-label", `Position in ${name}, in seconds`);
    this.time = make("span", { className: "time note" });
    this.button = playButton(player, name, this.sound);
    this.actions = make("div", { className: "row" }, this.button, this.time);
    this.error = make("p", { className: "error" });
    this.body = make("div", {}, this.picture, this.range, this.actions);
    this.body.hidden = true;
    const title = make("h3", { textContent: `Seed ${seed}` }, " ", this.note);
    this.node = make("article", { className: "card" }, title, this.progress, this.body, this.error);
    this.#listen();
  }

  #listen() {
    this.sound.addEventListener("change", () => this.#later());
    this.#player.addEventListener("change", () => this.#later());
    this.range.addEventListener("input", () => this.#seek(this.range.value * RATE));
    this.picture.addEventListener("click", (event) => {
      const { left, width } = this.picture.getBoundingClientRect();
      this.#seek(((event.clientX - left) / width) * this.sound.length);
    });
    new ResizeObserver(() => this.draw()).observe(this.picture);
  }

  showProgress({ step, total }) {
    this.progress.max = total;
    this.progress.value = step;
    this.note.textContent = `step ${step} of ${total}`;
  }

  finish(fileName) {
    this.sound.complete();
    this.progress.hidden = true;
    this.note.textContent = `${this.sound.seconds.toFixed(1)} s`;
    this.file = toWAV(this.sound.samples, RATE);
    this.actions.append(saveLink(this.file, fileName));
  }

  // What there is stays.
  fail(message, isStopped) {
    this.sound.complete();
    this.progress.hidden = true;
    this.note.textContent = isStopped ? "stopped" : "failed";
    this.error.textContent = isStopped ? "" : message;
  }

  // The picture, as large as it is shown.
  draw() {
    const { samples } = this.sound;
    if (!samples.length || !this.picture.clientWidth) return;
    drawWave(this.wave, samples);
    drawSpectrogram(this.spectrogram, samples);
  }

  #seek(sample) {
    this.sound.position = Math.round(Math.min(this.sound.length, Math.max(0, sample)));
    if (this.#isPlaying) this.#player.play(this.sound);
    this.#later();
  }

  get #isPlaying() {
    return this.#player.sound === this.sound;
  }

  // Draw before the next frame what has changed, and again while it plays.
  #later() {
    cancelAnimationFrame(this.#frame);
    this.#frame = requestAnimationFrame(() => this.#show());
  }

  #show() {
    const { length, seconds } = this.sound;
    this.body.hidden = length === 0;
    if (this.#drawn !== length) {
      this.#drawn = length;
      this.draw();
    }
    const at = this.#isPlaying ? this.#player.position : this.sound.position;
    this.range.max = seconds;
    this.range.value = at / RATE;
    this.cursor.style.left = length ? `${(100 * at) / length}%` : "0";
    this.time.textContent = `${(at / RATE).toFixed(1)} of ${seconds.toFixed(1)} s`;
    if (this.#isPlaying) this.#later();
  }
}
