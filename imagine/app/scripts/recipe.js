// What draws a picture: the request from people and settings, and from a finished picture the command, the JSON and
// the differences to another one. Pure functions; nothing here touches the page or the server.

// Fields of the API's request that act on a picture, in the order in which they are shown.
const ACTING = [
  "prompt", "people", "seed", "steps", "guidance_scale", "identity_scale", "identity_guidance_scale",
  "guidance_rescale", "guidance_balance", "identity_window", "identity_blocks", "refine_faces", "layout", "attempts",
  "width", "height", "negative_prompt", "format", "quality",
];
const WORDS = {
  seed: "seed", steps: "steps", guidance_scale: "guidance", identity_scale: "identity", layout: "layout",
  attempts: "attempts", prompt: "prompt", people: "people",
};
const USUAL = { attempts: 1, negative_prompt: "", format: "png", quality: 95, label: "" };
export const STRIP = [0, 0.25, 0.5, 0.75, 1];
export const PREVIEWS = 6;
const NAME = /^[\p{L}_][\p{L}\p{N}_' -]*$/u; // as `imagine generate --reference NAME=PHOTO` takes it

export const isName = (name) => NAME.test(name);

/** Return the field `people` of a request, or the fields of a single person who needs no name. */
function peopleFields(people, prompt) {
  const given = people.map((person) => [person.name, personField(person)]);
  if (!given.length) return {};
  if (given.length === 1 && !prompt.includes(`{${given[0][0]}}`)) {
    const { persona, uploads, face, on_no_face } = given[0][1];
    if (persona) return { persona };
    if (!Array.isArray(face)) return { uploads, face, on_no_face };
  }
  return { people: Object.fromEntries(given) };
}

/** Return how the API names one person: a persona, or photos with one choice of a face for each. */
export function personField(person) {
  if (person.saved) return { persona: person.saved.id };
  const faces = person.photos.map((photo) => photo.face);
  return {
    uploads: person.photos.map((photo) => photo.upload),
    face: faces.every((face) => face === faces[0]) ? faces[0] : faces,
    on_no_face: person.photos.some((photo) => photo.whole) ? "whole" : "error",
  };
}

/** Return the body of a request for pictures. settings: of the form; more: what a comparison changes. */
export function requestOf(people, settings, more = {}) {
  const several = people.length > 1;
  const body = {
    prompt: settings.prompt, ...peopleFields(people, settings.prompt), n: settings.n, seed: settings.seed,
    steps: settings.steps, guidance_scale: settings.guidance_scale, identity_scale: settings.identity_scale,
    layout: several && settings.ordered ? "left to right" : null, attempts: several ? settings.attempts : 1,
    previews: PREVIEWS, ...more,
  };
  return Object.fromEntries(Object.entries(body).filter(([, value]) => value !== null && value !== undefined));
}

/** Return the settings of a finished picture as a body of POST /v1/pictures that draws it again. */
export function bodyOf(settings) {
  const fields = ACTING.map((name) => [name, settings[name]]).filter(
    ([name, value]) => value !== null && value !== undefined && value !== USUAL[name]);
  const body = Object.fromEntries(fields);
  if (!Object.keys(body.people ?? {}).length) delete body.people;
  else if ("" in body.people) { // one person without a name
    const { persona, uploads, face, on_no_face } = body.people[""];
    delete body.people;
    Object.assign(body, persona ? { persona } : { uploads, face, on_no_face });
  } else body.people = Object.fromEntries(Object.entries(body.people).map(([name, each]) => [name, tidy(each)]));
  return body;
}

const tidy = ({ persona, uploads, face, on_no_face }) => (persona ? { persona } : { uploads, face, on_no_face });

const quote = (word) => (/^[\w./:=,@%+-]+$/u.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);

/** Return an option and its value as words of a shell; a value that begins like an option is joined to it. */
const option = (flag, value) => (String(value).startsWith("-") ? [quote(`${flag}=${value}`)] : [flag, quote(String(value))]);

/** Return the `imagine generate` command that draws a picture again, and a sentence on what it cannot say.
 *  fileOf(id): the name of the file of an upload or a persona. weights: folder, or null for the shipped ones. */
export function commandOf(settings, fileOf, weights) {
  const words = ["imagine", "generate"];
  const notes = [];
  const faces = new Set();
  const whole = new Set();
  for (const [name, person] of Object.entries(settings.people ?? {})) {
    const ids = person.persona ? [person.persona] : person.uploads;
    for (const id of ids) words.push(...option("--reference", name ? `${name}=${fileOf(id)}` : fileOf(id)));
    if (!person.persona) {
      [person.face].flat().forEach((face) => faces.add(face));
      whole.add(person.on_no_face);
    }
  }
  words.push(...option("--prompt", settings.prompt), ...option("--seed", settings.seed));
  const given = [
    ["--steps", settings.steps], ["--guidance-scale", settings.guidance_scale],
    ["--identity-scale", settings.identity_scale], ["--identity-guidance-scale", settings.identity_guidance_scale],
    ["--identity-window", settings.identity_window?.join(":")], ["--identity-blocks", settings.identity_blocks],
  ];
  for (const [flag, value] of given) if (value !== null && value !== undefined) words.push(...option(flag, value));
  if (settings.guidance_balance) words.push("--guidance-balance");
  if (typeof settings.refine_faces === "boolean") words.push(settings.refine_faces ? "--refine-faces" : "--no-refine-faces");
  if (typeof settings.layout === "string") words.push(...option("--layout", settings.layout));
  if (faces.size === 1 && !faces.has("largest")) words.push(...option("--face", [...faces][0]));
  if (faces.size > 1) notes.push("The command takes one choice of a face for all photos: save these people first, and give their files.");
  if (whole.has("whole")) words.push("--on-no-face", "whole");
  if (weights) words.push(...option("--weights", weights));
  if (!Object.keys(settings.people ?? {}).length) notes.push("The command needs a photo of a person: add --reference.");
  return { command: [...words, "--output", `picture-${settings.seed}.png`].join(" "), notes };
}

/** Return the settings by which pictures differ, as [name, [value of each]]; the seed only if it differs. */
export function differences(all) {
  const shown = (value) => (value === null || value === undefined ? "default" : typeof value === "object" ? JSON.stringify(value) : String(value));
  return ACTING.map((name) => [WORDS[name] ?? name.replaceAll("_", " "), all.map((settings) => shown(settings[name]))])
    .filter(([, values]) => values.some((value) => value !== values[0]));
}

/** Return the settings of a picture or job in one line. */
export function summary(settings) {
  const parts = [
    settings.seed === undefined ? null : `seed ${settings.seed}`,
    settings.identity_scale === null || settings.identity_scale === undefined ? null : `identity ${settings.identity_scale}`,
    settings.guidance_scale === null || settings.guidance_scale === undefined ? null : `guidance ${settings.guidance_scale}`,
    settings.steps === null || settings.steps === undefined ? null : `${settings.steps} steps`,
  ];
  return parts.filter(Boolean).join(" · ");
}
