// One question after the other: shows it, takes the answer by key, mouse or touch, and goes on at once, for the next
// ones are here already.

import { listen, showHelp } from "./keys.js";
import { Kept, Outbox, call, hello, sleep } from "./outbox.js";
import { CHOICES, LETTERS, STRENGTHS, THUMBS, button, composed, make, order, plain, turns } from "./parts.js";

const AHEAD = 3;  // questions that are held here: the one on the screen and those that follow
const POLL = 3000;  // milliseconds between two looks for more
const QUESTIONS = { compare: "Which answer is better?", rank: "Put the answers in order", rate: "How good is this answer?" };

const $ = id => document.getElementById(id);
let study, kept, outbox;
let queue = [], task = null, draft = {}, gone = new Set(), counts = { mine: 0, left: 0, per_minute: 0 };
const FORGOTTEN = 30 * 86400 * 1000;  // milliseconds after which a draft is thrown away
let loading = false, wanted = false, undoing = false, since = 0, spent = 0;

// ------------------------------------------------------------------------------------------ what is shown

function card(text, index) {
  const letter = LETTERS[index];
  const head = task.count > 1 ? [make("header", {}, make("b", {}, letter))] : [];
  const made = make("article", { class: "card", tabindex: "0", role: "group", "aria-label": `Answer ${letter}` },
    ...head, ...turns(text));
  if (task.kind === "rank") {
    const tiers = make("div", { class: "tiers", role: "group", "aria-label": `Place of answer ${letter}` });
    for (let tier = 1; tier <= task.count; tier++) {
      const one = make("button", { tabindex: "-1", "data-tier": tier, "aria-label": `place ${tier}` }, String(tier));
      one.addEventListener("click", () => { place(index, tier); made.focus(); });
      tiers.append(one);
    }
    head[0].append(tiers);
  }
  return made;
}

function choices() {
  const chosen = CHOICES[task.kind].map(([name, label, key, code]) => button(name, label, key, code, () => choose(name)));
  if (task.kind === "rate" && thumbs()) {
    return THUMBS.map(([name, label, key, code]) => button(name, label, key, code, () => submit({ thumb: name })));
  }
  if (task.kind === "rate") {
    const [lowest, highest] = study.ratings;
    for (let rating = lowest; rating <= highest; rating++) {
      const end = { [lowest]: "worst", [highest]: "best" }[rating] || "";
      const one = button(rating, end, String(rating), String(rating % 10), () => { decide({ rating }); $("submit").focus(); });
      one.setAttribute("aria-label", `${rating} of ${lowest} to ${highest} ${end}`);
      chosen.push(one);
    }
  }
  if (task.kind !== "compare") {
    chosen.push(button("submit", "Submit", "Enter", "Enter", () => submit({})));
    chosen.at(-1).id = "submit";
  }
  return chosen;
}

function show() {
  const now = Date.now();  // a lease that has run out belongs to others: ask again rather than show it
  queue = queue.filter(one => now - one.got < 1000 * one.lease_seconds);
  const before = task;
  task = queue[0] || null;
  for (const name of ["task", "choices", "strength", "open-note", "open-rewrite", "skip"]) $(name).hidden = !task;
  $("rest").hidden = Boolean(task);
  $("panel").hidden = false;
  paintCounts();
  if (before && !task) $("rest-title").focus();
  if (!task) return;
  draft = kept.get(`draft:${task.assignment}`) || {};
  [since, spent] = [performance.now(), 0];
  $("prompt").replaceChildren(...turns(task.prompt));
  $("prompt").hidden = task.prompt.length === 0;
  $("question").textContent = QUESTIONS[task.kind];
  $("task").className = $("answers").className = task.kind;
  $("answers").dataset.count = task.count;
  $("answers").replaceChildren(...task.answers.map(card));
  $("choices").className = task.kind === "rate" && !thumbs() ? "rate scale" : task.kind;
  $("choices").replaceChildren(...choices());
  $("strength").hidden = !(study.strength && task.kind === "compare");
  for (const name of ["note", "rewrite"]) {
    $(name).value = draft[name] || "";
    $(`${name}-field`).hidden = !draft[name];
  }
  $("sources").replaceChildren(...task.answers.map((text, index) => button("", LETTERS[index], "from", "", () => {
    $("rewrite").value = plain(text);
    decide({ rewrite: $("rewrite").value });
    $("rewrite").focus();
  })));
  paint();
  window.scrollTo(0, 0);
  $("prompt").scrollTop = $("prompt").children.length > 1 ? $("prompt").lastChild.offsetTop : 0;  // what is answered
  (task.kind === "rank" ? $("answers").firstChild : $("question")).focus({ preventScroll: true });
}

// A text field opens with the cursor in it.
function write(name) {
  $(`${name}-field`).hidden = false;
  $(name).focus();
  $(name).scrollIntoView({ block: "nearest" });
}

const thumbs = () => study.ratings[0] === 0 && study.ratings[1] === 1;

function paint() {
  const mark = (element, on) => element.setAttribute("aria-pressed", String(Boolean(on)));
  for (const one of $("choices").children) {
    const name = one.dataset.name;
    if (name === "submit") one.removeAttribute("aria-pressed");
    else mark(one, [draft.choice, draft.thumb, String(draft.rating)].includes(name));
  }
  [...$("strength").querySelectorAll("button")].forEach((one, index) => mark(one, draft.strength === index + 1));
  [...$("answers").children].forEach((one, place) => {
    const tier = (draft.tiers || [])[place];
    for (const key of one.querySelectorAll("[data-tier]")) mark(key, Number(key.dataset.tier) === tier);
    if (task.kind === "rank") one.setAttribute("aria-label", `Answer ${LETTERS[place]}, ${tier ? `place ${tier}` : "no place yet"}`);
    one.classList.toggle("placed", Boolean(tier));
  });
}

function paintCounts() {
  const { mine, left, per_minute: pace } = counts;
  $("bar").max = Math.max(mine + left, 1);
  $("bar").value = mine;
  const minutes = Math.ceil(left / pace);
  const time = left && pace ? ` · about ${minutes} min left · ${Math.round(60 / pace)} s each` : "";
  $("pace").textContent = `${mine} of ${mine + left}${time}`;
  $("rest-text").textContent = "New questions appear here by themselves."
    + (mine ? ` You have answered ${mine}: thank you.` : "");
}

function paintSending(error) {
  const waiting = outbox.entries.length;
  const many = waiting === 1 ? "1 answer waits" : `${waiting} answers wait`;
  const why = error && (error.status ? error.message : "No connection to the server.");
  const text = error ? `${why} ${waiting ? `${many} in this browser and will be sent.` : "Trying again."}` : "";
  if ($("sending").textContent !== text) $("sending").textContent = text;  // else it is read aloud at every try
}

const say = text => { $("said").textContent = text; };

// ------------------------------------------------------------------------------------------ what is decided

function decide(change) {
  task.touched = Date.now();
  draft = { ...draft, ...change, at: task.touched };
  kept.set(`draft:${task.assignment}`, draft);
  paint();
}

const choose = choice => submit({ choice });

// Pressed once more it is taken back.
function strengthen(strength) {
  decide({ strength: draft.strength === strength ? undefined : strength });
  say(draft.strength ? `${STRENGTHS[strength - 1]} better` : "");
}

// The reply at `index` goes into a tier; after a first choice the next reply without one comes up.
function place(index, tier) {
  const tiers = [...(draft.tiers || new Array(task.count).fill(0))];
  const first = !tiers[index];
  tiers[index] = tier;
  decide({ tiers, choice: undefined });
  say(order(tiers)[1]);
  const next = tiers.indexOf(0);
  if (first && next >= 0) $("answers").children[next].focus();
}

function submit(change) {
  if (!task) return;
  decide(change);
  const { answer, words, missing, place: needed } = composed(task, draft);
  if (missing) {
    if (needed !== undefined) $("answers").children[needed].focus();
    say(missing);
    return;
  }
  const long = ["note", "rewrite"].find(name => (draft[name] || "").length > $(name).maxLength);
  if (long) {  // a text that starts from an answer can be
    write(long);
    say(`This text is too long: ${draft[long].length} characters of at most ${$(long).maxLength}.`);
    return;
  }
  const ms = Math.round(spent + performance.now() - since);
  const [{ assignment }, written] = [task, draft];
  counts = { ...counts, mine: counts.mine + 1, left: Math.max(counts.left - 1, 0) };
  leave();
  say(`Answered: ${words}.`);
  const refused = error => { gone.delete(assignment); kept.set(`draft:${assignment}`, written); say(error.message); };
  outbox.add("/api/answer", { assignment, ms, answer }).then(value => tally(value.progress), refused);
}

function skip() {
  if (!task) return;
  const { assignment } = task;
  leave();
  say("Skipped; it comes back when nothing else is left.");
  // From then on it may come back.
  outbox.add("/api/skip", { assignment }).catch(error => say(error.message)).then(() => { gone.delete(assignment); more(); });
}

function leave() {
  gone.add(task.assignment);
  kept.remove(`draft:${task.assignment}`);
  queue.shift();
  show();
}

async function undo() {
  if (undoing) return;
  undoing = true;
  say("Taking the last answer back …");
  try {
    const { task: earlier, answer } = await outbox.add("/api/undo", {});
    if (earlier) {
      gone.delete(earlier.assignment);
      kept.set(`draft:${earlier.assignment}`, { ...answer, at: Date.now() });
      queue = [{ ...earlier, got: Date.now() }, ...queue.filter(one => one.assignment !== earlier.assignment)];
      counts = { ...counts, mine: Math.max(counts.mine - 1, 0), left: counts.left + 1 };
      show();
    }
    say(earlier ? "Taken back: your earlier answer is marked." : "There is nothing to take back.");
  } catch (error) { say(error.message); }
  undoing = false;
}

// ------------------------------------------------------------------------------------------ what comes

function tally(progress) {
  // What still waits to be sent counts as answered.
  const unsent = outbox.entries.filter(entry => entry.path === "/api/answer").length;
  counts = { ...progress, mine: progress.mine + unsent, left: Math.max(progress.left - unsent, 0) };
  paintCounts();
}

// Whoever is at work on a question keeps it; one that is only open goes to others in the end.
const lapsing = () => task?.touched > task?.got && Date.now() - task.got > 500 * task.lease_seconds;

async function more() {
  wanted = true;
  if (loading) return;
  loading = true;
  while (wanted) {
    wanted = false;
    try {
      const got = await call(`/api/next?count=${AHEAD}`);
      const here = id => gone.has(id) || outbox.holds(id) || queue.some(one => one.assignment === id);
      for (const { assignment, lease_seconds } of got.tasks) {
        const held = queue.find(one => one.assignment === assignment);
        if (held) Object.assign(held, { lease_seconds, got: Date.now() });
      }
      queue.push(...got.tasks.filter(one => !here(one.assignment)).map(one => ({ ...one, got: Date.now() })));
      tally(got.progress);
      if (!outbox.entries.length) paintSending(null);
    } catch (error) { paintSending(error); }
  }
  loading = false;
  if (!task) show();
}

async function start() {
  try {
    study = await hello();
  } catch (error) {
    if (error.status === 401) { location.reload(); return; }
    $("sending").textContent = "No connection to the server; trying again.";
    return sleep(POLL).then(start);
  }
  kept = new Kept(`plaudit:${study.study}:${encodeURIComponent(study.person)}:`);
  for (const name of kept.names("draft:")) if (!(kept.get(name)?.at > Date.now() - FORGOTTEN)) kept.remove(name);
  outbox = new Outbox(kept, study.person, error => {
    paintSending(error);
    if (!error && queue.length < AHEAD) more();
  });
  for (const entry of outbox.entries) entry.reject = error => say(error.message);
  document.title = $("title").textContent = study.title;
  $("person").textContent = study.person;
  $("instructions").textContent = study.instructions;
  $("strength").append(make("span", {}, "If you like, first: how much better?"), ...STRENGTHS.map((label, index) =>
    button("", label, `⇧${index + 1}`, `Shift+${index + 1}`, () => strengthen(index + 1))));
  for (const name of ["note", "rewrite"]) {
    $(name).addEventListener("input", () => decide({ [name]: $(name).value }));
    $(`open-${name}`).addEventListener("click", () => write(name));
  }
  $("skip").addEventListener("click", event => { if (event.detail < 2) skip(); });
  $("undo").addEventListener("click", event => { if (event.detail < 2) undo(); });
  const actions = { task: () => task, study, choose, place, submit, decide, strengthen, skip, undo, write, thumbs };
  $("keys").addEventListener("click", () => showHelp(actions));
  listen(actions);
  document.addEventListener("visibilitychange", () => {  // only the time that it is looked at counts
    if (document.hidden) spent += performance.now() - since;
    else since = performance.now();
  });
  setInterval(() => { if (!document.hidden && (queue.length < AHEAD || lapsing())) more(); }, POLL);
  outbox.run();
  more();
}

start();
