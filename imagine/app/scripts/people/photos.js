// The photos of the people: sent to the server, checked for faces there, and removed.

import { ApiError, call, deleted, forgetImage } from "../api.js";
import { announce, byId, count, rememberFile } from "../page.js";
import { addPerson, changed, people, removeFromPeople, show, showAll } from "./people.js";

/** Take photos that are dropped or pasted anywhere on the page. */
export function takeDropsAndPastes() {
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

export async function addFiles(person, files) {
  person.saved = null;
  person.trouble = "";
  person.busy += files.length;
  show(person);
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
    show(person);
    changed();
  }
}

export async function addExample(person, path) {
  const blob = await (await fetch(path)).blob();
  await addFiles(person, [new File([blob], path.split("/").pop(), { type: blob.type })]);
}

/** Ask the server which faces a photo shows, and what could be better. */
export async function check(person, photo) {
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
  show(person);
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

export async function removePhoto(person, photo) {
  person.photos = person.photos.filter((each) => each !== photo);
  person.shown = Math.max(0, person.shown - 1);
  show(person);
  changed();
  if (people.some((each) => each.photos.some((other) => other.upload === photo.upload))) return;
  forgetImage(`/v1/uploads/${photo.upload}/content`);
  await deleted(`/v1/uploads/${photo.upload}`).catch((error) => announce(error.message));
}

export function removePerson(person) {
  [...person.photos].forEach((photo) => removePhoto(person, photo));
  removeFromPeople(person);
  showAll();
  changed();
  byId("who-title").scrollIntoView({ block: "nearest" });
}

export async function chooseFace(person, photo, face) {
  photo.face = face;
  photo.whole = false;
  changed();
  await check(person, photo);
  person.node.querySelector(`[data-face="${face}"]`)?.focus();
}

/** Make another face of a photo a second person. */
export function otherPerson(photo) {
  const person = addPerson();
  const face = photo.report.faces.findIndex((_, number) => number !== photo.report.used);
  const copy = { ...photo, face, report: null };
  person.photos.push(copy);
  showAll();
  changed();
  check(person, copy);
}

/** Use the whole picture of a photo without a face, or no longer. */
export function switchWhole(person, photo) {
  photo.whole = !photo.whole;
  changed();
  show(person);
}

/** Return what was understood of a photo in one sentence. */
function sentence({ file, report, whole }) {
  if (report.used === -1) return whole ? `${file}: the whole picture is used.` : `${file}: no face was found.`;
  return `${file}: ${count(report.faces.length, "face", "faces")} found.`;
}
