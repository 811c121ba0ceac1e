// Keys, and the page that explains them.

const $ = id => document.getElementById(id);
const ARROWS = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "equal", ArrowDown: "cant" };
const STEPS = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };

// act: what a key can do; see `actions` in page.js.
export function listen(act) {
  document.addEventListener("keydown", event => {
    if ($("help").open) {
      if (event.key === "?") $("help").close();
      return;
    }
    if (event.target.matches("textarea")) {
      if (event.key === "Escape") $("question").focus();
      else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) act.submit({});
      return;
    }
    if (pressed(event, act)) event.preventDefault();
  });
}

// Whether the key meant something here. A key that is held down answers once only.
function pressed(event, act) {
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if ((event.ctrlKey || event.metaKey) && key === "z") return event.repeat || always(act.undo);
  if (event.ctrlKey || event.metaKey || event.altKey) return false;
  if (key === "?") return always(showHelp, act);
  if (key === "u") return event.repeat || always(act.undo);
  const task = act.task();
  if (!task) return false;
  if (event.repeat) return key in ARROWS && task.kind !== "rank";
  if (key === "Enter") return !event.target.matches("button") && always(act.submit, {});
  const plain = { n: () => act.write("note"), e: () => act.write("rewrite"), s: act.skip }[key];
  if (plain) return always(plain);
  return { compare, rank, rate }[task.kind](event, key, act, task);
}

const always = (action, ...given) => { action(...given); return true; };

function compare(event, key, act) {
  if (key in ARROWS) return always(act.choose, ARROWS[key]);
  if (key === "c") return always(act.choose, "cant");
  const strength = event.shiftKey && /^(Digit|Numpad)[123]$/.test(event.code) && Number(event.code.at(-1));
  return Boolean(strength) && act.study.strength && always(act.strengthen, strength);
}

function rank(event, key, act, task) {
  if (key === "c") return always(act.choose, "cant");
  const cards = [...$("answers").children];
  const here = cards.findIndex(card => card.contains(document.activeElement));
  if (key in STEPS) {
    const next = here < 0 ? 0 : (here + STEPS[key] + cards.length) % cards.length;
    return always(() => cards[next].focus());
  }
  const tier = Number(key);
  if (!(tier >= 1 && tier <= task.count)) return false;
  const free = cards.findIndex(card => !card.classList.contains("placed"));  // next, for who comes out of a text field
  const place = here < 0 ? free : here;
  return place >= 0 && always(act.place, place, tier);
}

function rate(event, key, act) {
  if (act.thumbs()) {
    if (key === "+" || key === "=") return always(act.submit, { thumb: "up" });
    return (key === "-" || key === "_") && always(act.submit, { thumb: "down" });
  }
  const [lowest, highest] = act.study.ratings;
  if (!/^[0-9]$/.test(key)) return false;
  const rating = key === "0" && lowest > 0 ? 10 : Number(key);
  return rating >= lowest && rating <= highest && always(act.decide, { rating });
}

export function showHelp(act) {
  const { kind } = act.task() || {};
  const own = {
    compare: [["←", "A is better"], ["→", "B is better"], ["↑", "they are equal"], ["↓", "they can’t be compared"],
      ...(act.study.strength ? [["Shift + 1 2 3", "how much better, before the arrow: slightly, clearly, much"]] : [])],
    rank: [["↑ ↓ or Tab", "go from answer to answer"], ["1 … 9", "give the answer that place; ties are welcome"],
      ["C", "they can’t be compared"], ["Enter", "submit"]],
    rate: act.thumbs() ? [["+", "good"], ["−", "bad"]] : [["0 … 9", "the rating (0 is ten)"], ["Enter", "submit"]],
  }[kind] || [];
  const all = [["N", "write a note"], ["E", "write a better answer"], ["Esc", "leave a text field"],
    ["Ctrl + Enter", "submit out of a text field"], ["S", "skip"], ["U or Ctrl + Z", "take the last answer back"],
    ["Tab, then PgDn", "scroll in a long text"], ["?", "open and close this"]];
  $("help-keys").replaceChildren(...[...own, ...all].flatMap(([key, meaning]) => {
    const [name, said] = [document.createElement("dt"), document.createElement("dd")];
    [name.textContent, said.textContent] = [key, meaning];
    return [name, said];
  }));
  $("help").showModal();
}
