// The cards of the people: a name, a photo or a saved person, and what can be done with them.

import { call } from "../api.js";
import { announce, button, byId, el, openDialog, say } from "../page.js";
import { addPerson, beginPeople, changed, isFull, people, rename } from "./people.js";
import { photoView } from "./photo_view.js";
import { addExample, addFiles, check, removePerson, removePhoto, takeDropsAndPastes } from "./photos.js";
import { isName, personField } from "../recipe.js";

const ACCEPTED = "image/*,.heic,.heif,.safetensors";
const CONSENTS = [["self", "This is me"], ["agreed", "This person agreed"], ["invented", "This person is invented"]];

let examples = [];
let tellSaved = () => {};

/** Show the people of the last visit. listeners: changed(), renamed(old, new), saved(persona). */
export async function setUpPeople(server, { saved, ...listeners }) {
  tellSaved = saved;
  examples = server.examples;
  beginPeople(server, { ...listeners, show: render, showAll: renderAll });
  byId("add-person").addEventListener("click", () => {
    const person = addPerson();
    renderAll();
    person.node.querySelector("input[type=file]").focus();
  });
  renderAll();
  takeDropsAndPastes();
  await Promise.all(people.flatMap((person) => person.photos.map((photo) => check(person, photo))));
}

function renderAll() {
  byId("people").replaceChildren(...people.map((person) => (person.node = el("article", { class: "card person" }))));
  people.forEach(render);
  byId("add-person").hidden = isFull() || people.every((person) => !person.photos.length && !person.saved);
}

function render(person) {
  if (!people.includes(person)) return;
  const filled = person.photos.length || person.saved;
  person.node.setAttribute("aria-label", label(person));
  person.node.setAttribute("aria-busy", person.busy > 0);
  const trouble = el("p", { class: "trouble", role: "alert" });
  say(trouble, person.trouble);
  person.node.replaceChildren(...[
    people.length > 1 ? header(person) : null,
    person.saved ? savedView(person) : person.photos.length ? photoView(person) : dropZone(person),
    person.busy ? el("p", { class: "soft busy" }, "Looking at the photo …") : null,
    trouble,
    filled ? footer(person) : null,
  ].filter(Boolean));
  byId("add-person").hidden = isFull() || people.every((each) => !each.photos.length && !each.saved);
}

const label = (person) => (people.length > 1 ? `Person ${people.indexOf(person) + 1}: ${person.name}` : "The person");

function header(person) {
  const id = `name-${people.indexOf(person) + 1}`;
  const trouble = el("p", { class: "trouble", role: "alert", hidden: true });
  const input = el("input", {
    id, value: person.name, autocomplete: "off", maxlength: 40,
    onchange: () => {
      const name = input.value.trim();
      if (!isName(name)) say(trouble, "A name begins with a letter, and has letters, numbers, spaces, ' and - only.");
      else if (people.some((each) => each !== person && each.name === name)) say(trouble, `${name} is taken: choose another name.`);
      else {
        rename(person, name);
        person.node.setAttribute("aria-label", label(person));
        say(trouble, "");
        changed();
      }
    },
  });
  const remove = button("Remove", () => removePerson(person), { class: "quiet", "aria-label": `Remove ${person.name}` });
  return el("div", { class: "person-head" }, el("label", { for: id }, "Name"), input, remove, trouble);
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
  tellSaved();
}
