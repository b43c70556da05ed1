// Pictures side by side: a strip of identity scales, two settings drawn with one seed, and any two finished pictures.

import { showImage } from "./api.js";
import { button, byId, el, openDialog, say } from "./page.js";
import { STRIP, differences, summary } from "./recipe.js";

const FIELDS = [
  ["identity_scale", "Identity", 0, 1.5, 0.05], ["guidance_scale", "Guidance", 1, 12, 0.5], ["steps", "Steps", 1, 60, 1],
];
let pinned = null;

export const newLabel = (kind) => `${kind}-${crypto.getRandomValues(new Uint32Array(2)).join("")}`;

/** Return what each picture of an identity strip changes. */
export const stripChanges = () => STRIP.map((identity_scale) => ({ identity_scale, n: 1 }));

/** Ask for two settings and return what each picture changes, or null. */
export function askForPair(settings, limits) {
  return openDialog("Compare two settings", (close) => {
    const trouble = el("p", { class: "trouble", role: "alert", hidden: true });
    const sides = ["A", "B"].map((side) => side_(side, settings, limits));
    return el("form", {
      novalidate: true,
      onsubmit: (event) => {
        event.preventDefault();
        const [a, b] = sides.map(({ read }) => read());
        if (JSON.stringify(a) === JSON.stringify(b)) say(trouble, "Both settings are the same: change one of them.");
        else close([a, b].map((each) => ({ ...each, n: 1 })));
      },
    }, el("p", { class: "soft" }, "Both pictures start from the same noise, so only the settings differ."),
    el("div", { class: "two" }, sides.map(({ node }) => node)), trouble,
    el("div", { class: "row end" }, el("button", { type: "submit", class: "primary" }, "Draw both")));
  }, { class: "wide" });
}

function side_(side, settings, limits) {
  const inputs = FIELDS.map(([name, label, min, max, step]) => {
    const id = `${name}-${side}`;
    const output = el("output", { for: id }, String(settings[name]));
    const input = el("input", { type: "range", id, min, max: name === "steps" ? Math.min(max, limits.max_steps) : max, step });
    input.value = settings[name];
    input.addEventListener("input", () => { output.textContent = Number(input.value); });
    return { name, input, node: el("div", { class: "slider" }, el("label", { for: id }, label), output, input) };
  });
  const prompt = el("textarea", { id: `prompt-${side}`, rows: 2, value: settings.prompt });
  return {
    node: el("fieldset", {}, el("legend", {}, side), el("label", { for: `prompt-${side}` }, "Prompt"), prompt, inputs.map((each) => each.node)),
    read: () => ({ ...Object.fromEntries(inputs.map(({ name, input }) => [name, Number(input.value)])), prompt: prompt.value.trim() }),
  };
}

/** Keep a picture until another one is chosen, then show both. */
export function pin(job, picture) {
  if (pinned && pinned.picture.id !== picture.id) {
    const first = pinned;
    unpin();
    return showBoth(first, { job, picture });
  }
  pinned = { job, picture };
  const banner = byId("pinned");
  const image = el("img", { alt: "", width: 40, height: 40 });
  showImage(image, picture.url);
  banner.replaceChildren(image, el("span", { class: "grow" }, "Open another picture and press “Compare with …” to see both."), button("Stop comparing", unpin, { class: "quiet" }));
  banner.hidden = false;
  banner.querySelector("button").focus();
  return null;
}

function unpin() {
  pinned = null;
  byId("pinned").hidden = true;
}

function showBoth(...both) {
  const rows = differences(both.map(({ picture }) => picture.settings));
  return openDialog("Side by side", () => el("div", {},
    el("div", { class: "two" }, both.map(({ job, picture }, place) => {
      const image = el("img", { alt: `Generated: ${job.request.prompt}` });
      showImage(image, picture.url);
      return el("figure", { class: "tile" }, image, el("figcaption", {}, `${"AB"[place]}: ${summary(picture.settings)}`));
    })),
    rows.length ? el("table", {}, el("caption", { class: "soft" }, "What differs"),
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Setting"), el("th", { scope: "col" }, "A"), el("th", { scope: "col" }, "B"))),
      el("tbody", {}, rows.map(([name, values]) => el("tr", {}, el("th", { scope: "row" }, name), values.map((value) => el("td", {}, value))))))
      : el("p", { class: "soft" }, "Both have the same settings.")), { class: "wide" });
}
