// The waveform and the spectrogram of a sound, in the canvas's text color.

import { RATE } from "./api.js";

const SIZE = 512; // samples of a spectrum
const [FLOOR, RANGE] = [-85, 65]; // dB
const WINDOW = Float32Array.from({ length: SIZE }, (_, i) => Math.sin((Math.PI * (i + 0.5)) / SIZE) ** 2);
const COS = Float32Array.from({ length: SIZE / 2 }, (_, i) => Math.cos((2 * Math.PI * i) / SIZE));
const SIN = Float32Array.from({ length: SIZE / 2 }, (_, i) => -Math.sin((2 * Math.PI * i) / SIZE));
const REVERSED = Uint16Array.from({ length: SIZE }, (_, i) =>
  parseInt(i.toString(2).padStart(Math.log2(SIZE), "0").split("").reverse().join(""), 2),
);

function prepare(canvas) {
  const scale = devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(canvas.clientWidth * scale));
  canvas.height = Math.max(1, Math.round(canvas.clientHeight * scale));
  return canvas.getContext("2d");
}

// A vertical line per pixel, from the lowest to the highest of its samples. The loudest sample
// reaches the edge.
export function drawWave(canvas, samples) {
  const context = prepare(canvas);
  const { width, height } = canvas;
  context.fillStyle = getComputedStyle(canvas).color;
  const peak = samples.reduce((peak, sample) => Math.max(peak, Math.abs(sample)), 1000);
  for (let x = 0; x < width; x++) {
    const start = Math.floor((x * samples.length) / width);
    const stop = Math.max(start + 1, Math.floor(((x + 1) * samples.length) / width));
    let low = 0;
    let high = 0;
    for (let i = start; i < Math.min(stop, samples.length); i++) {
      low = Math.min(low, samples[i]);
      high = Math.max(high, samples[i]);
    }
    const top = ((1 - high / peak) * height) / 2;
    const bottom = ((1 - low / peak) * height) / 2;
    context.fillRect(x, top - 0.5, 1, Math.max(1, bottom - top));
  }
}

// Frequencies go up by the mel scale, where equal distances sound equal.
export function drawSpectrogram(canvas, samples) {
  const context = prepare(canvas);
  const { width, height } = canvas;
  const [red, green, blue] = getComputedStyle(canvas).color.match(/\d+/g).map(Number);
  const image = context.createImageData(width, height);
  const mels = 2595 * Math.log10(1 + RATE / 2 / 700);
  const bins = Float32Array.from({ length: height + 1 }, (_, y) => {
    const hertz = 700 * (10 ** ((mels * (1 - y / height)) / 2595) - 1);
    return (hertz * SIZE) / RATE;
  });
  for (let x = 0; x < width; x++) {
    const power = spectrum(samples, Math.round(((x + 0.5) * samples.length) / width));
    for (let y = 0; y < height; y++) {
      const decibels = 10 * Math.log10(largest(power, bins[y + 1], bins[y]) + 1e-12);
      const level = Math.min(1, Math.max(0, (decibels - FLOOR) / RANGE));
      image.data.set([red, green, blue, 255 * level ** 1.5], 4 * (y * width + x));
    }
  }
  context.putImageData(image, 0, 0);
}

// The largest power between two places, which may lie between two bins.
function largest(power, low, high) {
  const at = (place) => {
    const bin = Math.min(Math.floor(place), SIZE / 2 - 1);
    return power[bin] + (place - bin) * (power[bin + 1] - power[bin]);
  };
  let found = Math.max(at(low), at(high));
  for (let bin = Math.ceil(low); bin <= high; bin++) found = Math.max(found, power[bin]);
  return found;
}

// The power of each frequency around a sample, 1 for a sine of full scale.
export function spectrum(samples, center) {
  const real = new Float32Array(SIZE);
  const imaginary = new Float32Array(SIZE);
  for (let i = 0; i < SIZE; i++) {
    const sample = samples[center - SIZE / 2 + i] ?? 0;
    real[REVERSED[i]] = (WINDOW[i] * sample) / 32768;
  }
  for (let half = 1; half < SIZE; half *= 2) {
    const stride = SIZE / 2 / half;
    for (let start = 0; start < SIZE; start += 2 * half) {
      for (let k = 0; k < half; k++) {
        const [a, b] = [start + k, start + k + half];
        const [c, s] = [COS[k * stride], SIN[k * stride]];
        const re = real[b] * c - imaginary[b] * s;
        const im = real[b] * s + imaginary[b] * c;
        real[b] = real[a] - re;
        imaginary[b] = imaginary[a] - im;
        real[a] += re;
        imaginary[a] += im;
      }
    }
  }
  const scale = 4 / SIZE; // the window's mean is a half, and a sine has half its power at -f
  return Float32Array.from({ length: SIZE / 2 + 1 }, (_, bin) => {
    return (scale * real[bin]) ** 2 + (scale * imaginary[bin]) ** 2;
  });
}
