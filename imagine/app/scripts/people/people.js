// The people of the picture: who they are, and what is known of them. The browser keeps them for the next visit.

import { recall, remember } from "../page.js";
import { isName } from "../recipe.js";

const NAMES = ["ann", "ben", "cleo", "dan"];

/** Each: name, photos [{upload, file, kind, width, height, face, whole, report}], saved {id, name} or null, node. */
export const people = [];
let most = NAMES.length;
let told = { changed() {}, renamed() {}, show() {}, showAll() {} };

/**
 * Begin with the people of the last visit.
 * listeners: changed(), renamed(old, new), show(person) and showAll() bring one card or all cards up to date.
 */
export function beginPeople(server, listeners) {
  told = listeners;
  most = Math.min(most, server.model?.most_people ?? most);
  for (const kept of recall("people", [])) people.push({ ...fresh(), ...kept });
  if (!people.length) addPerson();
}

const fresh = () => ({ name: NAMES.find((name) => people.every((each) => each.name !== name)), photos: [], saved: null, shown: 0, busy: 0, trouble: "", node: null });

export function addPerson() {
  const person = fresh();
  people.push(person);
  return person;
}

export function removeFromPeople(person) {
  people.splice(people.indexOf(person), 1);
  if (!people.length) addPerson();
}

/** Return whether the picture shows as many people as it can. */
export const isFull = () => people.length >= most;

/** Keep what is known for the next visit, and tell the page that it changed. */
export function changed() {
  remember("people", people.filter((person) => person.photos.length || person.saved).map(({ name, photos, saved }) => (
    { name, saved, photos: photos.map(({ report, ...photo }) => photo) })));
  told.changed();
}

export const show = (person) => told.show(person);
export const showAll = () => told.showAll();

export function rename(person, name) {
  const old = person.name;
  person.name = name;
  told.renamed(old, name);
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
  if (!person && isFull()) return false;
  person ??= addPerson();
  person.saved = { id: persona.id, name: persona.name };
  const name = persona.name.toLowerCase();
  if (isName(name) && people.every((each) => each === person || each.name !== name)) rename(person, name);
  showAll();
  changed();
  return true;
}

/** Take a deleted persona out of the picture. */
export function dropPersona(id) {
  people.filter((person) => person.saved?.id === id).forEach((person) => { person.saved = null; });
  showAll();
  changed();
}
