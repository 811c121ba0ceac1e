// Talks to the server. What a person decides waits in the outbox, which outlives the page, until the server has
// acknowledged it: it is sent in order, again and again, under a key that makes sending twice count once.

let csrf = "";
const PATIENCE = 15_000;  // milliseconds until a connection that says nothing counts as none

export class Refusal extends Error {
  constructor(status, sentence, wait) {
    super(sentence);
    Object.assign(this, { status, wait });
  }
  get passing() { return this.status === 401 || this.status === 403 || this.status === 429 || this.status >= 500; }
}

// The server's answer; a Refusal if it refuses, and any other error if it was not reached: no connection, one that says
// nothing, or something in between that speaks for it, whose pages are neither an answer nor a refusal.
export async function call(path, body, patience = PATIENCE) {
  const options = body && {
    method: "POST", headers: { "content-type": "application/json", "x-csrf-token": csrf }, body: JSON.stringify(body),
  };
  const response = await fetch(path, { ...options, signal: AbortSignal.timeout(patience) });
  const value = await response.json();
  if (response.ok) return value;
  if (typeof value.error !== "string") throw new Error(`Something answered ${response.status}.`);
  throw new Refusal(response.status, value.error, 1000 * Number(response.headers.get("retry-after")));
}

export async function hello(role = "person") {
  const study = await call(`/api/study?as=${role}`);
  csrf = study.csrf;
  return study;
}

// crypto.randomUUID exists only where the connection is secure; this exists everywhere.
export const random = () => Array.from(crypto.getRandomValues(new Uint32Array(4)), part => part.toString(36)).join("-");

export const sleep = time => new Promise(done => setTimeout(done, time));

// A browser may forbid or fill its storage; then what is kept lives as long as the page.
export class Kept {
  constructor(prefix) { this.prefix = prefix; }
  get(name) { try { return JSON.parse(localStorage.getItem(this.prefix + name)); } catch { return null; } }
  set(name, value) { try { localStorage.setItem(this.prefix + name, JSON.stringify(value)); } catch { /* see above */ } }
  remove(name) { try { localStorage.removeItem(this.prefix + name); } catch { /* see above */ } }
  names(start) {
    try {
      const all = Object.keys(localStorage).filter(name => name.startsWith(this.prefix + start));
      return all.sort().map(name => name.slice(this.prefix.length));
    } catch { return []; }
  }
}

export class Outbox {
  // changed(error): called when something was sent, or could not be.
  constructor(kept, person, changed) {
    Object.assign(this, { kept, person, changed, running: false });
    this.entries = kept.names("out:").map(name => ({ name, ...kept.get(name) })).filter(entry => entry.body);
  }

  // The server's answer, whenever it comes; rejected only if the server refuses for good.
  add(path, body) {
    const key = random();
    const entry = { name: `out:${Date.now()}-${key}`, path, body: { ...body, key } };
    this.kept.set(entry.name, { path, body: entry.body });
    this.entries.push(entry);
    const settled = new Promise((resolve, reject) => Object.assign(entry, { resolve, reject }));
    this.run();
    return settled;
  }

  holds(assignment) { return this.entries.some(entry => entry.body.assignment === assignment); }

  async run() {
    if (this.running) return;
    this.running = true;
    for (let pause = 300; this.entries.length;) {
      const entry = this.entries[0];
      try {
        const value = await call(entry.path, entry.body);
        this.done(entry);
        entry.resolve?.(value);
        this.changed(null);
        pause = 300;
      } catch (error) {
        if (error instanceof Refusal && !error.passing) {
          this.done(entry);
          if (entry.reject) entry.reject(error);
          this.changed(null);
          continue;
        }
        this.changed(error);
        await sleep(error.wait || pause);
        pause = Math.min(2 * pause, 5000);
        if (error.status === 403) await this.again();
      }
    }
    this.running = false;
  }

  // Another tab may have opened another link: nothing is ever sent in somebody else's name, nor while the page goes.
  async again() {
    const study = await hello().catch(() => null);
    if (!study || study.person === this.person) return;
    location.reload();
    await new Promise(() => {});
  }

  done(entry) {
    this.entries.shift();
    this.kept.remove(entry.name);
  }
}
