// The people of the picture: their photos, the faces found in them, the crop that is used, and the doctor's advice.

import { ApiError, call, deleted, forgetImage, imageAddress, showImage } from "./api.js";
import { announce, button, byId, count, el, openDialog, recall, remember, rememberFile, say } from "./page.js";
import { isName, personField } from "./recipe.js";

const NAMES = ["ann", "ben", "cleo", "dan"];
const ACCEPTED = "image/*,.heic,.heif,.safetensors";
const CONSENTS = [["self", "This is me"], ["agreed", "This person agreed"], ["invented", "This person is invented"]];

/** Each: name, photos [{upload, file, kind, width, height, face, whole, report}], saved {id, name} or null. */
export const people = [];
let most = NAMES.length;
let examples = [];
let told = { changed() {}, renamed() {}, saved() {} };

/** Begin with the people of the last visit. listeners: changed(), renamed(old, new), saved(persona). */
export async function setUpPeople(server, listeners) {
  told = listeners;
  most = Math.min(most, server.model?.most_people ?? most);
  examples = server.examples;
  byId("add-person").addEventListener("click", () => {
    const person = addPerson();
    renderAll();
    person.node.querySelector("input[type=file]").focus();
  });
  for (const kept of recall("people", [])) people.push({ ...fresh(), ...kept });
  if (!people.length) addPerson();
  renderAll();
  takeDropsAndPastes();
  await Promise.all(people.flatMap((person) => person.photos.map((photo) => check(person, photo))));
}

const fresh = () => ({ name: NAMES.find((name) => people.every((each) => each.name !== name)), photos: [], saved: null, shown: 0, busy: 0, trouble: "", node: null });

function addPerson() {
  const person = fresh();
  people.push(person);
  return person;
}

function changed() {
  remember("people", people.filter((person) => person.photos.length || person.saved).map(({ name, photos, saved }) => (
    { name, saved, photos: photos.map(({ report, ...photo }) => photo) })));
  told.changed();
}

/** Return why nothing can be drawn with these people, or "". */
export function whyNotReady() {
  if (people.every((person) => !person.photos.length && !person.saved)) return "Choose a photo of a person first.";
  const empty = people.find((person) => !person.photos.length && !person.saved);
  if (empty) return `Choose a photo of ${empty.name}, or remove this person.`;
  if (people.some((person) => person.busy)) return "A photo is still being read; wait a moment.";
  for (const photo of people.flatMap((person) => (person.saved ? [] : person.photos))) {
    if (photo.kind === "photo" && photo.report?.used === -1 && !photo.whole) {
      return `No face was found in ${photo.file}. Choose another photo, or use the whole picture.`;
    }
  }
  return "";
}

/** Put a saved person into the picture. Return false if it already shows as many people as it can. */
export function usePersona(persona) {
  let person = people.find((each) => !each.photos.length && !each.saved);
  if (!person && people.length >= most) return false;
  person ??= addPerson();
  person.saved = { id: persona.id, name: persona.name };
  const name = persona.name.toLowerCase();
  if (isName(name) && people.every((each) => each === person || each.name !== name)) rename(person, name);
  renderAll();
  changed();
  return true;
}

/** Take a deleted persona out of the picture. */
export function dropPersona(id) {
  people.filter((person) => person.saved?.id === id).forEach((person) => { person.saved = null; });
  renderAll();
  changed();
}

// --- photos ----------------------------------------------------------------------------------------------------------

function takeDropsAndPastes() {
  const target = () => people.find((person) => !person.photos.length && !person.saved) ?? people[0];
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    const own = people.find((person) => person.node.contains(event.target));
    addFiles(own ?? target(), event.dataTransfer.files);
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) addFiles(target(), event.clipboardData.files);
  });
}

async function addFiles(person, files) {
  person.saved = null;
  person.trouble = "";
  person.busy += files.length;
  render(person);
  for (const file of files) {
    try {
      const form = new FormData();
      form.append("photos", file, file.name || "photo.png");
      const [upload] = await call("POST", "/v1/uploads", { form });
      rememberFile(upload.id, file.name || "photo.png");
      const { id, kind, width, height } = upload;
      const photo = { upload: id, file: file.name || "photo.png", kind, width, height, face: "largest", whole: false, report: null };
      person.photos.push(photo);
      person.shown = person.photos.length - 1;
      await check(person, photo);
    } catch (error) {
      person.trouble = `${file.name || "The photo"}: ${error.message}`;
      announce(person.trouble);
    }
    person.busy -= 1;
    render(person);
    changed();
  }
}

async function addExample(person, path) {
  const blob = await (await fetch(path)).blob();
  await addFiles(person, [new File([blob], path.split("/").pop(), { type: blob.type })]);
}

/** Ask the server which faces a photo shows, and what could be better. */
async function check(person, photo) {
  if (photo.kind !== "photo") return;
  try {
    photo.report = await checked(photo);
    announce(sentence(photo));
  } catch (error) {
    if (error.status === 404) {
      person.photos = person.photos.filter((each) => each !== photo);
      person.trouble = `${photo.file} is no longer on the server, which keeps photos for a while only. Choose it again.`;
    } else person.trouble = `${photo.file}: ${error.message}`;
    changed();
  }
  render(person);
}

async function checked({ upload, face }) {
  let answer = await call("POST", "/v1/photos/check", { json: { upload, face } });
  if (answer.faces) return answer;
  while (["queued", "running"].includes(answer.state)) { // others are before it
    await new Promise((resolve) => setTimeout(resolve, 1000));
    answer = await call("GET", `/v1/jobs/${answer.id}`);
  }
  await deleted(`/v1/jobs/${answer.id}`);
  if (answer.state !== "succeeded") throw new ApiError(422, answer.error ?? { message: "The photo was not read." });
  return answer.result;
}

async function removePhoto(person, photo) {
  person.photos = person.photos.filter((each) => each !== photo);
  person.shown = Math.max(0, person.shown - 1);
  render(person);
  changed();
  if (people.some((each) => each.photos.some((other) => other.upload === photo.upload))) return;
  forgetImage(`/v1/uploads/${photo.upload}/content`);
  await deleted(`/v1/uploads/${photo.upload}`).catch((error) => announce(error.message));
}

function removePerson(person) {
  [...person.photos].forEach((photo) => removePhoto(person, photo));
  people.splice(people.indexOf(person), 1);
  if (!people.length) addPerson();
  renderAll();
  changed();
  byId("who-title").scrollIntoView({ block: "nearest" });
}

async function chooseFace(person, photo, face) {
  photo.face = face;
  photo.whole = false;
  changed();
  await check(person, photo);
  person.node.querySelector(`[data-face="${face}"]`)?.focus();
}

function otherPerson(photo) {
  const person = addPerson();
  const face = photo.report.faces.findIndex((_, number) => number !== photo.report.used);
  const copy = { ...photo, face, report: null };
  person.photos.push(copy);
  renderAll();
  changed();
  check(person, copy);
}

/** Return what was understood of a photo in one sentence. */
function sentence({ file, report, whole }) {
  if (report.used === -1) return whole ? `${file}: the whole picture is used.` : `${file}: no face was found.`;
  return `${file}: ${count(report.faces.length, "face", "faces")} found.`;
}

// --- the cards -------------------------------------------------------------------------------------------------------

function renderAll() {
  byId("people").replaceChildren(...people.map((person) => (person.node = el("article", { class: "card person" }))));
  people.forEach(render);
  byId("add-person").hidden = people.length >= most || people.every((person) => !person.photos.length && !person.saved);
}

function render(person) {
  if (!people.includes(person)) return;
  const number = people.indexOf(person) + 1;
  const filled = person.photos.length || person.saved;
  person.node.setAttribute("aria-label", people.length > 1 ? `Person ${number}: ${person.name}` : "The person");
  person.node.setAttribute("aria-busy", person.busy > 0);
  const trouble = el("p", { class: "trouble", role: "alert" });
  say(trouble, person.trouble);
  person.node.replaceChildren(...[
    people.length > 1 ? header(person, number) : null,
    person.saved ? savedView(person) : person.photos.length ? photoView(person) : dropZone(person),
    person.busy ? el("p", { class: "soft busy" }, "Looking at the photo …") : null,
    trouble,
    filled ? footer(person) : null,
  ].filter(Boolean));
  byId("add-person").hidden = people.length >= most || people.every((each) => !each.photos.length && !each.saved);
}

function header(person, number) {
  const id = `name-${number}`;
  const trouble = el("p", { class: "trouble", role: "alert", hidden: true });
  const input = el("input", {
    id, value: person.name, autocomplete: "off", maxlength: 40,
    onchange: () => {
      const name = input.value.trim();
      if (!isName(name)) say(trouble, "A name begins with a letter, and has letters, numbers, spaces, ' and - only.");
      else if (people.some((each) => each !== person && each.name === name)) say(trouble, `${name} is taken: choose another name.`);
      else {
        rename(person, name);
        say(trouble, "");
        changed();
      }
    },
  });
  const remove = button("Remove", () => removePerson(person), { class: "quiet", "aria-label": `Remove ${person.name}` });
  return el("div", { class: "person-head" }, el("label", { for: id }, "Name"), input, remove, trouble);
}

function rename(person, name) {
  const old = person.name;
  person.name = name;
  person.node?.setAttribute("aria-label", `Person ${people.indexOf(person) + 1}: ${name}`);
  told.renamed(old, name);
}

/** Return a label that opens the browser's choice of files; the input stays reachable by keyboard. */
function chooser(person, text, className) {
  const input = el("input", {
    type: "file", multiple: true, accept: ACCEPTED, class: "unseen",
    onchange: () => { if (input.files.length) addFiles(person, input.files); },
  });
  return el("label", { class: className }, input, text);
}

function dropZone(person) {
  const zone = el("div", {
    class: "drop",
    ondragenter: () => zone.classList.add("over"),
    ondragleave: (event) => { if (!zone.contains(event.relatedTarget)) zone.classList.remove("over"); },
    ondrop: () => zone.classList.remove("over"),
  }, el("p", {}, el("strong", {}, "Drop a photo here")), chooser(person, "Choose a photo", "button"),
  el("p", { class: "soft" }, "One face, from the front, well lit. Or a saved persona file."));
  if (examples.length) {
    zone.append(el("div", { class: "examples", role: "group", "aria-label": "Example people" },
      el("p", { class: "soft" }, "Or take an invented person:"),
      examples.map((path, place) => button("", () => addExample(person, path), { class: "example", "aria-label": `Example person ${place + 1}` }))));
    zone.querySelectorAll(".example").forEach((node, place) => node.append(el("img", { src: examples[place], alt: "", width: 52, height: 52 })));
  }
  return zone;
}

function savedView(person) {
  return el("div", { class: "row saved" }, el("span", { class: "avatar", "aria-hidden": "true" }, person.saved.name.slice(0, 1).toUpperCase()),
    el("div", { class: "grow" }, el("strong", {}, person.saved.name), el("p", { class: "soft" }, "A saved person")));
}

function photoView(person) {
  const photo = person.photos[Math.min(person.shown, person.photos.length - 1)];
  const view = el("div", { class: "view" }, photo.kind === "persona" ? personaFile(photo) : [framed(person, photo), reading(person, photo)]);
  if (person.photos.length > 1) view.append(thumbnails(person, photo));
  return view;
}

const personaFile = (photo) => el("div", { class: "row saved" }, el("span", { class: "avatar", "aria-hidden": "true" }, "P"),
  el("div", { class: "grow" }, el("strong", {}, photo.file), el("p", { class: "soft" }, "A persona file")));

/** Return the photo with a button around every face. */
function framed(person, photo) {
  const { report, width, height } = photo;
  const quarter = (report?.turned ?? 0) % 180 !== 0;
  const [across, down] = quarter ? [height, width] : [width, height];
  const path = `/v1/uploads/${photo.upload}/content`;
  const image = el("img", { alt: `Photo ${photo.file}` });
  if (report?.turned) turn(image, path, report.turned);
  else showImage(image, path);
  const frame = el("div", { class: "frame" }, image);
  frame.style.aspectRatio = `${across} / ${down}`;
  frame.style.setProperty("--ratio", across / down);
  (report?.faces ?? []).forEach((face, number) => {
    const used = number === report.used;
    const node = button("", () => chooseFace(person, photo, number), {
      class: "face", "data-face": number, "aria-pressed": String(used),
      "aria-label": `Face ${number + 1} of ${report.faces.length}${used ? ", used" : ": use this one"}`,
    });
    Object.assign(node.style, {
      left: `${(face.left / across) * 100}%`, top: `${(face.top / down) * 100}%`,
      width: `${(face.width / across) * 100}%`, height: `${(face.height / down) * 100}%`,
    });
    frame.append(node);
  });
  return el("figure", { class: "photo" }, frame);
}

/** Show a picture turned counter-clockwise, as the server turned it before it looked for faces. */
async function turn(image, path, degrees) {
  const source = new Image();
  source.src = await imageAddress(path);
  await source.decode();
  const quarter = degrees % 180 !== 0;
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = quarter ? [source.height, source.width] : [source.width, source.height];
  const context = canvas.getContext("2d");
  context.translate(canvas.width / 2, canvas.height / 2);
  context.rotate((-degrees * Math.PI) / 180);
  context.drawImage(source, -source.width / 2, -source.height / 2);
  image.src = canvas.toDataURL("image/jpeg", 0.9);
}

/** Return the crop that is used, and what the doctor says of it. */
function reading(person, photo) {
  const { report } = photo;
  if (!report) return el("p", { class: "soft" }, "Looking for faces …");
  const found = report.used >= 0;
  const words = el("div", { class: "grow" });
  if (report.advice.length) words.append(el("ul", { class: "advice" }, report.advice.map((each) => el("li", {}, each))));
  else words.append(el("p", { class: "good" }, "A good photo."));
  if (report.turned) words.append(el("p", { class: "soft" }, `The photo lay on its side; it was turned by ${report.turned}°.`));
  if (report.faces.length > 1) {
    words.append(el("p", { class: "soft" }, `${report.faces.length} faces. Press another frame to use that face.`));
    if (people.length < most) words.append(button("The other face is a second person", () => otherPerson(photo), { class: "quiet" }));
  }
  if (!found) {
    const whole = button(photo.whole ? "Find a face after all" : "Use the whole picture", () => {
      photo.whole = !photo.whole;
      changed();
      render(person);
    }, { class: "quiet", "aria-pressed": String(photo.whole) });
    words.append(whole);
    if (photo.whole) words.append(el("p", { class: "soft" }, "The whole picture is used, so the likeness will be poor."));
  }
  const crop = found ? el("figure", { class: "crop" },
    el("img", { src: `data:image/png;base64,${report.crop_png}`, alt: "The face that is used" }),
    el("figcaption", {}, "Face used")) : null;
  return el("div", { class: "row reading" }, crop, words);
}

function thumbnails(person, shown) {
  return el("div", { class: "thumbs", role: "group", "aria-label": "Photos of this person" }, person.photos.map((photo, place) => {
    const node = button(photo.kind === "persona" ? "P" : "", () => { person.shown = place; render(person); }, {
      class: "thumb", "aria-pressed": String(photo === shown), "aria-label": `Photo ${place + 1}: ${photo.file}`,
    });
    if (photo.kind === "photo") {
      const image = el("img", { alt: "" });
      showImage(image, `/v1/uploads/${photo.upload}/content`);
      node.append(image);
    }
    return node;
  }));
}

function footer(person) {
  const shown = person.photos[Math.min(person.shown, person.photos.length - 1)];
  return el("div", { class: "row tools" }, ...[
    person.saved ? null : chooser(person, "Add a photo", "button quiet"),
    shown && person.photos.length > 1 ? button("Remove this photo", () => removePhoto(person, shown), { class: "quiet" }) : null,
    person.saved ? null : button("Save person …", () => savePerson(person), { class: "quiet" }),
    people.length > 1 ? null : button("Remove", () => removePerson(person), { class: "quiet" }),
  ].filter(Boolean));
}

/** Ask for a name and the basis of the person's consent, and keep the person under it. */
async function savePerson(person) {
  const saved = await openDialog("Save this person", (close) => {
    const trouble = el("p", { class: "trouble", role: "alert", hidden: true });
    const name = el("input", { id: "save-name", value: people.length > 1 ? person.name : "", maxlength: 80, autofocus: true, autocomplete: "off" });
    const choices = CONSENTS.map(([value, text]) => el("label", { class: "choice" }, el("input", { type: "radio", name: "consent", value }), text));
    const submit = el("button", { type: "submit", class: "primary" }, "Save");
    return el("form", {
      novalidate: true,
      onsubmit: async (event) => {
        event.preventDefault();
        const consent = event.target.elements.consent.value;
        if (!name.value.trim()) return say(trouble, "Give the person a name.");
        if (!consent) return say(trouble, "Say who the person is: only people who agreed may be saved.");
        submit.disabled = true;
        try {
          const { uploads, face, on_no_face } = personField(person);
          close(await call("POST", "/v1/personas", { json: { name: name.value.trim(), uploads, face, on_no_face, consent } }));
        } catch (error) {
          say(trouble, error.message);
          submit.disabled = false;
        }
      },
    }, el("label", { for: "save-name" }, "Name"), name,
    el("fieldset", { class: "plain" }, el("legend", {}, "Who is it?"), choices),
    el("p", { class: "soft" }, "What is kept are numbers that describe the face, not the photos. You can delete them at any time."),
    trouble, el("div", { class: "row end" }, submit));
  });
  if (!saved) return;
  if (saved.state) announce("The person is still being read, and will appear under Saved people.");
  else announce(`${saved.name} is saved.`);
  told.saved();
}
