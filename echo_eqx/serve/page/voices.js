// The list of voices, and saving a recording as one of them.

import { addVoice } from "./api.js";
import { element, make } from "./dom.js";

const option = (name) => make("option", { value: name, textContent: name });

export function showVoices(voices) {
  element("voice").prepend(...voices.map(({ name }) => option(name)));
  element("voice").selectedIndex = 0;
}

// Names are in order; the model's own voice and the recording follow.
function insert(name) {
  const select = element("voice");
  const after = [...select.options].find(({ value }) => value === "" || value > name);
  select.insertBefore(option(name), after);
  select.value = name;
}

export function saveOnDemand(reference, showError, showStatus) {
  const [button, name, consent] = ["save-voice", "voice-name", "consent"].map(element);
  let isSaving = false;

  async function save() {
    if (isSaving) return;
    if (!name.value.trim()) {
      showError("Name: expected a name for the voice.");
      name.focus();
      return;
    }
    isSaving = true;
    showError("");
    showStatus("Saving the voice");
    try {
      const { file } = reference;
      const voice = await addVoice(name.value.trim(), file, consent.value.trim());
      if (reference.file === file) reference.forget();
      insert(voice.name);
      name.value = consent.value = "";
      const notes = voice.warnings.map((warning) => `; ${warning}`).join("");
      showStatus(`Saved ${voice.name}: ${voice.seconds.toFixed(1)} s of speech${notes}`);
      element("voice").focus();
    } catch (error) {
      showStatus("");
      showError(error.message);
    }
    isSaving = false;
  }

  button.addEventListener("click", save);
  for (const field of [name, consent]) {
    field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.ctrlKey || event.metaKey) return;
      event.preventDefault(); // which would speak
      save();
    });
  }
}
