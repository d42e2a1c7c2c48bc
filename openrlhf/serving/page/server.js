/* Requests to the server, what goes wrong with them in words, the key, and the search for a server that is away.
   Keeps the key in this tab's session storage and nothing anywhere else. */

import { $, announce, count } from "./dom.js";

const KEY = "clara-key";
const LOOK_AGAIN_MS = 3000;

/* What went wrong, for the person; `status` 0 where no answer came. */
export class Problem extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
  /* Whether whatever is asked next would fail as well. */
  get stops() { return this.status === 0 || this.status === 401; }
}

let key = "";
try { key = sessionStorage.getItem(KEY) || ""; } catch { /* storage is off: the key lasts until a reload */ }

/* What to do when the server takes requests (again). */
let ready = () => {};

export function problemOf(status, body, after) {
  let said = "", code = "";
  try { ({ message: said, code } = JSON.parse(body).error); } catch { /* not the API's own words */ }
  const again = after ? `Try again in ${count(Number(after) || 1, "second")}.` : "Try again in a moment.";
  if (status === 401) {
    askKey();
    return new Problem("The server needs its key: enter it at the top, then try again.", status);
  }
  if (status === 429) return new Problem(`The server is busy with other questions. ${again}`, status);
  if (status === 503) return new Problem(`${said || "The server cannot take this now."} ${again}`, status);
  if (status === 408 || status === 504) {
    return new Problem("This took longer than the server allows. Try again, or ask for a shorter answer under Settings.", status);
  }
  if (status === 413) return new Problem(`More than this server takes at once. ${said}`.trim(), status);
  if (code === "context_length_exceeded") return new Problem(`${said}. A new conversation begins without the earlier turns.`, status);
  return new Problem(said || `The server answered with status ${status}.`, status);
}

const withKey = (more) => ({ ...more, ...(key ? { Authorization: `Bearer ${key}` } : {}) });

export async function request(path, options = {}) {
  let response, body;
  try {
    response = await fetch(path, { ...options, headers: withKey(options.headers), cache: "no-store" });
    body = response.ok ? "" : await response.text();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    lost();
    throw new Problem("The server does not answer.");
  }
  if (!response.ok) throw problemOf(response.status, body, response.headers.get("retry-after"));
  return response;
}

export async function requestJson(path) {
  const response = await request(path);
  try { return await response.json(); } catch { throw new Problem("The server's answer cannot be read.", response.status); }
}

/* Adds documents, telling how much of the body has gone; fetch cannot tell that. */
export function send(body, type, progress, signal) {
  return new Promise((done, fail) => {
    const call = new XMLHttpRequest();
    call.open("POST", "v1/documents");
    for (const [name, value] of Object.entries(withKey(type ? { "Content-Type": type } : {}))) call.setRequestHeader(name, value);
    call.upload.onprogress = (event) => progress(event.lengthComputable ? event.loaded / event.total : 0);
    call.upload.onload = () => progress(1);
    call.onload = () => {
      if (call.status >= 400) { fail(problemOf(call.status, call.responseText, call.getResponseHeader("retry-after"))); return; }
      try { done(JSON.parse(call.responseText)); } catch { fail(new Problem("The server's answer cannot be read.", call.status)); }
    };
    /* A server may close the connection on a body that is too large, so this alone does not say that it is away. */
    call.onerror = async () => {
      if (await isThere()) { fail(new Problem("The connection broke: this may be more than the server takes at once.", 413)); return; }
      lost();
      fail(new Problem("The server does not answer."));
    };
    call.onabort = () => fail(new Problem("Cancelled.", 499));
    signal.addEventListener("abort", () => call.abort());
    call.send(body);
  });
}

export async function isThere() {
  try { return (await fetch("health", { cache: "no-store" })).ok; } catch { return false; }
}

/* Says that the server is away, and looks for it until it is back. */
export async function lost() {
  if (!$("down").hidden) return;
  $("down").hidden = false;
  do await new Promise((done) => { setTimeout(done, LOOK_AGAIN_MS); }); while (!$("down").hidden && !(await isThere()));
  found();
}

function found() {
  if ($("down").hidden) return;
  $("down").hidden = true;
  announce("The server answers again.");
  ready();
}

function askKey() {
  $("key-message").textContent = key ? "The server does not take this key." : "This server answers those who have its key.";
  if (!$("key-form").hidden) return;
  $("key-form").hidden = false;
  $("key").focus();
}

function useKey(event) {
  event.preventDefault();
  const given = $("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(given)) {
    $("key-message").textContent = "A key has letters, digits and signs, without spaces.";
    return;
  }
  key = given;
  try { sessionStorage.setItem(KEY, key); } catch { /* as above */ }
  $("key").value = "";
  $("key-form").hidden = true;
  $("question").focus();
  ready();
}

/* Calls `then` whenever the server may be asked again: it is back, or there is another key. */
export function whenReady(then) {
  ready = then;
  $("key-form").addEventListener("submit", useKey);
  $("try").addEventListener("click", async () => { if (await isThere()) found(); });
}
