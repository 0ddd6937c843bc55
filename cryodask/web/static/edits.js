// Edits that wait until the server has them on disk. They survive reloads, and time without a network.

/** A random id, 32 hexadecimal digits. */
export const newId = () => [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

/** Edits kept in the browser, each under a key of its own, so that two open pages never overwrite each other's; without a prefix, in memory. */
export class Kept {
  constructor(prefix = "") {
    this.prefix = prefix && `${prefix}/`;
    this.memory = new Map();
  }

  all() {
    const found = new Map(this.memory);
    if (this.prefix) try {
      for (const key of Object.keys(localStorage)) {
        if (key.startsWith(this.prefix)) found.set(key.slice(this.prefix.length), JSON.parse(localStorage.getItem(key)));
      }
    } catch { /* no storage: those in memory are all */ }
    return [...found.values()].sort((a, b) => a.n - b.n || (a.id < b.id ? -1 : 1));
  }

  put(op) {
    this.memory.set(op.id, op);
    if (this.prefix) try {
      localStorage.setItem(this.prefix + op.id, JSON.stringify(op));
      this.memory.delete(op.id);
      return true;
    } catch {
      return false;
    }
    return true;
  }

  remove(id) {
    this.memory.delete(id);
    if (this.prefix) try {
      localStorage.removeItem(this.prefix + id);
    } catch { /* nothing was kept */ }
  }
}

/**
 * A function that runs `look` whenever it is asked to, one at a time: asked while it runs, it runs once more. After an error, which `failed` is
 * told, it tries again by itself. `changed` is called whenever it has come to an end; `busy()` says whether it has not.
 */
export function refresher(look, { failed = () => {}, changed = () => {} } = {}) {
  let running = false, asked = false;
  const run = async () => {
    asked = true;
    if (running) return;
    running = true;
    try {
      while (asked) {
        asked = false;
        await look();
      }
    } catch (error) {
      failed(error);
      setTimeout(run, 2000);
    } finally {
      running = false;
      changed();
    }
  };
  run.busy = () => running;
  return run;
}

/** Sends kept edits in order until each is acknowledged. `send(ops)` rejects with an error that has `status`, 0 without a connection. */
export class Queue {
  constructor(kept, send, { changed = () => {}, refused = () => {}, stored = () => {} } = {}) {
    Object.assign(this, { kept, send, changed, refused, stored });
    this.highest = 0;
    this.busy = false;
    this.wait = 0;
    this.timer = 0;
    this.trouble = "";
  }

  pending() {
    return this.kept.all();
  }

  add(edits) {
    const ops = edits.map((edit) => ({ id: newId(), ...edit, n: ++this.highest }));
    for (const op of ops) if (!this.kept.put(op)) this.trouble = "This browser keeps nothing: do not close the page before all edits are saved.";
    this.changed();
    this.flush();
    return ops;
  }

  seen(highest) {
    this.highest = Math.max(this.highest, highest, ...this.pending().map((op) => op.n));
  }

  async flush() {
    clearTimeout(this.timer);
    if (this.busy) return;
    this.busy = true;
    try {
      for (let ops = this.pending(); ops.length; ops = this.pending()) {
        // the edits of one exposure at a time, in their order
        const some = ops.filter((op) => op.row === ops[0].row).slice(0, 500);
        await this.deliver(some);
        this.wait = 0;
        this.trouble = "";
      }
    } catch (error) {
      this.trouble = error.message;
      this.wait = Math.min(this.wait ? 2 * this.wait : 500, 8000);
      this.timer = setTimeout(() => this.flush(), this.wait);
    } finally {
      this.busy = false;
      this.changed();
    }
  }

  async deliver(ops) {
    try {
      const answer = await this.send(ops);
      this.highest = Math.max(this.highest, answer.highest);
      this.stored(ops);
      for (const op of ops) this.kept.remove(op.id);
    } catch (error) {
      if (error.status !== 400 && error.status !== 422) throw error;
      if (ops.length > 1) {
        // one of them does not fit, and then none is stored: find out which
        for (const op of ops) await this.deliver([op]);
        return;
      }
      this.kept.remove(ops[0].id);
      this.refused(error.message);
    }
  }
}
