/* The server's page: documents on one side, a conversation about them on the other, through the server's public API. */

import { $, announce, count, el, place } from "./dom.js";
import { listenToDocuments, showDocuments, shown } from "./documents.js";
import { Problem, isThere, lost, problemOf, request, requestJson, whenReady } from "./server.js";

const REFUSED = "The documents do not answer this question";

/* What the server calls its model. */
let model = "clara";
/* {question, answer, citations, state: "writing" | "done" | "stopped" | "refused" | "failed", cut, problem, node, parts} */
let turns = [];
/* The turn that is being answered, and what stops it. */
let writing = null;

async function refresh() {
  try {
    model = (await requestJson("v1/models")).data[0].id;
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
  }
  await showDocuments();
}

/* ---- asking ---- */

/* Only what was answered is told again, where that is wanted: a refusal or half an answer would be read as a fact. */
function messagesFor(question) {
  const earlier = $("follow-up").checked ? turns.filter((turn) => turn.state === "done" && turn.answer.trim()) : [];
  return [...earlier.flatMap((turn) => [{ role: "user", content: turn.question }, { role: "assistant", content: turn.answer }]),
    { role: "user", content: question }];
}

function settings() {
  const given = {};
  for (const [id, name] of [["temperature", "temperature"], ["max-tokens", "max_tokens"]]) {
    if ($(id).value !== "") given[name] = Number($(id).value);
  }
  return given;
}

async function ask(question) {
  const body = JSON.stringify({ model, messages: messagesFor(question), stream: true, ...settings() });
  const turn = { question, answer: "", citations: [], state: "writing", cut: false, problem: "" };
  turns.push(turn);
  writing = { turn, cancel: new AbortController(), began: Date.now(), kept: null };
  addTurn(turn);
  drawState();
  announce("Looking in the documents.");
  const clock = setInterval(() => drawWaiting(turn), 1000);
  try {
    const options = { method: "POST", headers: { "Content-Type": "application/json" }, body, signal: writing.cancel.signal };
    await read(turn, (await request("v1/chat/completions", options)).body);
    turn.state = !turn.citations.length && turn.answer.startsWith(REFUSED) ? "refused" : "done";
  } catch (error) {
    if (error.name === "AbortError") turn.state = "stopped";
    else if (error instanceof Problem) Object.assign(turn, { state: "failed", problem: error.message });
    else throw error;
  } finally {
    clearInterval(clock);
    if (turns.includes(turn)) {
      following(() => drawTurn(turn));
      announce(spoken(turn));
    }
    writing = null;
    drawState();
  }
}

async function read(turn, body) {
  let ended = false;
  try {
    for await (const data of events(body)) {
      ended = data === "[DONE]";
      if (ended) break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw problemOf(Number(chunk.error.status) || 500, data, null);
      following(() => readChunk(turn, chunk));
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Problem) throw error;
  }
  if (ended) return;
  if (!(await isThere())) lost();
  throw new Problem("The connection broke before the answer was complete.");
}

function readChunk(turn, chunk) {
  const choice = chunk.choices?.[0], piece = choice?.delta?.content;
  if (chunk.citations) {
    turn.citations = chunk.citations;
    drawSources(turn);
  }
  if (piece) {
    turn.answer += piece;
    turn.parts.text.data = turn.answer;
  }
  if (choice?.finish_reason === "length") turn.cut = true;
  if (chunk.citations || piece) drawWaiting(turn);
}

/* The data of server-sent events. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (held + value).split(/\r?\n\r?\n/);
    held = blocks.pop();
    for (const block of blocks) {
      const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trim()).join("\n");
    }
  }
}

function spoken(turn) {
  if (turn.state === "failed") return turn.problem;
  if (turn.state === "stopped") return "Stopped.";
  return `${turn.answer} ${turn.citations.length ? `From ${count(turn.citations.length, "source")}.` : ""}`.trim();
}

/* ---- what is seen ---- */

/* Does something that makes the page longer and keeps its end in view, but for the question, which stays in view
   too; who has scrolled elsewhere meanwhile is left there. */
function following(change) {
  change();
  const left = writing.kept !== null && Math.abs(window.scrollY - writing.kept) > 2;
  if (left) return;
  const page = document.documentElement, question = writing.turn.node.getBoundingClientRect().top + window.scrollY;
  window.scrollTo(0, Math.min(page.scrollHeight - window.innerHeight, question - 8));
  writing.kept = window.scrollY;
}

function addTurn(turn) {
  const text = document.createTextNode("");
  turn.parts = {
    text,
    answer: el("div", { class: "answer text", dir: "auto", "aria-busy": "true" }, text),
    notes: el("div"),
    sources: el("section", { class: "sources", "aria-label": "Sources" }),
    actions: el("div", { class: "row actions" }),
  };
  const { answer, notes, sources, actions } = turn.parts;
  turn.node = el("article", { class: "turn", "aria-label": `Question ${turns.length}` },
    el("h3", { class: "question text", dir: "auto" }, turn.question), answer, notes, sources, actions);
  $("conversation").append(turn.node);
  following(() => drawWaiting(turn));
}

function drawTurn(turn) {
  turn.parts.answer.setAttribute("aria-busy", "false");
  turn.node.classList.add(turn.state);
  turn.parts.notes.replaceChildren(...notes(turn));
  const button = (text, kind, click) => el("button", { type: "button", class: `plain ${kind}`, onclick: click }, text);
  if (turn.answer && turn.state !== "refused") turn.parts.actions.append(button("Copy", "copy", (event) => copy(turn, event.currentTarget)));
  if (turn.state === "failed" || turn.state === "stopped") turn.parts.actions.append(button("Ask again", "again", () => askAgain(turn)));
}

function drawWaiting(turn) {
  if (turn.answer) {
    turn.parts.notes.replaceChildren();
    return;
  }
  const seconds = Math.round((Date.now() - writing.began) / 1000);
  const step = turn.citations.length ? `Reading ${count(turn.citations.length, "source")}` : "Looking in the documents";
  turn.parts.notes.replaceChildren(el("p", { class: "note waiting" }, seconds >= 5 ? `${step}, ${count(seconds, "second")}` : step));
}

function notes(turn) {
  const note = (text) => el("p", { class: "note" }, text);
  if (turn.state === "failed") return [el("p", { class: "problem" }, turn.problem)];
  if (turn.state === "stopped") return [note(turn.answer ? "Stopped: the answer ends here." : "Stopped before the answer began.")];
  if (turn.state === "refused") {
    return [note(shown.data !== null && !shown.total ? "There are no documents yet: add some, then ask again."
      : "Nothing was made up. Ask in other words, or add documents that hold the answer.")];
  }
  const told = [];
  if (!turn.answer.trim()) told.push(note("The model wrote no text."));
  if (!turn.citations.length) told.push(note("This answer stands on no document."));
  if (turn.cut) told.push(note("The answer was cut at its longest length; Settings can change that."));
  return told;
}

function drawSources(turn) {
  if (!turn.citations.length) return;
  /* Scores are cosines, up to 1; where documents are ranked by their words alone, they have no such end. */
  const top = Math.max(1, ...turn.citations.map((cited) => cited.score));
  const cards = turn.citations.map((cited, number) => el("li", {}, card(cited, number + 1, top)));
  const heading = el("h4", {}, `${count(cards.length, "source")}, with closeness to the question`);
  turn.parts.sources.replaceChildren(heading, el("ol", {}, ...cards));
}

function card(cited, number, top) {
  const where = place(cited).join(" · ");
  return el("details", { class: "source" },
    el("summary", {},
      el("span", { class: "marker" }, String(number)),
      el("span", { class: "title", dir: "auto" }, cited.title || cited.id, where ? el("small", {}, ` ${where}`) : null),
      el("span", { class: "score" }, el("span", { class: "unseen" }, "score"), bar(cited.score, top), cited.score.toFixed(3)),
      el("span", { class: "preview", dir: "auto", "aria-hidden": "true" }, cited.passage.replace(/\s+/g, " ").slice(0, 200))),
    el("p", { class: "passage text", dir: "auto" }, cited.passage));
}

/* The number beside it says the same to who cannot see it. */
function bar(score, top) {
  const filled = el("span");
  filled.style.width = `${(100 * Math.max(0, score)) / top}%`;
  return el("span", { class: "bar", "aria-hidden": "true" }, filled);
}

async function copy(turn, button) {
  const sources = turn.citations.map((cited, number) =>
    `[${number + 1}] ${[cited.title || cited.id, ...place(cited)].join(", ")} (${cited.score.toFixed(3)})`);
  let told = "Copied";
  try {
    await navigator.clipboard.writeText([turn.answer, ...sources.length ? [sources.join("\n")] : []].join("\n\n"));
  } catch {  // browsers give no clipboard to pages that came over plain HTTP from another machine
    told = "Selected: press Ctrl+C";
    window.getSelection().selectAllChildren(turn.parts.answer);
  }
  button.textContent = told;
  announce(told);
  setTimeout(() => { button.textContent = "Copy"; }, 2500);
}

function drawState() {
  const busy = writing !== null, leaving = document.activeElement === $("stop") && !busy;
  $("empty").hidden = turns.length > 0;
  $("new").hidden = !turns.length;
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  for (const button of document.querySelectorAll(".again")) button.disabled = busy;
  if (leaving) $("question").focus();
}

/* ---- what people do ---- */

function askWhatIsWritten() {
  const question = $("question").value.trim();
  if (!question || writing) return;
  if (!$("ask").checkValidity()) {
    $("settings").open = true;
    $("ask").reportValidity();
    return;
  }
  $("question").value = "";
  ask(question);
}

function askAgain(turn) {
  turns = turns.filter((other) => other !== turn);
  turn.node.remove();
  ask(turn.question);
  $("question").focus();
}

function newConversation() {
  turns = [];
  writing?.cancel.abort();
  $("conversation").replaceChildren();
  announce("New conversation.");
  drawState();
  $("question").focus();
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  askWhatIsWritten();
});
$("question").addEventListener("keydown", (event) => {
  /* Enter that ends a word of an input method belongs to it; some browsers tell only by the key code. */
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  askWhatIsWritten();
});
$("stop").addEventListener("click", () => writing?.cancel.abort());
$("new").addEventListener("click", newConversation);
listenToDocuments();
whenReady(refresh);
drawState();
/* A touch screen would show its keyboard over the page. */
if (window.matchMedia("(hover: hover)").matches) $("question").focus();
refresh();
