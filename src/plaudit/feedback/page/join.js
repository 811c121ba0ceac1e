// Asks for a name, and goes on to the questions.

import { call } from "./outbox.js";

document.getElementById("join").addEventListener("submit", async event => {
  event.preventDefault();
  try {
    await call(location.pathname, { name: document.getElementById("name").value.trim() });
    location.replace("/");
  } catch (error) {
    document.getElementById("problem").textContent = error.status ? error.message : "No connection to the server.";
  }
});
