// What the manager sees: how far people are, how far they agree, and every answer with who gave it to what.

import { call, hello } from "./outbox.js";
import { LETTERS, make, turns } from "./parts.js";

const EVERY = 5000;  // milliseconds between two looks
const FIGURING = 120_000;  // milliseconds that figures of agreement may take
const FIGURES = {
  raw: "Raw agreement", cohen: "Cohen’s κ", fleiss: "Fleiss’ κ", alpha: "Krippendorff’s α", tau: "Kendall’s τ-b",
};
const PEOPLE = [
  ["answers", "Answers"], ["skipped", "Skipped"], ["seconds", "Median time"], ["others", "Agrees with others"],
  ["gold", "Right on gold"], ["oneself", "Agrees with oneself"], ["position", "Prefers the first"],
];

const $ = id => document.getElementById(id);
const cell = (tag, text) => make(tag, tag === "th" ? { scope: "col" } : {}, text);
const percent = share => (share && share.value !== null ? `${Math.round(100 * share.value)} %` : "–");
const plural = (count, one) => `${count} ${one}${count === 1 ? "" : "s"}`;
let page = 1, pages = 1, about = {}, look = {}, painted = "", known = false, looking = false, wanted = false;

function figure({ value, low, high, why }) {
  if (value === null || value === undefined) return [make("b", {}, "–"), make("small", {}, why || "")];
  const shown = number => number.toFixed(2).replace("-", "−");
  const interval = low === null || low === undefined ? why || "" : `${shown(low)} to ${shown(high)}`;
  return [make("b", {}, shown(value)), make("small", {}, interval)];
}

function paintPeople() {
  const known = about.people || {};
  $("people-head").replaceChildren(cell("th", "Name"), ...PEOPLE.map(([, title]) => cell("th", title)));
  $("people").replaceChildren(...Object.entries(look.people).map(([name, answers]) => {
    const own = known[name] || {};
    const seconds = own.seconds && own.seconds.median !== null ? `${own.seconds.median.toFixed(1)} s` : "–";
    const values = { answers, skipped: look.skipped[name] || 0, seconds };
    return make("tr", {}, make("th", { scope: "row", dir: "auto", title: name }, name),
      ...PEOPLE.map(([key]) => cell("td", String(values[key] ?? percent(own[key])))));
  }));
}

function paintAgreement() {
  const parts = (about.notes || []).map(note => make("p", { class: "note" }, note));
  for (const [kind, found] of Object.entries(about.kinds || {}).filter(([, one]) => one.shared)) {
    const name = { compare: "Pairs", rank: "Rankings", rate: "Ratings" }[kind];
    parts.push(make("h3", {}, `${name}: ${plural(found.shared, "item")} answered by two people or more`));
    parts.push(make("dl", { class: "facts" }, ...Object.entries(found.figures).map(([key, value]) =>
      make("div", {}, make("dt", {}, FIGURES[key] || key), make("dd", {}, ...figure(value))))));
  }
  $("agreement").replaceChildren(...parts);
}

// The candidates' places in the order shown, or, where that is not known, in the item's own.
const ordered = label => (label.order.length ? label.order : label.candidates.map((_, place) => place));

// The candidates in this order, with their ranks; places are letters, as on the person's screen.
function words(label) {
  const { ranks, rating, strength } = label.answer;
  const much = strength ? `, ${["slightly", "clearly", "much"][strength - 1]}` : "";
  if (rating !== undefined && rating !== null) return `rated ${rating}`;
  if (!ranks) return "can’t compare";
  const shown = ordered(label).map(place => ranks[place]);
  const steps = [...new Set(shown)].sort((a, b) => a - b);
  const named = step => shown.flatMap((rank, place) => (rank === step ? [LETTERS[place]] : [])).join(" = ");
  return steps.map(named).join(" > ") + much;
}

function source(candidate) {
  const entries = Object.entries(candidate.source);
  return entries.map(([name, value]) => `${name}: ${typeof value === "string" ? value : JSON.stringify(value)}`).join(" · ");
}

function labelRow(label, name) {
  const flags = [label.order.length === 0 && label.candidates.length > 1 && "order unknown", label.gold && "gold", label.repeat && "asked again", label.answer.note && "note",
    label.answer.rewrite && "rewrite"].filter(Boolean);
  const at = label.answered_at ? new Date(1000 * label.answered_at) : null;  // of what was judged elsewhere it is not known
  const when = make("time", at ? { datetime: at.toISOString() } : {},
    at ? `${at.toLocaleString()} · ${(label.ms / 1000).toFixed(1)} s` : "time unknown");
  const short = typeof label.prompt === "string" ? label.prompt : label.prompt.map(turn => turn.content).join(" ");
  const details = make("details", { "data-name": name }, make("summary", {},
    make("b", { dir: "auto", title: label.person }, label.person), make("span", { class: "verdict" }, words(label)),
    make("span", { class: "start", dir: "auto" }, short.slice(0, 160)),
    make("span", { class: "flags" }, ...flags.map(flag => make("i", {}, flag))), when));
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(full(label));
  });
  return details;
}

function full(label) {
  const extra = [["Note", label.answer.note], ["A better answer", label.answer.rewrite]].filter(([, text]) => text);
  return make("div", { class: "full" },
    make("section", { class: "card", "aria-label": "Prompt" }, ...turns(label.prompt)),
    make("div", { class: "shown" }, ...ordered(label).map((place, index) => make("article", { class: "card" },
      make("header", {}, make("b", {}, LETTERS[index]), make("small", { class: "source" }, source(label.candidates[place]))),
      ...turns(label.candidates[place].text)))),
    ...extra.map(([title, text]) => make("div", { class: "extra" }, make("h4", {}, title), ...turns(text))));
}

function paint() {
  const { done, left, per_minute: pace } = look.progress;
  document.title = `${look.title} · review`;
  $("title").textContent = look.title;
  const people = Object.values(look.people).filter(Boolean).length;
  $("headline").textContent = `${plural(done, "answer")} from ${people === 1 ? "1 person" : `${people} people`}`;
  const facts = [["Still to answer", left], ["Answers a minute", pace ? pace.toFixed(1) : "–"],
    ["Time left", left && pace ? `about ${Math.ceil(left / pace)} min` : "–"]];
  $("facts").replaceChildren(...facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, String(value)))));
  paintPeople();
  $("page").textContent = `${page} of ${Math.max(pages, 1)}`;
  $("newer").disabled = page <= 1;
  $("older").disabled = page >= pages;
  paintLabels();
}

// New answers come above; what somebody has opened stays open, and keeps the focus.
function paintLabels() {
  const name = label => `${label.id} ${label.answered_at}`;
  const names = new Set(look.labels.map(name));
  for (const row of [...$("labels").children]) if (!names.has(row.dataset.name)) row.remove();
  let below = $("labels").firstChild;
  for (const label of look.labels) {
    if (below?.dataset.name === name(label)) below = below.nextSibling;
    else $("labels").insertBefore(labelRow(label, name(label)), below);
  }
}

// One look at a time; who turns the page meanwhile gets another one at once.
async function refresh() {
  wanted = true;
  if (looking) return;
  looking = true;
  while (wanted) {
    wanted = false;
    try {
      if (!known) known = Boolean(await hello("manager"));
      const found = await call(`/api/review?page=${page}&since=${encodeURIComponent(painted)}`);
      if (wanted) continue;
      if (found.version !== painted) {  // else nothing else is in it
        look = found;
        pages = look.pages;
        paint();
        painted = look.version;
      }
      tell("");  // the figures may take longer
      about = await call("/api/agreement", undefined, FIGURING);
      paintPeople();
      paintAgreement();
    } catch (error) {
      tell(error.status ? error.message : "No connection to the server; trying again.");
    }
  }
  looking = false;
}

const tell = text => { if ($("problem").textContent !== text) $("problem").textContent = text; };

const turn = step => { page = Math.min(Math.max(page + step, 1), Math.max(pages, 1)); refresh(); };
$("newer").addEventListener("click", () => turn(-1));
$("older").addEventListener("click", () => turn(1));

$("link").addEventListener("submit", async event => {
  event.preventDefault();
  const name = $("link-name").value.trim();
  try {
    const renew = Object.hasOwn(look.people || {}, name);
    const { token } = await call("/api/people", { name, renew });
    $("made").textContent = `${location.origin}/join/${token}`;
    $("void").textContent = renew ? `${name}’s earlier link is void now.` : "";
    refresh();
  } catch (error) { $("made").textContent = error.message; $("void").textContent = ""; }
});

refresh();
setInterval(() => { if (!document.hidden && !looking) refresh(); }, EVERY);
