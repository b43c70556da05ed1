// The only module that talks to the server: requests, errors as sentences, pictures, and the stream of events of jobs.

import { recall, remember } from "./page.js";

const ENDS = ["succeeded", "failed", "canceled", "expired"];
const MOST_FOLLOWED = 32; // jobs in one stream, as the server allows
const PAUSE = 1000; // milliseconds before a lost stream is opened again

let key = recall("key", "");
let askForKey = async () => null;
let tellConnection = () => {};

/** An answer that is not what was asked for; its message is a sentence for people. */
export class ApiError extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.code = error.code;
    this.param = error.param;
  }
}

/** Set who asks for an API key when the server wants one, and who learns whether the server answers. */
export function connect(ask, tell) {
  askForKey = ask;
  tellConnection = tell;
}

export const hasKey = () => key !== "";

export function setKey(given) {
  key = given;
  remember("key", given || null);
}

async function fetched(method, path, options, signal) {
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  let body = options.form;
  if (options.json !== undefined) {
    headers["content-type"] = "application/json";
    body = JSON.stringify(options.json);
  }
  let answer;
  try {
    answer = await fetch(path, { method, headers, body, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    tellConnection(false);
    throw new ApiError(0, { code: "unreachable", message: "The server does not answer. Is it still running?" });
  }
  tellConnection(true);
  return answer;
}

/** Send a request and return its response. Throws ApiError; asks for a key if the server wants one. */
export async function send(method, path, options = {}, signal = undefined) {
  let answer = await fetched(method, path, options, signal);
  while (answer.status === 401) {
    const given = await askForKey(key !== "");
    if (given === null) break;
    setKey(given);
    answer = await fetched(method, path, options, signal);
  }
  if (answer.ok) return answer;
  let error = { code: "internal", message: `The server answered with the status ${answer.status}.` };
  try {
    error = (await answer.json()).error ?? error;
  } catch { /* not from the server itself, but from a proxy before it */ }
  throw new ApiError(answer.status, error);
}

/** Send a request and return the JSON of its answer, or null if there is none. */
export async function call(method, path, options = {}) {
  const answer = await send(method, path, options);
  return answer.status === 204 ? null : answer.json();
}

export const deleted = (path) => call("DELETE", path).catch((error) => {
  if (error.status !== 404) throw error; // what is gone already needs no deleting
});

// --- pictures: fetched with the key, and shown from memory ---------------------------------------------------------

const addresses = new Map();

/** Return an address under which the page can show what a path holds. */
export function imageAddress(path) {
  if (!addresses.has(path)) {
    const made = send("GET", path).then((answer) => answer.blob()).then((blob) => URL.createObjectURL(blob));
    addresses.set(path, made);
    made.catch(() => addresses.delete(path));
  }
  return addresses.get(path);
}

/** Show in an <img> what a path holds. */
export function showImage(image, path) {
  imageAddress(path).then((address) => { image.src = address; }, (error) => {
    image.alt = `${image.alt} (${error.message})`;
    image.classList.add("broken");
  });
}

export function forgetImage(path) {
  addresses.get(path)?.then((address) => URL.revokeObjectURL(address), () => {});
  addresses.delete(path);
}

// --- events: one stream for all jobs that are not done, because browsers open few connections to one server -------

const followed = new Map(); // id of a job -> its last event, and who is told
let stream = null;
let planned = null;

/** Tell `handler(kind, data)` what happens to a job until it has ended; "gone" if it was deleted elsewhere. */
export function follow(job, handler) {
  followed.set(job, { after: followed.get(job)?.after ?? 0, handler });
  plan(0);
}

export function unfollow(job) {
  followed.delete(job);
}

function plan(pause) {
  clearTimeout(planned);
  planned = setTimeout(listen, pause);
}

async function listen() {
  stream?.abort();
  if (!followed.size) return;
  const own = stream = new AbortController();
  const jobs = [...followed].slice(0, MOST_FOLLOWED);
  const query = jobs.map(([job, { after }]) => `job=${job}${after ? `.${after}` : ""}`).join("&");
  try {
    const answer = await send("GET", `/v1/events?${query}`, {}, own.signal);
    await read(answer.body.getReader());
  } catch (error) {
    if (error.name === "AbortError" || own.signal.aborted) return; // another stream took over
    if (error.status === 404) await dropGone(jobs);
  }
  if (stream === own && followed.size) plan(PAUSE);
}

async function read(reader) {
  const decoder = new TextDecoder();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += decoder.decode(value, { stream: true });
    const blocks = text.split("\n\n");
    text = blocks.pop();
    blocks.forEach(hand);
  }
}

function hand(block) {
  const fields = new Map(block.split("\n").map((line) => {
    const colon = line.indexOf(": ");
    return [line.slice(0, colon), line.slice(colon + 2)];
  }));
  if (!fields.has("event")) return;
  const data = JSON.parse(fields.get("data"));
  const entry = followed.get(data.job);
  if (!entry) return;
  if (fields.has("id")) entry.after = Number(fields.get("id"));
  if (ENDS.includes(fields.get("event"))) followed.delete(data.job);
  entry.handler(fields.get("event"), data);
}

async function dropGone(jobs) {
  for (const [job, { handler }] of jobs) {
    try {
      await call("GET", `/v1/jobs/${job}`);
    } catch (error) {
      if (error.status !== 404) return;
      followed.delete(job);
      handler("gone", { job });
    }
  }
}
