// Pieces of the page. Texts of models and people only ever become text nodes.

export const LETTERS = "ABCDEFGHI";
export const CHOICES = {
  compare: [
    ["left", "A is better", "←", "ArrowLeft"], ["equal", "Equal", "↑", "ArrowUp"],
    ["cant", "Can’t compare", "↓", "ArrowDown"], ["right", "B is better", "→", "ArrowRight"],
  ],
  rank: [["cant", "Can’t compare", "C", "C"]],
  rate: [],
};
export const THUMBS = [["down", "Bad", "−", "-"], ["up", "Good", "+", "+"]];
export const STRENGTHS = ["slightly", "clearly", "much"];

export function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export function button(name, label, key, shortcut, act) {
  const made = make("button", { "data-name": name, "aria-pressed": "false", "aria-keyshortcuts": shortcut },
    make("kbd", { "aria-hidden": "true" }, key), make("span", {}, label));
  // The second click of a double click would answer the next question.
  made.addEventListener("click", event => { if (event.detail < 2) act(); });
  return made;
}

const body = text => make("div", { class: "text", dir: "auto" }, text);

// A text, or a conversation turn by turn; of a single turn it is clear whose it is.
export function turns(text) {
  if (typeof text === "string") return [body(text)];
  if (text.length === 1) return [body(text[0].content)];
  return text.map(turn => make("div", { class: "turn" }, make("p", { class: "role" }, turn.role), body(turn.content)));
}

// The words of an answer alone: of a conversation, its last turn's.
export const plain = text => (typeof text === "string" ? text : (text.at(-1) || { content: "" }).content);

// Places without gaps (1 1 3 is 1 1 2), and the same in words: "A = B > C".
// Of answers without a place (0) nothing is said.
export function order(tiers) {
  const steps = [...new Set(tiers)].filter(Boolean).sort((a, b) => a - b);
  const named = step => tiers.flatMap((tier, place) => (tier === step ? [LETTERS[place]] : [])).join(" = ");
  return [tiers.map(tier => steps.indexOf(tier) + 1), steps.map(named).join(" > ")];
}

// What the server is to get, and the same in words; or what is missing, and which answer is concerned.
export function composed(task, draft) {
  const answer = {};
  for (const name of ["note", "rewrite"]) if (draft[name]) answer[name] = draft[name];
  if (draft.choice) {
    const words = CHOICES[task.kind].find(([name]) => name === draft.choice)[1];
    const decided = draft.choice === "left" || draft.choice === "right";
    if (!(decided && draft.strength)) return { answer: { ...answer, choice: draft.choice }, words };
    const much = STRENGTHS[draft.strength - 1];
    return { answer: { ...answer, choice: draft.choice, strength: draft.strength }, words: `${words}, ${much}` };
  }
  if (task.kind === "compare") return { missing: "Choose first: ← ↑ ↓ or →." };
  if (task.kind === "rank") {
    const place = (draft.tiers || [0]).indexOf(0);
    if (place >= 0) return { missing: `Answer ${LETTERS[place]} has no place yet: press a number.`, place };
    const [tiers, words] = order(draft.tiers);
    return { answer: { ...answer, tiers }, words };
  }
  if (draft.thumb) return { answer: { ...answer, thumb: draft.thumb }, words: draft.thumb === "up" ? "good" : "bad" };
  if (draft.rating !== undefined) return { answer: { ...answer, rating: draft.rating }, words: String(draft.rating) };
  return { missing: "Choose a rating first." };
}
