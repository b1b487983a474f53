// The recording to speak in the voice of: from the microphone, chosen, or dropped.

import { element, make } from "./dom.js";
import { toWAV } from "./sound.js";

const CHOICE = "the recording"; // the value of its option in the list of voices
const MAX_SECONDS = 120;
const UNUSABLE = {
  NotAllowedError: "The browser does not allow the use of the microphone.",
  NotFoundError: "There is no microphone.",
};

export class Reference {
  maxBytes = Infinity;
  #file = null;
  #microphone = null;
  #isOpening = false;
  #onError;

  constructor(onError) {
    this.#onError = onError;
    element("record").addEventListener("click", () => this.#toggle());
    element("choose").addEventListener("click", () => element("file").click());
    element("file").addEventListener("change", () => {
      this.#take(element("file").files[0]);
      element("file").value = "";
    });
    element("forget").addEventListener("click", () => this.forget());
    this.#listenForDrops();
  }

  // The name of the chosen voice, and the field of a request that asks for it.
  get name() {
    const { value } = element("voice");
    return value === CHOICE ? this.#file.name : value;
  }

  get file() {
    return this.#file;
  }

  async field() {
    const { value } = element("voice");
    if (value === CHOICE) return { speaker_ref: await toDataURL(this.#file) };
    return value ? { voice: value } : {};
  }

  async stop() {
    const microphone = this.#microphone;
    if (!microphone) return;
    this.#microphone = null;
    element("record").textContent = "Record";
    element("record").classList.remove("recording");
    element("recorded").hidden = true;
    const file = await microphone.stop();
    if (file) this.#take(file);
  }

  async #toggle() {
    if (this.#microphone) return this.stop();
    if (this.#isOpening) return;
    this.#isOpening = true;
    try {
      if (!navigator.mediaDevices?.getUserMedia) {
        throw new Error("Browsers allow the microphone only on https and localhost.");
      }
      const microphone = await Microphone.open();
      this.#microphone = microphone;
      microphone.onlevel = (peak) => {
        element("level").value = peak;
        element("seconds").textContent = `${microphone.seconds.toFixed(1)} s`;
        if (microphone.seconds >= MAX_SECONDS) this.stop();
      };
      element("record").textContent = "Stop recording";
      element("record").classList.add("recording");
      element("recorded").hidden = false;
    } catch (error) {
      this.#onError(UNUSABLE[error.name] ?? error.message);
    } finally {
      this.#isOpening = false;
    }
  }

  #take(file) {
    if (!file) return;
    if (file.size > this.maxBytes) {
      const [size, most] = [file.size, this.maxBytes].map((bytes) => (bytes / 2 ** 20).toFixed(1));
      this.#onError(`Expected a recording of at most ${most} MiB, got ${size} MiB.`);
      return;
    }
    this.forget();
    this.#file = file;
    const option = make("option", { value: CHOICE, textContent: `recording: ${file.name}` });
    element("voice").append(option);
    element("voice").value = CHOICE;
    element("reference-name").textContent = file.name;
    element("reference-audio").src = URL.createObjectURL(file);
    element("reference").hidden = false;
    this.#onError("");
  }

  forget() {
    if (!this.#file) return;
    const audio = element("reference-audio");
    URL.revokeObjectURL(audio.src);
    audio.removeAttribute("src");
    const voice = element("voice");
    if (voice.value === CHOICE) voice.selectedIndex = 0;
    voice.lastElementChild.remove();
    element("reference").hidden = true;
    this.#file = null;
  }

  #listenForDrops() {
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    const show = (on) => document.body.classList.toggle("dropping", on);
    addEventListener("dragover", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      show(true);
    });
    addEventListener("dragleave", (event) => event.relatedTarget || show(false));
    addEventListener("drop", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      show(false);
      this.#take(event.dataTransfer.files[0]);
    });
  }
}

// Collects the samples of the microphone, as they are.
class Microphone {
  seconds = 0;
  onlevel = () => {};
  #stream;
  #context;
  #pieces = [];

  static async open() {
    const context = new AudioContext();
    const asIs = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
    let stream;
    try {
      await context.audioWorklet.addModule("page/recorder.js");
      stream = await navigator.mediaDevices.getUserMedia({ audio: asIs });
    } catch (error) {
      await context.close();
      throw error;
    }
    const node = new AudioWorkletNode(context, "recorder", {
      channelCount: 1,
      channelCountMode: "explicit", // several channels are mixed
      numberOfOutputs: 0,
    });
    const microphone = new Microphone(stream, context);
    node.port.onmessage = ({ data }) => microphone.#add(data);
    context.createMediaStreamSource(stream).connect(node);
    return microphone;
  }

  constructor(stream, context) {
    this.#stream = stream;
    this.#context = context;
  }

  #add(samples) {
    this.#pieces.push(samples);
    this.seconds += samples.length / this.#context.sampleRate;
    if (this.#pieces.length % 32) return;
    const latest = this.#pieces.slice(-32).flatMap((piece) => [...piece]);
    this.onlevel(Math.max(...latest.map(Math.abs)));
  }

  // The recording; null if there is none.
  async stop() {
    this.#stream.getTracks().forEach((track) => track.stop());
    const rate = this.#context.sampleRate;
    await this.#context.close();
    if (!this.#pieces.length) return null;
    const samples = new Int16Array(this.#pieces.reduce((sum, piece) => sum + piece.length, 0));
    let end = 0;
    for (const piece of this.#pieces) {
      for (const x of piece) samples[end++] = Math.round(32767 * Math.min(1, Math.max(-1, x)));
    }
    const wav = toWAV(samples, rate);
    return new File([wav], `microphone ${this.seconds.toFixed(1)} s.wav`, { type: wav.type });
  }
}

function toDataURL(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}
