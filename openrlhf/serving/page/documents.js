/* The documents: their list, adding files and texts, deleting. */

import { $, announce, count, el, place } from "./dom.js";
import { Problem, request, requestJson, send } from "./server.js";

const PAGE = 25;
const KINDS = [".txt", ".md", ".jsonl"];
const isKnown = (name) => KINDS.some((kind) => name.toLowerCase().endsWith(kind));

/* ---- the list ---- */

/* `data`: the rows of this page of the list; `starts`: the `after` of this page and of those before it. */
export const shown = { starts: [null], data: null, total: 0, next: null };

/* Whether the list has been folded away, or not, by how many documents there are: only once, then people do that. */
let folded = false;

export async function showDocuments() {
  const after = shown.starts.at(-1);
  let problem = "";
  try {
    const query = new URLSearchParams({ limit: PAGE, ...(after === null ? {} : { after }) });
    Object.assign(shown, await requestJson(`v1/documents?${query}`));
    if (!shown.data.length && shown.starts.length > 1) {
      shown.starts.pop();
      await showDocuments();
      return;
    }
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    problem = error.message;
  }
  draw(problem);
}

function draw(problem) {
  const known = shown.data !== null, first = (shown.starts.length - 1) * PAGE;
  for (const node of document.querySelectorAll(".count")) node.textContent = known ? `(${shown.total.toLocaleString("en")})` : "";
  $("list").replaceChildren(...(shown.data || []).map(row));
  $("pager").hidden = !known || (!shown.next && shown.starts.length === 1);
  $("previous").disabled = shown.starts.length === 1;
  $("next").disabled = !shown.next;
  $("range").textContent = known ? `${first + 1} to ${first + shown.data.length}` : "";
  let hint = "", message = problem;
  if (known && shown.total) {
    hint = `The answer comes from the ${count(shown.total, "passage")} under Documents, and shows those it stands on.`;
    message ||= "Long files are kept as passages, one a row.";
  } else if (known) {
    hint = "First add documents: drop .txt, .md or .jsonl files anywhere on this page, or use the buttons under Documents. Then ask.";
    message ||= "None yet. What you add stays on the server.";
  }
  if (known && !folded) openDocuments(!shown.total);
  folded ||= known;
  $("empty-hint").textContent = hint;
  $("documents-message").textContent = message;
}

function row(item) {
  const name = item.title || item.id;
  const facts = [...place(item), Number.isFinite(item.characters) ? count(item.characters, "character") : ""].filter(Boolean);
  return el("li", {},
    el("div", {}, el("span", { class: "name", dir: "auto", title: name }, name), el("bdi", { class: "muted" }, facts.join(" · "))),
    el("button", { type: "button", class: "plain", "aria-label": `Delete ${name}`, onclick: () => remove(item, name) }, "Delete"));
}

/* A long file's passages are called FILE#1, FILE#2 …; who deletes one may delete them all. */
async function remove(item, name) {
  const dialog = $("confirm"), whole = item.id.match(/^(.+)#\d+$/s)?.[1];
  $("confirm-text").textContent = name;
  $("confirm-one").textContent = whole ? "Delete this passage" : "Delete";
  $("confirm-all").hidden = !whole;
  $("confirm-all").textContent = `Delete all of ${whole}`;
  dialog.returnValue = "";
  dialog.showModal();
  await new Promise((closed) => { dialog.addEventListener("close", closed, { once: true }); });
  if (!dialog.returnValue) return;
  const gone = dialog.returnValue === "all" ? whole : item.id;
  let problem = "";
  try {
    await request(`v1/documents/${encodeURIComponent(gone)}`, { method: "DELETE" });
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    problem = `${gone} was not deleted: ${error.message}`;
  }
  announce(problem || `Deleted ${gone}.`);
  await showDocuments();
  if (problem) $("documents-message").textContent = problem;
  $("documents-title").focus();
}

function turnPage(step) {
  if (step > 0) shown.starts.push(shown.next);
  else shown.starts.pop();
  return showDocuments();
}

/* On a narrow screen the documents can be folded away. */
function openDocuments(open) {
  $("documents").classList.toggle("closed", !open);
  $("documents-toggle").setAttribute("aria-expanded", String(open));
}

/* ---- adding ---- */

let adding = null;

/* Adds one after another; `items`: {name, body, type?} or {name, problem}. What fails is told by name. */
async function add(items) {
  if (adding) adding.waiting.push(...items);
  if (adding || !items.length) return;
  const work = { waiting: [...items], done: 0, added: 0, replaced: 0, unchanged: 0, cancel: new AbortController() };
  adding = work;
  openDocuments(true);
  $("failures").replaceChildren();
  $("upload").hidden = $("upload-progress").hidden = $("upload-cancel").hidden = false;
  $("upload-dismiss").hidden = true;
  do {
    await addWaiting(work);
    await showDocuments();
  } while (work.waiting.length);
  adding = null;
  sumUp(work);
}

async function addWaiting(work) {
  while (work.waiting.length) {
    const item = work.waiting.shift();
    try {
      await addOne(item, work);
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      if (error.stops) work.cancel.abort();
      tellFailure(item.name, error.message, work.cancel.signal.aborted ? work.waiting.splice(0).length : 0);
    }
    work.done += 1;
  }
}

async function addOne(item, work) {
  if (item.problem) throw new Problem(item.problem, 415);
  const all = work.done + work.waiting.length + 1, number = all > 1 ? ` (${work.done + 1} of ${all})` : "";
  const tell = (share) => {
    $("upload-status").textContent = `${share < 1 ? "Sending" : "Compressing"} ${item.name}${number}`;
    if (share < 1) $("upload-progress").value = share;
    else $("upload-progress").removeAttribute("value");
  };
  tell(0);
  /* The server does not tell how far it has come; beside the status, which is read aloud at every change. */
  const began = Date.now();
  const clock = setInterval(() => { $("upload-clock").textContent = count(Math.round((Date.now() - began) / 1000), "second"); }, 1000);
  const counts = await send(item.body, item.type, tell, work.cancel.signal).finally(() => {
    clearInterval(clock);
    $("upload-clock").textContent = "";
  });
  for (const kind of ["added", "replaced", "unchanged"]) work[kind] += counts[kind];
}

function tellFailure(name, message, left) {
  const reason = message.startsWith(`${name}: `) ? message.slice(name.length + 2) : message;
  $("failures").append(el("li", {}, el("bdi", {}, name), `: ${reason}${left ? ` Not sent: ${left} more.` : ""}`));
}

function sumUp(work) {
  const failed = $("failures").childElementCount;
  const parts = [work.added && `${count(work.added, "passage")} added`, work.replaced && `${work.replaced.toLocaleString("en")} replaced`,
    work.unchanged && `${work.unchanged.toLocaleString("en")} here already`].filter(Boolean).join(", ");
  $("upload-status").textContent = `${parts || (failed ? "Nothing was added" : "There was no text to add")}.${failed ? " Not added:" : ""}`;
  $("upload-progress").hidden = $("upload-cancel").hidden = true;
  $("upload-dismiss").hidden = false;
}

function itemOf(file, name) {
  if (!isKnown(file.name)) return { name, problem: `only ${KINDS.join(", ")} files can be added.` };
  const body = new FormData();
  body.append("files", file, name);
  return { name, body };
}

/* The files of what was dropped: all of those dropped themselves, those of the known kinds in folders. */
async function filesOf(entries) {
  const items = [];
  for (const entry of entries) {
    if (entry.isFile) {
      const name = entry.fullPath.slice(1);
      items.push(await new Promise((done) => { entry.file((file) => done(itemOf(file, name)), () => done({ name, problem: "cannot be read." })); }));
    } else {
      const reader = entry.createReader(), within = [];
      for (let read = null; read === null || read.length; within.push(...read)) {
        read = await new Promise((done) => { reader.readEntries(done, () => done([])); });
      }
      within.sort((one, other) => (one.name < other.name ? -1 : 1));
      items.push(...await filesOf(within.filter((inner) => !inner.isFile || isKnown(inner.name))));
    }
  }
  return items;
}

function addText(event) {
  event.preventDefault();
  const text = $("paste-text").value.trim(), title = $("paste-name").value.trim();
  if (!text) {
    $("paste-problem").textContent = "The text is empty.";
    $("paste-text").focus();
    return;
  }
  $("paste-dialog").close();
  $("paste-name").value = $("paste-text").value = "";
  const body = JSON.stringify({ documents: [{ text, ...(title ? { title } : {}) }] });
  add([{ name: title || "the text", body, type: "application/json" }]);
}

/* ---- what people do ---- */

function listenToDrops() {
  const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
  const over = (isOver) => document.body.classList.toggle("dragging", isOver);
  window.addEventListener("dragover", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    over(true);
  });
  /* Between two elements the pointer leaves one for the other; only off the page there is no other. */
  window.addEventListener("dragleave", (event) => { if (!event.relatedTarget) over(false); });
  window.addEventListener("drop", async (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    over(false);
    const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
    const items = await filesOf(entries), names = entries.map((entry) => entry.name).join(", ");
    add(items.length ? items : [{ name: names, problem: `holds no ${KINDS.join(", ")} file.` }]);
  });
}

export function listenToDocuments() {
  $("documents-toggle").addEventListener("click", () => openDocuments($("documents").classList.contains("closed")));
  $("previous").addEventListener("click", () => turnPage(-1));
  $("next").addEventListener("click", () => turnPage(1));
  $("choose").addEventListener("click", () => $("files").click());
  $("files").addEventListener("change", () => {
    add([...$("files").files].map((file) => itemOf(file, file.name)));
    $("files").value = "";
  });
  $("upload-cancel").addEventListener("click", () => adding?.cancel.abort());
  $("upload-dismiss").addEventListener("click", () => {
    $("upload").hidden = true;
    $("documents-title").focus();
  });
  $("paste").addEventListener("click", () => {
    $("paste-problem").textContent = "";
    $("paste-dialog").showModal();
  });
  $("paste-cancel").addEventListener("click", () => $("paste-dialog").close());
  $("paste-dialog").addEventListener("submit", addText);
  listenToDrops();
}
