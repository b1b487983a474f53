// Small helpers for elements.

export const element = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// A button that plays and pauses a sound, or the one that `open` gives once it is needed.
export function playButton(player, name, sound, open) {
  const button = make("button", { type: "button" });
  const show = () => {
    const verb = sound && player.sound === sound ? "Pause" : "Play";
    button.textContent = verb;
    button.setAttribute("aria-label", `${verb} ${name}`);
  };
  button.addEventListener("click", async () => {
    player.wake();
    sound ??= await open();
    if (player.sound === sound) player.stop();
    else player.play(sound);
  });
  player.addEventListener("change", show);
  show();
  return button;
}

// A link that saves a file.
export function saveLink(file, name) {
  const link = make("a", { className: "button", textContent: "Download", download: name });
  link.href = URL.createObjectURL(file);
  link.setAttribute("aria-label", `Download ${name}`);
  return link;
}
