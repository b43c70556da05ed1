// One person's photos: the faces found in them, the crop that is used, and the doctor's advice.

import { imageAddress, showImage } from "../api.js";
import { button, el } from "../page.js";
import { isFull, show } from "./people.js";
import { chooseFace, otherPerson, switchWhole } from "./photos.js";

/** Return the photo of a person that is looked at, with its faces, and all photos small. */
export function photoView(person) {
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
    if (!isFull()) words.append(button("The other face is a second person", () => otherPerson(photo), { class: "quiet" }));
  }
  if (!found) {
    const whole = button(photo.whole ? "Find a face after all" : "Use the whole picture", () => switchWhole(person, photo), { class: "quiet", "aria-pressed": String(photo.whole) });
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
    const node = button(photo.kind === "persona" ? "P" : "", () => { person.shown = place; show(person); }, {
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
