// Asks for a name, and goes on to the questions. Whoever was let in without hearing of it is the same person when they ask
// again, by a key that this browser alone has, for as long as it has not heard.

import { Kept, call, random } from "./outbox.js";

const kept = new Kept("plaudit:join:");
const key = kept.get("key") || random();
kept.set("key", key);

document.getElementById("join").addEventListener("submit", async event => {
  event.preventDefault();
  try {
    await call(location.pathname, { name: document.getElementById("name").value.trim(), key });
    kept.remove("key");
    location.replace("/");
  } catch (error) {
    const yours = error.status === 409 ? " If it is yours, ask whoever runs this study for a link of your own." : "";
    const why = error.status ? error.message.replace(/^name: /, "") + yours : "No connection to the server; try again.";
    document.getElementById("problem").textContent = why;
  }
});
