// The pictures: jobs while they wait and are drawn, with previews and progress, and then as finished pictures.

import { call, deleted, follow, forgetImage, imageAddress, showImage, unfollow } from "./api.js";
import { announce, button, byId, confirmed, copyButton, count, download, el, openDialog, recall, span } from "./page.js";
import { bodyOf, commandOf, differences, summary } from "./recipe.js";

const PAGE = 30; // jobs asked for at a time
const KINDS = { strip: "Identity strip", pair: "Two settings" };
const ENDED = ["succeeded", "failed", "canceled", "expired"];

const sets = new Map(); // label of a comparison, or id of a job -> { key, jobs, node }
let told = { reuse() {}, again() {}, pin() {} };
let weights = null;
let older = null;

/** Show the jobs that the server has, and follow those that have not ended. listeners: reuse(settings), again(jobs, key), pin(job, picture). */
export async function setUpGallery(server, listeners) {
  told = listeners;
  weights = server.weights;
  byId("older").addEventListener("click", () => loadPage(older));
  await loadPage(null);
}

async function loadPage(cursor) {
  const found = await call("GET", `/v1/jobs?kind=pictures&limit=${PAGE}${cursor ? `&cursor=${encodeURIComponent(cursor)}` : ""}`);
  found.jobs.forEach((job) => addJob(job, true));
  older = found.next;
  byId("older").hidden = !older;
  tellEmpty();
}

const tellEmpty = () => { byId("empty").hidden = sets.size > 0; };

/** Add an accepted job to the gallery; those with one label share a card. */
export function addJob(job, isOlder = false) {
  const key = job.request.label || job.id;
  let group = sets.get(key);
  if (!group) {
    group = { key, jobs: [], node: el("article", { class: "card set", tabindex: -1 }) };
    sets.set(key, group);
    if (isOlder) byId("gallery").append(group.node);
    else byId("gallery").prepend(group.node);
  }
  group.jobs.push(job);
  group.jobs.sort((one, other) => one.created - other.created);
  render(group);
  tellEmpty();
  if (!isOlder) group.node.scrollIntoView({ block: "nearest" });
  if (!ENDED.includes(job.state)) follow(job.id, (kind, data) => happened(group, job, kind, data));
}

// --- what happens to a job -------------------------------------------------------------------------------------------

async function happened(group, job, kind, data) {
  if (kind === "preview") {
    job.preview = `data:image/jpeg;base64,${data.jpeg}`;
    const image = group.node.querySelector(`[data-preview="${job.id}"]`);
    if (image) Object.assign(image, { src: job.preview, hidden: false });
  } else if (kind === "progress" || kind === "position" || kind === "queued") {
    Object.assign(job, { step: data.step ?? job.step, steps: data.steps ?? job.steps, stage: data.stage ?? job.stage, position: data.position ?? null });
    if (kind === "progress") job.firstAt ??= { at: data.at, step: data.step };
    if (kind === "progress" && job.state !== "running") {
      job.state = "running";
      render(group);
    }
    job.now = data.at;
    showProgress(group);
  } else if (kind === "started") {
    Object.assign(job, { state: "running", position: null });
    render(group);
  } else if (kind === "gone") {
    removeJobs(group, [job]);
  } else {
    try {
      Object.assign(job, await call("GET", `/v1/jobs/${job.id}`));
    } catch (error) {
      Object.assign(job, { state: "failed", error: { message: error.message } });
    }
    render(group);
    if (group.jobs.every((each) => ENDED.includes(each.state))) announce(outcome(group));
  }
}

function outcome(group) {
  const failed = group.jobs.find((job) => job.error);
  const pictures = group.jobs.reduce((sum, job) => sum + job.pictures.length, 0);
  return failed ? failed.error.message : pictures ? `${count(pictures, "picture is", "pictures are")} done.` : "Canceled.";
}

function progressOf(group) {
  const live = group.jobs.filter((job) => !ENDED.includes(job.state));
  const done = group.jobs.reduce((sum, job) => sum + (ENDED.includes(job.state) ? 1 : job.steps ? job.step / job.steps : 0), 0);
  return { live, share: done / group.jobs.length };
}

function progressWords({ live }) {
  const waiting = live.filter((job) => job.state === "queued");
  if (waiting.length === live.length) {
    const first = Math.min(...waiting.map((job) => job.position ?? Infinity));
    return first === 1 ? "Next in the queue" : Number.isFinite(first) ? `Number ${first} in the queue` : "In the queue";
  }
  const job = live.find((each) => each.state === "running" && each.steps) ?? live.find((each) => each.state === "running");
  if (!job.steps) return "Looking at the people …";
  const began = job.firstAt;
  const pace = began && job.step > began.step ? (job.now - began.at) / (job.step - began.step) : 0;
  const left = pace * (job.steps - job.step);
  const stage = job.stage && job.stage !== "denoising" ? `${job.stage[0].toUpperCase()}${job.stage.slice(1)}: s` : "S";
  return `${stage}tep ${job.step} of ${job.steps}${left >= 1 ? ` · about ${span(left)} left` : ""}`;
}

function showProgress(group) {
  const bar = group.node.querySelector("progress");
  if (!bar) return;
  const progress = progressOf(group);
  if (!progress.live.length) return;
  const queued = progress.live.every((job) => job.state === "queued");
  if (queued) bar.removeAttribute("value");
  else bar.value = progress.share;
  group.node.querySelector(".stage").textContent = progressWords(progress);
}

async function cancel(group, node) {
  node.disabled = true;
  for (const job of group.jobs.filter((each) => !ENDED.includes(each.state))) {
    try {
      const found = await call("POST", `/v1/jobs/${job.id}/cancel`);
      if (ENDED.includes(found.state)) {
        unfollow(job.id);
        Object.assign(job, found);
        render(group);
        announce("Canceled.");
      }
    } catch (error) {
      announce(error.message);
      node.disabled = false;
    }
  }
}

async function removeAll(group) {
  const pictures = group.jobs.reduce((sum, job) => sum + job.pictures.length, 0);
  if (pictures && !await confirmed("Delete?", `${count(pictures, "picture is", "pictures are")} deleted from the server, with the file.`, "Delete")) return;
  for (const job of group.jobs) {
    unfollow(job.id);
    await deleted(`/v1/jobs/${job.id}`);
    job.pictures.forEach((picture) => forgetImage(picture.url));
  }
  removeJobs(group, [...group.jobs]);
  announce("Deleted.");
}

async function removePicture(group, job, picture) {
  if (!await confirmed("Delete this picture?", "The picture is deleted from the server, with its file.", "Delete")) return;
  await deleted(`/v1/pictures/${picture.id}`);
  forgetImage(picture.url);
  job.pictures = job.pictures.filter((each) => each !== picture);
  if (job.pictures.length) render(group);
  else {
    await deleted(`/v1/jobs/${job.id}`);
    removeJobs(group, [job]);
  }
  announce("Deleted.");
}

function removeJobs(group, jobs) {
  group.jobs = group.jobs.filter((job) => !jobs.includes(job));
  if (group.jobs.length) return render(group);
  const next = group.node.nextElementSibling ?? group.node.previousElementSibling;
  const focused = group.node.contains(document.activeElement) || document.activeElement === document.body;
  sets.delete(group.key);
  group.node.remove();
  if (focused) next?.focus();
  return tellEmpty();
}

// --- cards -----------------------------------------------------------------------------------------------------------

function render(group) {
  const focused = group.node.contains(document.activeElement);
  const [job] = group.jobs;
  const kind = KINDS[group.key.split("-")[0]];
  const live = group.jobs.some((each) => !ENDED.includes(each.state));
  const alike = { ...job.request, seed: job.pictures[0]?.seed ?? job.request.seed };
  group.node.setAttribute("aria-busy", live);
  group.node.replaceChildren(...[
    el("h3", { title: job.request.prompt }, kind ? el("span", { class: "tag" }, kind) : null, job.request.prompt),
    group.jobs.length > 1 || live ? null : el("p", { class: "soft facts" }, summary(alike)),
    el("div", { class: `tiles ${group.jobs.length > 1 ? "compared" : ""}`, "data-count": tiles(group).length }, tiles(group)),
    live ? liveRow(group) : null,
    ...group.jobs.filter((each) => each.error).map((each) => el("p", { class: "trouble", role: "alert" }, each.error.message)),
    group.jobs.every((each) => each.state === "canceled") ? el("p", { class: "soft" }, "Canceled before it was done.") : null,
    notesOf(group),
    live ? null : toolsRow(group),
  ].filter(Boolean));
  if (live) showProgress(group);
  if (focused && !group.node.contains(document.activeElement)) group.node.focus();
}

function tiles(group) {
  const several = group.jobs.length > 1;
  const differing = several ? differences(group.jobs.map((job) => job.request)) : [];
  return group.jobs.flatMap((job, place) => {
    const caption = differing.map(([name, values]) => `${name} ${values[place]}`).join(" · ");
    if (job.state === "succeeded") return job.pictures.map((picture) => pictureTile(group, job, picture, caption));
    if (ENDED.includes(job.state)) return several ? [el("figure", { class: "tile" }, el("div", { class: "blank" }, job.state), el("figcaption", {}, caption))] : [];
    return Array.from({ length: job.n }, (_, number) => waitingTile(job, number, caption));
  });
}

function waitingTile(job, number, caption) {
  const image = el("img", { alt: "Preview", hidden: !job.preview || number > 0, src: number === 0 ? job.preview : null });
  if (number === 0) image.dataset.preview = job.id;
  return el("figure", { class: "tile waiting" }, el("div", { class: "blank" }, image), caption ? el("figcaption", {}, caption) : null);
}

function pictureTile(group, job, picture, caption) {
  const image = el("img", { alt: `Generated: ${job.request.prompt}`, width: picture.width, height: picture.height });
  showImage(image, picture.url);
  const open = button("", () => showPicture(group, job, picture), { class: "picture", "aria-label": `Open ${caption || `the picture with seed ${picture.seed}`}` });
  open.append(image);
  return el("figure", { class: "tile" }, open, caption ? el("figcaption", {}, caption) : null,
    isAlone(group) ? null : el("div", { class: "row tools" }, pictureTools(group, job, picture, caption)));
}

const isAlone = (group) => group.jobs.length === 1 && group.jobs[0].pictures.length === 1;

function pictureTools(group, job, picture, caption) {
  const which = caption || `the picture with seed ${picture.seed}`;
  return [
    group.jobs.length > 1 ? null : button("Download", () => save(picture), { class: "quiet", "aria-label": `Download ${which}` }),
    button("Details", () => showPicture(group, job, picture), { class: "quiet", "aria-label": `Details and command of ${which}` }),
  ];
}

function liveRow(group) {
  const node = button("Cancel", () => cancel(group, node));
  return el("div", { class: "row live" }, el("div", { class: "grow" },
    el("progress", { max: 1, "aria-label": "Progress" }), el("p", { class: "soft stage" })), node);
}

function toolsRow(group) {
  const failed = group.jobs.some((job) => job.state !== "succeeded");
  return el("div", { class: "row tools" }, isAlone(group) ? pictureTools(group, group.jobs[0], group.jobs[0].pictures[0], "") : null,
    button(failed ? "Try again" : "Draw again", () => told.again(group.jobs, group.key), { class: "quiet" }),
    button(failed ? "Remove" : "Delete", () => removeAll(group), { class: "quiet" }));
}

/** Return what the server says about the pictures of a card: doubtful faces, people who are not shown, and so on. */
function notesOf(group) {
  const notes = new Set();
  for (const { result } of group.jobs) {
    for (const note of result?.notes ?? []) notes.add(note);
    for (const face of result?.faces ?? []) if (face.quality && face.quality !== "good") notes.add(`${face.reference}: ${face.quality}`);
    (result?.flags ?? []).forEach((flag, number) => { if (flag) notes.add(`Picture ${number + 1} is not shown. ${flag}`); });
  }
  return notes.size ? el("ul", { class: "notes" }, [...notes].map((note) => el("li", {}, note))) : null;
}

async function save(picture) {
  download(await imageAddress(picture.url), `imagine-${picture.seed}.${picture.media_type.split("/")[1].replace("jpeg", "jpg")}`);
}

const fileOf = (id) => recall("files", {})[id] ?? (id.startsWith("per_") ? "PERSONA.safetensors" : "PHOTO");

/** Show one picture large, with everything that draws it again. */
export async function showPicture(group, job, picture) {
  const { command, notes } = commandOf(picture.settings, fileOf, weights);
  const json = JSON.stringify(bodyOf(picture.settings), null, 2);
  const image = el("img", { alt: `Generated: ${job.request.prompt}` });
  showImage(image, picture.url);
  const { imagine, device, dtype, shared_steps_with: shared } = picture.settings;
  const others = shared > 1 ? `, together with ${count(shared - 1, "other picture", "other pictures")}` : "";
  const action = await openDialog("Picture", (close) => el("div", { class: "large" },
    el("div", {}, image, el("p", { class: "soft" }, `${picture.width} × ${picture.height} pixels, generated.`)),
    el("div", { class: "recipe" },
      el("p", { class: "prompt" }, job.request.prompt),
      el("p", { class: "soft" }, summary(picture.settings)),
      el("h3", {}, "The command that draws it again"),
      el("pre", { class: "command", tabindex: 0 }, command),
      notes.map((note) => el("p", { class: "soft" }, note)),
      copyButton("Copy the command", command),
      el("h3", {}, "Its settings, as a request to the server"),
      el("pre", { class: "json", tabindex: 0 }, json),
      copyButton("Copy the settings", json),
      el("p", { class: "soft" }, `Drawn by imagine ${imagine} on ${device} in ${dtype}${others}. Other batches round differently, so the last bits may differ.`),
      el("div", { class: "row tools" },
        button("Download", () => save(picture), { class: "primary" }),
        button("Use these settings", () => close("reuse")),
        button("Compare with …", () => close("pin")),
        button("Delete", () => close("delete"), { class: "quiet" })))), { class: "wide" });
  if (action === "reuse") told.reuse(picture.settings);
  if (action === "pin") told.pin(job, picture);
  if (action === "delete") await removePicture(group, job, picture);
}
