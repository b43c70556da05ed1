// Building blocks of the page: elements whose text is always text, announcements, dialogs, and what the browser keeps.

const PREFIX = "imagine.";

/** Return an element. Options beginning with "on" are listeners, others attributes; strings become text, never markup. */
export function el(name, options = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(options)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "class") node.className = value;
    else if (key === "value") node.value = value;
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export const byId = (id) => document.getElementById(id);

export function button(text, onclick, options = {}) {
  return el("button", { type: "button", onclick, ...options }, text);
}

/** Tell users of screen readers what happened, without moving the focus. */
export function announce(text) {
  const live = byId("live");
  live.textContent = "";
  requestAnimationFrame(() => { live.textContent = text; });
}

/** Show a sentence in an element that is hidden while it is empty. */
export function say(node, text) {
  node.textContent = text;
  node.hidden = !text;
}

/** Open a dialog and return a promise of what `close(value)` was given; null if it was dismissed. */
export function openDialog(title, build, options = {}) {
  return new Promise((resolve) => {
    let result = null;
    const heading = el("h2", { id: "dialog-title" }, title);
    const node = el("dialog", { "aria-labelledby": "dialog-title", class: options.class ?? "" });
    const close = (value) => { result = value; node.close(); };
    const dismiss = button("×", () => close(null), { class: "dismiss", "aria-label": "Close" });
    node.append(el("div", { class: "dialog-head" }, heading, dismiss), build(close));
    node.addEventListener("close", () => { node.remove(); resolve(result); });
    node.addEventListener("click", (event) => { if (event.target === node) close(null); });
    document.body.append(node);
    node.showModal();
    node.querySelector("[autofocus]")?.focus();
  });
}

/** Ask once before something is deleted; return whether it should be. */
export async function confirmed(title, sentence, action) {
  const answer = await openDialog(title, (close) => el("div", {},
    el("p", {}, sentence),
    el("div", { class: "row end" },
      button("Keep", () => close(false), { autofocus: true }),
      button(action, () => close(true), { class: "danger" }))));
  return answer === true;
}

/** Return a button that copies a text and says so. */
export function copyButton(label, text) {
  const node = button(label, async () => {
    try {
      await navigator.clipboard.writeText(text);
    } catch { // a page that was not loaded from this machine or by HTTPS has no clipboard
      const field = el("textarea", { value: text, readonly: true, class: "unseen" });
      node.after(field);
      field.select();
      document.execCommand("copy");
      field.remove();
      node.focus();
    }
    node.textContent = "Copied";
    announce("Copied.");
    setTimeout(() => { node.textContent = label; }, 1500);
  });
  return node;
}

/** Let the browser save what an address of this page points to. */
export function download(address, name) {
  const link = el("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
}

/** Return what this browser keeps under a name; private windows may keep nothing. */
export function recall(name, fallback) {
  try {
    const text = localStorage.getItem(PREFIX + name);
    return text === null ? fallback : JSON.parse(text);
  } catch {
    return fallback;
  }
}

export function remember(name, value) {
  try {
    if (value === null) localStorage.removeItem(PREFIX + name);
    else localStorage.setItem(PREFIX + name, JSON.stringify(value));
  } catch { /* the page works without it, until it is loaded again */ }
}

/** Keep the name of the file that a photo or a persona is for the user; only the newest 500. */
export function rememberFile(id, file) {
  const { [id]: _, ...others } = recall("files", {});
  remember("files", { ...Object.fromEntries(Object.entries(others).slice(-499)), [id]: file });
}

export const count = (number, one, many) => `${number} ${number === 1 ? one : many}`;

export const day = (seconds) => new Date(seconds * 1000).toLocaleDateString(undefined, { dateStyle: "medium" });

/** Return a span of time in words. */
export function span(seconds) {
  const units = [[86_400 * 365, "year"], [86_400, "day"], [3600, "hour"], [60, "minute"], [1, "second"]];
  const [length, unit] = units.find(([each]) => seconds >= each) ?? [1, "second"];
  const number = Math.max(1, Math.round(seconds / length));
  return count(number, unit, `${unit}s`);
}
