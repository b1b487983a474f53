// Sounds that grow, their playback without gaps, and WAV files.

import { RATE } from "./api.js";

const LEAD = 0.1; // seconds from the first samples to their playback

// Int16 samples that come piece by piece. Fires "change" when it grows or is complete.
export class Sound extends EventTarget {
  isComplete = false;
  position = 0; // the sample where playback begins
  length = 0;
  #pieces = [];

  static of(samples) {
    const sound = new Sound();
    sound.add(samples);
    sound.complete();
    return sound;
  }

  add(samples) {
    this.#pieces.push(samples);
    this.length += samples.length;
    this.dispatchEvent(new Event("change"));
  }

  complete() {
    this.isComplete = true;
    this.dispatchEvent(new Event("change"));
  }

  get samples() {
    if (this.#pieces.length !== 1) {
      const all = new Int16Array(this.length);
      let end = 0;
      for (const piece of this.#pieces) {
        all.set(piece, end);
        end += piece.length;
      }
      this.#pieces = [all];
    }
    return this.#pieces[0];
  }

  get seconds() {
    return this.length / RATE;
  }
}

// Plays one sound at a time, also while it grows. Fires "change" when it starts or stops.
//
// Each piece is scheduled at the sample after the one before, in a context of the sound's own
// rate, so that nothing is resampled and pieces join exactly. A piece that comes too late is played
// as soon as it is there.
export class Player extends EventTarget {
  sound = null;
  #context = null;
  #makeContext;
  #sources = new Set(); // that are not at their end
  #segments = []; // { frame, from, length }: what is scheduled, in samples
  #next = 0;
  #feed = () => this.#schedule();

  constructor(makeContext = () => new AudioContext({ sampleRate: RATE })) {
    super();
    this.#makeContext = makeContext;
  }

  // To be called in the handler of a click or key: browsers allow no sound otherwise.
  wake() {
    this.#context ??= this.#makeContext();
    if (this.#context.state === "suspended") this.#context.resume();
  }

  // From `sound.position` on.
  play(sound) {
    this.wake();
    this.#end();
    this.sound = sound;
    this.#next = Math.min(sound.position, sound.length);
    sound.addEventListener("change", this.#feed);
    this.#schedule();
    this.dispatchEvent(new Event("change"));
  }

  stop() {
    if (!this.sound) return;
    this.sound.position = this.position;
    this.#end();
    this.dispatchEvent(new Event("change"));
  }

  // The sample that is heard now.
  get position() {
    if (!this.#segments.length) return this.#next;
    const now = Math.floor(this.#context.currentTime * RATE);
    const playing = this.#segments.findLast(({ frame }) => frame <= now) ?? this.#segments[0];
    const { frame, from, length } = playing;
    return from + Math.min(length, Math.max(0, now - frame));
  }

  #end() {
    this.sound?.removeEventListener("change", this.#feed);
    for (const source of this.#sources) {
      source.onended = null;
      source.stop();
      source.disconnect();
    }
    this.#sources.clear();
    this.#segments = [];
    this.sound = null;
  }

  #schedule() {
    const samples = this.sound.samples.subarray(this.#next);
    if (samples.length) {
      const now = Math.ceil(this.#context.currentTime * RATE);
      const last = this.#segments.at(-1);
      const end = last ? last.frame + last.length : 0;
      const frame = end > now ? end : now + LEAD * RATE;
      const buffer = this.#context.createBuffer(1, samples.length, RATE);
      buffer.copyToChannel(Float32Array.from(samples, (sample) => sample / 32768), 0);
      const source = this.#context.createBufferSource();
      source.buffer = buffer;
      source.connect(this.#context.destination);
      source.onended = () => {
        this.#sources.delete(source);
        this.#stopAtEnd();
      };
      source.start(frame / RATE);
      this.#sources.add(source);
      this.#segments.push({ frame, from: this.#next, length: samples.length });
      this.#next += samples.length;
    }
    this.#stopAtEnd();
  }

  #stopAtEnd() {
    const { sound } = this;
    if (!sound.isComplete || this.#sources.size) return;
    this.#end();
    sound.position = 0;
    this.dispatchEvent(new Event("change"));
  }
}

// A mono WAV file of 16-bit samples.
export function toWAV(samples, rate) {
  const header = new DataView(new ArrayBuffer(44));
  const text = (at, value) => [...value].forEach((c, i) => header.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF");
  header.setUint32(4, 36 + 2 * samples.length, true);
  text(8, "WAVEfmt ");
  header.setUint32(16, 16, true);
  header.setUint16(20, 1, true); // PCM
  header.setUint16(22, 1, true); // channels
  header.setUint32(24, rate, true);
  header.setUint32(28, 2 * rate, true);
  header.setUint16(32, 2, true);
  header.setUint16(34, 16, true);
  text(36, "data");
  header.setUint32(40, 2 * samples.length, true);
  return new Blob([header, samples], { type: "audio/wav" });
}

// The samples of a file from `toWAV`.
export async function fromWAV(file) {
  return new Int16Array(await file.slice(44).arrayBuffer());
}
