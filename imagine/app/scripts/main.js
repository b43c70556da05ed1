// Start the page: learn what the server offers, fill in what was there before, and turn presses into requests.

import { ApiError, call, connect, hasKey, setKey } from "./api.js";
import { askForPair, newLabel, pin, stripChanges } from "./compare.js";
import { addJob, setUpGallery } from "./gallery.js";
import { announce, byId, el, openDialog, say } from "./page.js";
import { setUpPeople } from "./people/cards.js";
import { people, whyNotReady } from "./people/people.js";
import { listPersonas } from "./people/personas.js";
import { requestOf } from "./recipe.js";
import { applySettings, readSettings, renameInPrompt, setUpSettings, showPeople } from "./settings.js";

const BUTTONS = ["draw", "strip", "pair"];
const SOON = 700; // milliseconds between looks at a server that loads its weights
const LATER = 5000;

let server = null;
let sending = false;

function askForKey(wasWrong) {
  return openDialog("This server needs an API key", (close) => {
    const input = el("input", { id: "api-key", type: "password", autocomplete: "current-password", autofocus: true });
    return el("form", {
      onsubmit: (event) => {
        event.preventDefault();
        if (input.value.trim()) close(input.value.trim());
      },
    }, el("input", { type: "text", autocomplete: "username", value: "imagine", hidden: true }), // for password managers
    wasWrong ? el("p", { class: "trouble" }, "The server does not accept this key.") : null,
    el("label", { for: "api-key" }, "API key"), input,
    el("p", { class: "soft" }, "Whoever runs the server makes keys with imagine serve --create-key NAME. This browser keeps it."),
    el("div", { class: "row end" }, el("button", { type: "submit", class: "primary" }, "Use this key")));
  });
}

function tellServer(text, state) {
  const node = byId("server");
  if (node.textContent === text) return;
  node.textContent = text;
  node.dataset.state = state;
}

function tellConnection(answers) {
  if (!answers) tellServer("The server does not answer", "lost");
}

/** Look at the server; return whether it can draw. */
async function look() {
  try {
    server = await call("GET", "/v1/server");
  } catch (error) {
    if (error.status) tellServer(error.message, "lost");
    return false;
  }
  if (!server.model) {
    tellServer("Loading the model …", "loading");
    return false;
  }
  const { side, device } = server.model;
  tellServer(`Ready · ${side} px on ${device === "cpu" ? "the CPU" : device}`, "ready");
  return true;
}

async function keepLooking() {
  const ready = document.hidden || await look();
  setTimeout(keepLooking, ready ? LATER : SOON);
}

/** Send requests for pictures; those of a comparison carry one label. */
async function ask(bodies) {
  for (const body of bodies) addJob(await call("POST", "/v1/pictures", { json: body }));
  announce(bodies.length > 1 ? `${bodies.length} pictures are asked for.` : "The picture is asked for.");
}

/** Check the form and send what `bodiesOf(settings)` returns; show why it cannot be sent. */
async function submit(bodiesOf) {
  const trouble = byId("prompt-trouble");
  say(trouble, "");
  if (sending) return;
  const settings = readSettings();
  const reason = whyNotReady() || (settings.prompt ? "" : "Describe the picture in a few words, or choose an example.");
  if (reason) {
    say(trouble, reason);
    if (!settings.prompt) byId("prompt").focus();
  } else await attempt(async () => bodiesOf(settings));
}

/** Send the requests that a function returns, if it does; show why they cannot be sent. */
async function attempt(makeBodies) {
  const trouble = byId("prompt-trouble");
  say(trouble, "");
  if (sending) return;
  sending = true;
  try {
    const bodies = await makeBodies();
    if (bodies) await ask(bodies);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    const isGone = error.status === 404;
    say(trouble, isGone ? `${error.message} A photo or a saved person is no longer on the server: choose it again.` : error.message);
  } finally {
    sending = false;
  }
}

const compared = (kind, settings, changes) => {
  const label = newLabel(kind);
  return changes.map((each) => requestOf(people, settings, { ...each, label }));
};

function listen() {
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    submit((settings) => [requestOf(people, settings)]);
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("form").requestSubmit();
  });
  byId("strip").addEventListener("click", () => submit((settings) => compared("strip", settings, stripChanges())));
  byId("pair").addEventListener("click", () => submit(async (settings) => {
    const changes = await askForPair(settings, server.limits);
    return changes && compared("pair", settings, changes);
  }));
  byId("key").addEventListener("click", async () => {
    const given = await askForKey(false);
    if (given === null) return;
    setKey(given);
    location.reload();
  });
}

/** Draw once more what a card shows, with another seed. */
function again(jobs, key) {
  const { seed } = readSettings();
  const label = jobs.length > 1 ? newLabel(key.split("-")[0]) : "";
  return attempt(async () => jobs.map(({ request: { people: given, ...request }, n }) => {
    const body = { ...request, label, n, seed };
    const fields = Object.fromEntries(Object.entries(body).filter(([, value]) => value !== null));
    if ("" in given) {
      const { persona, uploads, face, on_no_face } = given[""];
      return persona ? { ...fields, persona } : { ...fields, uploads, face, on_no_face };
    }
    return Object.keys(given).length ? { ...fields, people: given } : fields;
  }));
}

async function start() {
  connect(askForKey, tellConnection);
  while (!await look()) await new Promise((resolve) => setTimeout(resolve, SOON));
  byId("key").hidden = !server.key_needed && !hasKey();
  setUpSettings(server);
  listen();
  const names = () => showPeople(people.map((person) => person.name), server.model.trained_people);
  await setUpGallery(server, { reuse: applySettings, again, pin });
  const reading = setUpPeople(server, { changed: names, renamed: renameInPrompt, saved: listPersonas });
  names();
  await listPersonas();
  for (const id of BUTTONS) byId(id).disabled = false;
  document.body.dataset.ready = "";
  setTimeout(keepLooking, LATER);
  await reading;
}

window.addEventListener("unhandledrejection", (event) => {
  say(byId("prompt-trouble"), event.reason?.message ?? "Something went wrong on this page; load it again.");
});
start();
