// The server's endpoints.

export const RATE = 24000; // samples per second of response_format pcm

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

// The tab keeps the key if the browser lets it.
let key = "";
try {
  key = sessionStorage.getItem("key") ?? "";
} catch {
  // Storage is refused: the key is kept until a reload.
}

export function setKey(value) {
  key = value.trim();
  try {
    sessionStorage.setItem("key", key);
  } catch {
    // As above.
  }
}

export const hasKey = () => key !== "";

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer.", 0);
  }
  if (!answer.ok) throw new ServerError(await reason(answer), answer.status);
  return answer;
}

// What is wrong, in one sentence.
async function reason(answer) {
  if (answer.status === 401) {
    return key ? "The server does not accept this API key." : "The server asks for an API key.";
  }
  if (answer.status === 503) {
    const seconds = answer.headers.get("Retry-After");
    return `The server is busy; try again ${seconds ? `in ${seconds} s` : "later"}.`;
  }
  const text = await answer.text().catch(() => "");
  try {
    return sentence(JSON.parse(text).error.message);
  } catch {
    return `The server answers with an error (${answer.status}).`;
  }
}

// The server speaks of the fields of a request.
function sentence(message) {
  const text = message
    .replace(/^input:/, "Text:")
    .replace(/^(speaker_ref|audio_sample)/, "The recording")
    .replace(/^name of a voice/, "Name");
  return /[.!?]$/.test(text) ? text : `${text}.`;
}

export async function getJSON(path) {
  return (await request(path)).json();
}

// Add a voice, and return what the server says of it.
export async function addVoice(name, recording, consent) {
  const body = new FormData();
  body.append("name", name);
  if (consent) body.append("consent", consent);
  body.append("audio_sample", recording, recording.name);
  return (await request("v1/audio/voices", { method: "POST", body })).json();
}

// Speak: yields `{ step, total }` and Int16Array samples as they come.
export async function* speak(fields, signal) {
  const body = JSON.stringify({
    ...fields,
    response_format: "pcm",
    stream_format: "sse",
    progress: true,
  });
  const headers = { "Content-Type": "application/json" };
  const answer = await request("v1/audio/speech", { method: "POST", headers, body, signal });
  for await (const event of events(answer.body)) {
    if (event.type === "speech.progress") yield event;
    else if (event.type === "speech.audio.delta") yield fromBase64(event.audio);
    else if (event.type === "error") throw new ServerError(sentence(event.error.message), 200);
    else if (event.type === "speech.audio.done") return;
  }
  throw new ServerError("The server stopped before the end of the speech.", 0);
}

// The JSON of server-sent events.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    while (true) {
      const { done, value } = await read(reader);
      if (done) return;
      const blocks = (text + value).split("\n\n");
      text = blocks.pop();
      for (const block of blocks) {
        if (block.startsWith("data: {")) yield JSON.parse(block.slice(6));
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // so that the server stops if the page does
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The connection to the server broke.", 0);
  }
}

function fromBase64(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new Int16Array(bytes.buffer); // little endian, as are all devices with a browser
}
