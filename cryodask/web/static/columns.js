// The numbers of all exposures of a session, kept up to date from the server's binary columns.
import { ask } from "./common.js";

export const WAITING = 0, STARTED = 1, DONE = 2, QUARANTINED = 3, LEFT_OUT = 4;

/** Read an answer of `columns`: a head in JSON, then arrays. */
export function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  let at = 4 + length;
  const take = (Kind) => {
    const array = new Kind(buffer, at, head.rows);
    at += array.byteLength;
    return array;
  };
  const time = take(Float64Array), rows = take(Uint32Array);
  const columns = Object.fromEntries(head.columns.map(({ name }) => [name, take(Float32Array)]));
  return { head, time, rows, columns, state: take(Uint8Array) };
}

export class Columns {
  size = 0;
  sequence = -1;
  epoch = "";
  about = [];
  names = [];
  values = {};
  time = new Float64Array(0);
  state = new Uint8Array(0);
  #loading = null;
  #again = false;

  /** Ask for what has changed; resolves when it is here. Several calls at once become one. */
  async load() {
    if (this.#loading) {
      this.#again = true;
      return this.#loading;
    }
    this.#loading = this.#load();
    try {
      await this.#loading;
    } finally {
      this.#loading = null;
    }
    if (this.#again) {
      this.#again = false;
      return this.load();
    }
    return undefined;
  }

  async #load() {
    const answer = await ask(`columns?since=${this.sequence}&epoch=${this.epoch}`);
    const { head, time, rows, columns, state } = unpack(await answer.arrayBuffer());
    if (head.epoch !== this.epoch) {
      Object.assign(this, { size: 0, names: [], values: {}, time: new Float64Array(0), state: new Uint8Array(0), epoch: head.epoch, about: head.columns });
    }
    this.#grow(head.size);
    for (let i = 0; i < rows.length; i++) {
      const row = rows[i];
      this.time[row] = time[i];
      this.state[row] = state[i];
      this.names[row] = head.names[i];
    }
    for (const name in columns) {
      const from = columns[name], to = this.values[name];
      for (let i = 0; i < rows.length; i++) to[rows[i]] = from[i];
    }
    this.sequence = head.sequence;
  }

  #grow(size) {
    const longer = (old, Kind, fill) => {
      const made = new Kind(size).fill(fill);
      made.set(old);
      return made;
    };
    if (size <= this.size && Object.keys(this.values).length) return;
    this.time = longer(this.time, Float64Array, NaN);
    this.state = longer(this.state, Uint8Array, LEFT_OUT);
    for (const { name } of this.about) this.values[name] = longer(this.values[name] || [], Float32Array, NaN);
    this.size = size;
  }
}
