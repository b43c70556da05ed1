// Saved people: listed, put into the picture, downloaded as files, and deleted with their files.

import { call, deleted, send } from "../api.js";
import { announce, button, byId, confirmed, count, day, download, el, rememberFile } from "../page.js";
import { dropPersona, usePersona } from "./people.js";

/** Show the saved people that the server has. */
export async function listPersonas() {
  const { personas } = await call("GET", "/v1/personas");
  const shown = personas.map(row);
  byId("personas").replaceChildren(...(shown.length ? [el("ul", { class: "list" }, shown)]
    : [el("p", { class: "soft" }, "Nobody yet. Save a person to draw them again without their photos.")]));
}

const fileOf = (persona) => `${persona.name.replace(/[^\p{L}\p{N}_-]+/gu, "-")}.safetensors`;

function row(persona) {
  const name = persona.name;
  rememberFile(persona.id, fileOf(persona));
  const trouble = el("p", { class: "trouble", role: "alert", hidden: true });
  const add = button("Add", () => {
    trouble.hidden = usePersona(persona);
    trouble.textContent = trouble.hidden ? "" : "The picture shows as many people as it can: remove one first.";
    if (trouble.hidden) announce(`${name} is in the picture.`);
  }, { "aria-label": `Add ${name} to the picture` });
  return el("li", {}, el("span", { class: "avatar", "aria-hidden": "true" }, name.slice(0, 1).toUpperCase()),
    el("div", { class: "grow" }, el("strong", {}, name),
      el("p", { class: "soft" }, `${count(persona.photos, "photo", "photos")} · kept until ${day(persona.expires)}`)),
    el("div", { class: "row" }, add,
      button("File", () => save(persona), { class: "quiet", "aria-label": `Download the persona file of ${name}` }),
      button("Delete", () => remove(persona), { class: "quiet", "aria-label": `Delete ${name}` })), trouble);
}

async function save(persona) {
  try {
    const answer = await send("GET", `/v1/personas/${persona.id}/file`);
    const address = URL.createObjectURL(await answer.blob());
    download(address, fileOf(persona));
    setTimeout(() => URL.revokeObjectURL(address), 60_000);
  } catch (error) {
    announce(error.message);
  }
}

async function remove(persona) {
  const sure = await confirmed(`Delete ${persona.name}?`, "The persona and its file are deleted from the server. Pictures that you drew stay.", "Delete");
  if (!sure) return;
  await deleted(`/v1/personas/${persona.id}`);
  dropPersona(persona.id);
  await listPersonas();
  announce(`${persona.name} is deleted.`);
  byId("personas").querySelector("button")?.focus();
}
