// The prompt with its examples, and the sliders. What is set here is kept by the browser for the next visit.

import { button, byId, el, recall, remember, say } from "./page.js";

const ALONE = [
  "smiling, on a beach", "a pencil sketch, looking to the side", "wearing a red hat, in a forest",
  "a watercolour painting, in front of a mountain", "laughing, in a city at night",
];
const TOGETHER = ["{a} and {b} smiling, on a beach", "{a} laughing, {b} wearing a red hat, in a forest", "{a} beside {b}, a watercolour painting"];
const LARGEST_SEED = 2 ** 31;

const sliders = new Map(); // name of a field -> { input, output, usual }
let random = null;
let seed = null;
let people = [];

/** Make the sliders for what the server's weights and limits say. */
export function setUpSettings(server) {
  const { model, limits } = server;
  const rows = [
    slider("identity_scale", "Identity", 0, 1.5, 0.05, 1, "How strongly the person acts. 0 draws somebody else."),
    slider("guidance_scale", "Guidance", 1, 12, 0.5, model?.guidance_scale ?? 5, "How closely the prompt is followed."),
    slider("steps", "Steps", 1, Math.min(60, limits.max_steps), 1, model?.steps ?? 20, "More steps draw finer detail, and take longer."),
    slider("n", "Pictures", 1, Math.min(8, limits.max_pictures), 1, 1, "Each with a seed of its own."),
    seedRow(),
    slider("attempts", "Attempts", 1, 5, 1, 1, "Draw again until everybody is shown, at most so often.", "several"),
    ordering(),
  ];
  byId("sliders").replaceChildren(...rows);
  byId("prompt").value = recall("prompt", "");
  byId("prompt").addEventListener("input", () => {
    remember("prompt", byId("prompt").value);
    say(byId("prompt-trouble"), "");
    tellMentions();
  });
  byId("defaults").addEventListener("click", () => {
    for (const { input, usual } of sliders.values()) set(input, usual);
    random.checked = true;
    random.dispatchEvent(new Event("change"));
  });
}

function set(input, value) {
  input.value = value;
  input.dispatchEvent(new Event("input"));
}

function slider(name, label, min, max, step, usual, help, className = "") {
  const output = el("output", { for: name });
  const input = el("input", { type: "range", id: name, min, max, step, "aria-describedby": `${name}-help` });
  input.addEventListener("input", () => {
    output.textContent = Number(input.value);
    remember(`set.${name}`, Number(input.value));
  });
  sliders.set(name, { input, usual });
  set(input, recall(`set.${name}`, usual));
  return el("div", { class: `slider ${className}` }, el("label", { for: name }, label), output, input,
    el("p", { class: "soft", id: `${name}-help` }, help));
}

function seedRow() {
  seed = el("input", { type: "number", id: "seed", min: 0, max: LARGEST_SEED, step: 1, value: recall("set.seed", drawSeed()), inputmode: "numeric" });
  random = el("input", { type: "checkbox", id: "random" });
  random.checked = recall("set.random", true);
  const follow = () => {
    seed.readOnly = random.checked;
    remember("set.random", random.checked);
  };
  random.addEventListener("change", follow);
  seed.addEventListener("change", () => remember("set.seed", Number(seed.value)));
  follow();
  return el("div", { class: "slider seed" }, el("label", { for: "seed" }, "Seed"), seed,
    el("label", { class: "choice" }, random, "A new one for every picture"),
    el("p", { class: "soft" }, "The same seed and settings draw the same picture."));
}

function ordering() {
  const box = el("input", { type: "checkbox", id: "ordered", onchange: () => remember("set.ordered", box.checked) });
  box.checked = recall("set.ordered", true);
  return el("label", { class: "choice several" }, box, "Place people from left to right, in this order");
}

const drawSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] % LARGEST_SEED;

/** Return the settings of the form, with a new seed if one is wanted. */
export function readSettings() {
  if (random.checked || seed.value === "") seed.value = drawSeed();
  const values = Object.fromEntries([...sliders].map(([name, { input }]) => [name, Number(input.value)]));
  remember("set.seed", Number(seed.value));
  return { ...values, prompt: byId("prompt").value.trim(), seed: Math.round(Number(seed.value)), ordered: byId("ordered").checked };
}

/** Set the form to what a picture was drawn with. */
export function applySettings(settings) {
  byId("prompt").value = settings.prompt;
  byId("prompt").dispatchEvent(new Event("input"));
  for (const [name, { input, usual }] of sliders) {
    if (name !== "n") set(input, settings[name] ?? usual);
  }
  random.checked = false;
  seed.value = settings.seed;
  random.dispatchEvent(new Event("change"));
  remember("set.seed", settings.seed);
  byId("prompt").focus();
}

/** Fit examples and hints to the people of the picture. */
export function showPeople(names, trained) {
  people = names;
  byId("form").classList.toggle("has-several", names.length > 1);
  const [a, b] = names;
  const texts = names.length > 1 ? TOGETHER.map((text) => text.replace("{a}", `{${a}}`).replace("{b}", `{${b}}`)) : ALONE;
  byId("examples").replaceChildren(...texts.map((text) => button(text, () => {
    byId("prompt").value = text;
    byId("prompt").dispatchEvent(new Event("input"));
    byId("prompt").focus();
  }, { class: "chip" })));
  byId("what").dataset.trained = trained ?? "";
  tellMentions();
}

/** A name that changed also changes in the prompt. */
export function renameInPrompt(old, name) {
  byId("prompt").value = byId("prompt").value.replaceAll(`{${old}}`, `{${name}}`);
  byId("prompt").dispatchEvent(new Event("input"));
}

/** Say which people the prompt does not mention, with a button for each. */
function tellMentions() {
  const help = byId("prompt-help");
  if (people.length < 2) {
    help.replaceChildren("A few words suffice: expression, clothes, place, style. Ctrl+Enter draws.");
    return;
  }
  const missing = people.filter((name) => !byId("prompt").value.includes(`{${name}}`));
  const trained = Number(byId("what").dataset.trained);
  const words = [missing.length ? "Say where each person appears: " : "Everybody is mentioned. "];
  const buttons = missing.map((name) => button(`{${name}}`, () => insert(`{${name}}`), { class: "chip", "aria-label": `Insert ${name} into the prompt` }));
  const warning = trained && trained < people.length ? [el("span", {}, ` These weights were trained with ${trained === 1 ? "one person" : `${trained} people`} in a picture, and often merge several.`)] : [];
  help.replaceChildren(...words, ...buttons, ...warning);
}

function insert(text) {
  const prompt = byId("prompt");
  prompt.setRangeText(text, prompt.selectionStart, prompt.selectionEnd, "end");
  prompt.dispatchEvent(new Event("input"));
  prompt.focus();
}
