"use strict";
/* The program of the evaluation page. Reads the two JSON elements; writes text nodes and attributes only, never HTML. */

const about = JSON.parse(document.getElementById("data").textContent);
const PAGE = 25;
const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const unique = (values) => [...new Set(values)];
const label = (system) => (Object.hasOwn(about.labels, system) ? about.labels[system] : system);
const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

function chooser(name, options, change, extra) {
  const select = el("select", { ...extra, onchange: () => change(select.value) });
  for (const [value, text] of options) select.append(el("option", { value }, text));
  return el("label", {}, name, select);
}

/* ---- what was run ---- */

function drawAbout() {
  const header = document.getElementById("about");
  for (const [number, run] of about.runs.entries()) {
    const facts = run.facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]);
    const data = run.data.flatMap((set) => [
      el("dt", {}, `${set.dataset}, ${set.setting}`),
      el("dd", {}, `${count(set.questions, "question")}, ${set.file}`,
        el("span", { class: "muted" }, ` sha256 ${String(set.sha256).slice(0, 12)}…`)),
    ]);
    const systems = Object.entries(run.systems).flatMap(([name, words]) => [el("dt", {}, label(name)), el("dd", {}, words)]);
    header.append(el("details", { class: "run", open: about.runs.length === 1 || null, "data-run": number },
      el("summary", {}, `${run.label} `, el("span", { class: "muted" }, `${run.suite}, ${run.title}`)),
      el("dl", {}, ...facts), el("h3", {}, "Data"), el("dl", {}, ...data), el("h3", {}, "Systems"), el("dl", {}, ...systems)));
    for (const note of run.notes) header.append(el("p", { class: "note" }, `${run.label}: ${note}`));
  }
}

/* ---- figures ---- */

function number(metric, value) {
  if (value === null || value === undefined) return "–";
  return (value * (metric.share ? 100 : 1)).toFixed(metric.decimals);
}

function paperRows(metric, setting) {
  const rows = new Map();
  for (const row of about.paper) {
    if (row.metric !== metric || row.setting !== setting) continue;
    const start = row.init === "pretrain" ? ", pretrained" : row.init ? `, ${row.init}` : "";
    const name = `${label(row.system)}${start}${row.rate === 1 ? "" : `, rate ${row.rate}`}`;
    if (!rows.has(name)) rows.set(name, new Map());
    rows.get(name).set(row.dataset, row.value);
  }
  return rows;
}

function figuresOf(metric, setting) {
  return about.runs.map((run) => {
    const rows = new Map();
    for (const figure of run.figures) {
      if (figure.metric !== metric || figure.setting !== setting) continue;
      if (!rows.has(figure.system)) rows.set(figure.system, new Map());
      rows.get(figure.system).set(figure.dataset, figure);
    }
    return { run, rows };
  }).filter((group) => group.rows.size);
}

function figureTable(name, setting, groups, datasets) {
  const metric = about.metrics[name];
  const most = new Map(datasets.map((dataset) =>
    [dataset, Math.max(0, ...groups.flatMap((g) => [...g.rows.values()].map((row) => row.get(dataset)?.n ?? 0)))]));
  const direction = metric.higher === null ? "" : metric.higher ? "; more is better" : "; less is better";
  const table = el("table", {},
    el("caption", {}, `${metric.label}${metric.share ? " (× 100)" : ""}, ${setting}: mean over questions and its 95 % interval${direction}`),
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "system"),
      ...datasets.map((d) => el("th", { scope: "col" }, d, el("span", { class: "interval" }, `n = ${most.get(d)}`))))));
  const heading = (text) => el("tr", {}, el("th", { scope: "rowgroup", colspan: datasets.length + 1 }, text));
  for (const { run, rows } of groups) {
    const body = el("tbody", {}, heading(`${run.label} (${run.title})`));
    for (const [system, row] of rows) {
      const cells = datasets.map((dataset) => {
        const figure = row.get(dataset);
        if (!figure) return el("td", {}, "");
        const fewer = figure.n < most.get(dataset) ? `, n = ${figure.n}` : "";
        return el("td", {}, number(metric, figure.value), el("span", { class: "interval" },
          `${number(metric, figure.low)} to ${number(metric, figure.high)}${fewer}`));
      });
      body.append(el("tr", { class: system === "clara" ? "clara" : null }, el("th", { scope: "row" }, label(system)), ...cells));
    }
    table.append(body);
  }
  const paper = paperRows(name, setting);
  if (paper.size) {
    const body = el("tbody", { class: "paper" }, heading(`${about.paperLabel}: not measured here`));
    for (const [system, row] of paper) {
      body.append(el("tr", {}, el("th", { scope: "row" }, system),
        ...datasets.map((d) => el("td", {}, row.has(d) ? row.get(d).toFixed(1) : ""))));
    }
    table.append(body);
  }
  return el("div", { class: "wide", tabindex: 0, role: "region", "aria-label": `table of ${metric.label}` }, table);
}

/* The end of an axis, and how many parts of round length it has. */
function niceAxis(top) {
  const power = 10 ** Math.floor(Math.log10(top || 1));
  const ends = [[1, 4], [1.5, 3], [2, 4], [3, 3], [4, 4], [5, 5], [6, 3], [8, 4], [10, 4]];
  const [end, parts] = ends.find(([step]) => step * power >= top * 0.999);
  return { top: end * power, parts };
}

/* Shortened in the picture only; the table has the whole name. */
const short = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

function forestPlot(name, setting, dataset, groups, { top, parts }) {
  const metric = about.metrics[name], left = 146, width = 400, right = width - 14;
  const x = (value) => left + ((right - left) * Math.min(value, top)) / top;
  const scale = metric.share ? 100 : 1;
  const marks = [];
  let y = 8;
  for (const { run, rows } of groups) {
    const present = [...rows].filter(([, row]) => row.get(dataset) && row.get(dataset).value !== null);
    if (!present.length) continue;
    if (about.runs.length > 1) { marks.push(svg("text", { x: 2, y: y + 8, class: "group" }, short(run.label, 48))); y += 16; }
    for (const [system, row] of present) {
      const { value, low, high } = row.get(dataset);
      const bar = low === null || high === null ? null :
        svg("line", { x1: x(low * scale), x2: x(high * scale), y1: y + 4, y2: y + 4 });
      marks.push(svg("g", { class: system === "clara" ? "clara" : "other" },
        svg("text", { x: left - 8, y: y + 8, "text-anchor": "end" }, short(label(system), 22)), bar,
        svg("circle", { cx: x(value * scale), cy: y + 4, r: 4 }),
        svg("title", {}, `${label(system)}: ${number(metric, value)} (${number(metric, low)} to ${number(metric, high)})`)));
      y += 17;
    }
    y += 4;
  }
  const paper = [...paperRows(name, setting)].filter(([, row]) => row.has(dataset));
  if (paper.length) { marks.push(svg("text", { x: 2, y: y + 8, class: "group faint" }, about.paperLabel)); y += 16; }
  for (const [system, row] of paper) {
    const at = x(row.get(dataset));
    marks.push(svg("g", { class: "paper" },
      svg("text", { x: left - 8, y: y + 8, "text-anchor": "end" }, short(system, 24)),
      svg("path", { d: `M${at - 5} ${y + 4}L${at} ${y - 1}L${at + 5} ${y + 4}L${at} ${y + 9}Z` }),
      svg("title", {}, `${about.paperLabel}, ${system}: ${row.get(dataset).toFixed(1)}`)));
    y += 17;
  }
  const ticks = [...Array(parts + 1).keys()].map((step) => (top * step) / parts);
  const axis = ticks.map((tick) => svg("g", {}, svg("line", { x1: x(tick), x2: x(tick), y1: 0, y2: y }),
    svg("text", { x: x(tick), y: y + 14, "text-anchor": "middle", class: "faint" }, String(+tick.toPrecision(3)))));
  return el("figure", {}, el("figcaption", {}, dataset),
    svg("svg", { viewBox: `0 0 ${width} ${y + 20}`, role: "img",
      "aria-label": `${metric.label} on ${dataset}, ${setting}; the values are in the table above` }, ...axis, ...marks));
}

function drawSection(title, metrics) {
  const figures = about.runs.flatMap((run) => run.figures).filter((figure) => metrics.includes(figure.metric));
  const settings = unique(figures.map((figure) => figure.setting));
  let metric = metrics.includes("recall_5") ? "recall_5" : metrics[0], setting = settings[settings.length - 1];
  const place = el("div", { "aria-live": "polite" });
  const draw = () => {
    const groups = figuresOf(metric, setting);
    if (!groups.length) return place.replaceChildren(el("p", {}, "No run has this metric in this setting."));
    const datasets = unique(groups.flatMap((g) => [...g.rows.values()].flatMap((row) => [...row.keys()])));
    datasets.sort((a, b) => (a === "average") - (b === "average"));
    const scale = about.metrics[metric].share ? 100 : 1;
    const shown = groups.flatMap((g) => [...g.rows.values()].flatMap((row) => [...row.values()]));
    const paper = [...paperRows(metric, setting).values()].flatMap((row) => [...row.values()]);
    const axis = niceAxis(Math.max(...shown.map((f) => Math.max(f.high ?? 0, f.value ?? 0) * scale), ...paper));
    place.replaceChildren(figureTable(metric, setting, groups, datasets), el("div", { class: "plots" },
      ...datasets.map((dataset) => forestPlot(metric, setting, dataset, groups, axis))));
  };
  const metricChoice = chooser("metric", metrics.map((name) => [name, about.metrics[name].label]), (v) => { metric = v; draw(); });
  const settingChoice = chooser("setting", settings.map((name) => [name, name]), (v) => { setting = v; draw(); });
  metricChoice.querySelector("select").value = metric;
  settingChoice.querySelector("select").value = setting;
  document.getElementById("figures").append(el("section", {}, el("h2", {}, title),
    el("div", { class: "controls" }, metricChoice, settingChoice), place));
  draw();
}

/* ---- questions ---- */

let texts = [], all = [], found = [], current = 0;
const filters = { run: "", dataset: "", setting: "", search: "", answer: "", gold: "" };

const right = (question, system) => question.systems[system]?.scores.cover_em;
const ANSWER_FILTERS = {
  "": ["any answer", () => true],
  right: ["CLaRa right", (q) => right(q, "clara") === 1],
  wrong: ["CLaRa wrong", (q) => right(q, "clara") === 0],
  differ: ["CLaRa and text RAG differ", (q) => both(q) && right(q, "clara") !== right(q, "text_rag")],
  won: ["CLaRa right, text RAG wrong", (q) => both(q) && right(q, "clara") > right(q, "text_rag")],
  lost: ["CLaRa wrong, text RAG right", (q) => both(q) && right(q, "clara") < right(q, "text_rag")],
};
const both = (q) => right(q, "clara") !== undefined && right(q, "text_rag") !== undefined;
const goldRead = (q) => unique(q.systems.clara.selected.map(([index]) => index)).filter((i) => q.pos_index.includes(i)).length;
const GOLD_FILTERS = {
  "": ["any", () => true],
  all: ["all gold read", (q) => q.relevant > 0 && goldRead(q) >= q.relevant],
  some: ["some gold read", (q) => goldRead(q) > 0],
  none: ["no gold read", (q) => q.relevant > 0 && goldRead(q) === 0],
  absent: ["no gold known", (q) => !q.relevant],
};

function matches(question) {
  const wanted = filters.search.toLowerCase();
  return (filters.run === "" || question.run === Number(filters.run)) &&
    (filters.dataset === "" || question.dataset === filters.dataset) &&
    (filters.setting === "" || question.setting === filters.setting) &&
    ANSWER_FILTERS[filters.answer][1](question) && GOLD_FILTERS[filters.gold][1](question) &&
    (wanted === "" || [question.question, question.id, ...question.golden,
      ...Object.values(question.systems).map((system) => system.prediction || "")]
      .some((text) => text.toLowerCase().includes(wanted)));
}

function scoreChips(scores, system) {
  return Object.entries(scores).map(([name, value]) => {
    const yesNo = name === "cover_em" || name === "em";
    const text = yesNo ? `${about.chips[name]} ${value ? "✓" : "✗"}` : `${about.chips[name]} ${(100 * value).toFixed(0)}`;
    return el("span", { class: `chip${yesNo ? (value ? " good" : " bad") : ""}`, "data-system": system }, text);
  });
}

function answersTable(question) {
  const systems = Object.entries(question.systems).sort(([, a], [, b]) => (a.prediction === null) - (b.prediction === null));
  const rows = systems.map(([name, system]) => el("tr", { class: name === "clara" ? "clara" : null },
    el("th", { scope: "row" }, label(name)),
    el("td", {}, system.prediction === null ? el("span", { class: "muted" }, "ranks only") :
      el("span", { class: "text" }, system.prediction || "(empty)"), el("div", {}, ...scoreChips(system.scores, name))),
    el("td", { class: "number", "data-label": "tokens" }, system.prompt_tokens === null ? "" : String(system.prompt_tokens)),
    el("td", { class: "number", "data-label": "seconds" }, system.latency_s === null ? "" : system.latency_s.toFixed(3))));
  return el("table", { class: "answers" }, el("caption", {}, "Answers of each system"),
    el("thead", {}, el("tr", {}, ...["system", "answer", "prompt tokens", "seconds"].map((t) => el("th", { scope: "col" }, t)))),
    el("tbody", {}, ...rows));
}

function documentCard(question, index) {
  const text = texts[question.documents[index]], gold = question.pos_index.includes(Number(index));
  const chips = gold ? [el("span", { class: "chip gold" }, "gold")] : [];
  for (const [name, system] of Object.entries(question.systems)) {
    const at = system.selected.findIndex(([chosen]) => chosen === Number(index));
    const rank = at >= 0 ? at : (system.ranking || []).indexOf(Number(index));
    if (rank < 0) continue;
    const score = at >= 0 && system.selected[at][1] !== null ? `, score ${system.selected[at][1].toFixed(3)}` : "";
    chips.push(el("span", { class: `chip${name === "clara" ? " clara" : ""}` }, `${label(name)} ${rank + 1}${score}`));
  }
  const cut = text.indexOf("\n"), title = cut > 0 && cut < 120 ? text.slice(0, cut) : `document ${index}`;
  const read = question.systems.clara.selected.some(([chosen]) => chosen === Number(index));
  return el("details", { class: `document${gold ? " gold" : ""}`, open: read || gold || null },
    el("summary", {}, `${title} `, ...chips), el("p", { class: "text" }, cut > 0 && cut < 120 ? text.slice(cut + 1) : text));
}

function drawQuestion(place) {
  const question = found[current];
  if (!question) return place.replaceChildren(el("p", {}, "No question fits the filters."));
  const order = question.systems.clara.selected.map(([index]) => String(index)).filter((i) => i in question.documents);
  const known = Object.keys(question.documents);
  const gold = known.filter((index) => question.pos_index.includes(Number(index)));
  const documents = unique([...order, ...gold, ...known]);
  const paraphrase = question.setting === "paraphrase";
  const pool = question.candidates === null ? "" : ` · ${count(question.candidates, "candidate")}`;
  const relevant = question.relevant ? ` · ${goldRead(question)} of ${question.relevant} gold read` : "";
  place.replaceChildren(
    el("p", { class: "muted" }, `${about.runs[question.run].label} · ${question.dataset} · ${question.setting} · ${question.id}${pool}${relevant}`),
    el("h3", {}, question.question || "Paraphrase of a document"),
    el("p", {}, paraphrase ? "Given paraphrase: " : "Gold: ", ...(question.golden.length ? question.golden : ["none"])
      .map((text) => el("span", { class: "chip gold text" }, text))),
    answersTable(question), el("h3", {}, `Documents shown: ${documents.length}`),
    ...documents.map((index) => documentCard(question, index)));
}

function drawList(list, show) {
  const page = Math.floor(current / PAGE), pages = Math.max(1, Math.ceil(found.length / PAGE));
  const items = found.slice(page * PAGE, (page + 1) * PAGE).map((question, offset) => {
    const position = page * PAGE + offset, verdict = right(question, "clara");
    const mark = verdict === undefined ? "" : verdict ? "✓ " : "✗ ";
    const where = [about.runs.length > 1 ? about.runs[question.run].label : "", question.dataset, question.setting];
    return el("li", {}, el("button", { type: "button", "aria-current": String(position === current), onclick: () => show(position) },
      verdict === undefined ? null : el("span", { class: "chip " + (verdict ? "good" : "bad"), "aria-label": verdict ? "right" : "wrong" }, mark.trim()),
      question.question || texts[Object.values(question.documents)[0]]?.slice(0, 80) || question.id,
      el("small", {}, where.filter(Boolean).join(" · "))));
  });
  list.replaceChildren(
    el("p", { "aria-live": "polite", id: "found" }, `${count(found.length, "question")} of ${all.length.toLocaleString("en")}`),
    el("ol", {}, ...items),
    el("div", { class: "pager" },
      el("button", { type: "button", disabled: page === 0, onclick: () => show((page - 1) * PAGE) }, "Previous"),
      el("span", {}, `page ${page + 1} of ${pages}, ${PAGE} a page`),
      el("button", { type: "button", disabled: page + 1 >= pages, onclick: () => show((page + 1) * PAGE) }, "Next")));
  // Scrolled inside the list only: scrollIntoView would move the page as well.
  const chosen = list.querySelector("[aria-current=true]"), box = list.querySelector("ol");
  if (chosen) box.scrollTop = chosen.offsetTop - box.offsetTop - box.clientHeight / 3;
}

function drawBrowser() {
  const section = document.getElementById("browser");
  section.append(el("h2", { id: "browser-title" }, "Questions"));
  for (const run of about.runs) {
    const left = run.questions - run.shown;
    if (!run.questions) section.append(el("p", { class: "note" }, `${run.label}: no predictions.jsonl beside results.json, so its questions cannot be shown.`));
    else if (left) section.append(el("p", { class: "note" }, `${run.label}: ${count(run.shown, "question")} shown, ${left.toLocaleString("en")} left out (--max_questions).`));
  }
  if (!about.runs.some((run) => run.shown)) return;
  ({ questions: all, texts } = JSON.parse(document.getElementById("questions").textContent));
  const list = el("div", { class: "list" }), detail = el("article", { id: "question" });
  const show = (position) => {
    current = Math.max(0, Math.min(position, found.length - 1));
    drawList(list, show);
    drawQuestion(detail);
  };
  const refresh = () => { found = all.filter(matches); show(0); };
  const choose = (name, options, key) => chooser(name, options, (value) => { filters[key] = value; refresh(); });
  const values = (key) => [["", "all"], ...unique(all.map((q) => q[key])).map((v) => [v, key === "run" ? about.runs[v].label : v])];
  const rules = (table) => Object.entries(table).map(([value, [text]]) => [value, text]);
  let waiting = 0;
  const search = el("input", { type: "search", placeholder: "question, answer or id", oninput: () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { filters.search = search.value; refresh(); }, 150);
  } });
  section.append(
    el("div", { class: "controls" }, choose("run", values("run"), "run"), choose("data set", values("dataset"), "dataset"),
      choose("setting", values("setting"), "setting"),
      all.some((q) => right(q, "clara") !== undefined) ? choose("answer, by Cover-EM", rules(ANSWER_FILTERS), "answer") : null,
      all.some((q) => q.relevant) ? choose("gold documents", rules(GOLD_FILTERS), "gold") : null,
      el("label", {}, "search", search)),
    el("p", { class: "muted keys" }, el("kbd", {}, "j"), " or ", el("kbd", {}, "→"), " next question, ", el("kbd", {}, "k"), " or ",
      el("kbd", {}, "←"), " the one before, ", el("kbd", {}, "/"), " search"),
    el("div", { class: "split" }, list, detail));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea, .wide")) return;
    const step = { j: 1, ArrowRight: 1, k: -1, ArrowLeft: -1 }[event.key];
    if (step) show(current + step);
    else if (event.key === "/") search.focus();
    else return;
    event.preventDefault();
  });
  refresh();
}

drawAbout();
for (const title of unique(Object.values(about.metrics).map((metric) => metric.section))) {
  drawSection(title, Object.keys(about.metrics).filter((name) => about.metrics[name].section === title));
}
drawBrowser();
