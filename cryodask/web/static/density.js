// Density of two columns and ranges of others, for a million particles at a time: plain loops over typed arrays, no objects per particle.

const SAMPLE = 5000;

/** Read an answer of `particles/columns`: a head in JSON, then one array per column. */
export function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const arrays = head.columns.map((_, n) => new Float32Array(buffer, 4 + length + 4 * n * head.rows, head.rows));
  return { head, arrays };
}

/** Where most values of a column lie: beyond its outermost half per cent a picture would be empty. Null if none is known. */
export function extent(values) {
  const step = Math.max(1, Math.floor(values.length / SAMPLE)), sample = [];
  for (let i = 0; i < values.length; i += step) if (Number.isFinite(values[i])) sample.push(values[i]);
  if (!sample.length) return null;
  sample.sort((a, b) => a - b);
  const cut = Math.floor(sample.length / 200), low = sample[cut], high = sample[sample.length - 1 - cut];
  const room = (high - low) * 0.04 || Math.abs(low) * 0.05 || 1;
  return [low - room, high + room];
}

/** Which values are within a range, as an array of 0 and 1, and how many; a value that is not known is outside, as in a `select` step. */
export function within(values, [low, high]) {
  const inside = new Uint8Array(values.length), a = low ?? -Infinity, b = high ?? Infinity;
  let count = 0;
  for (let i = 0; i < values.length; i++) {
    const one = values[i] >= a && values[i] <= b ? 1 : 0;
    inside[i] = one;
    count += one;
  }
  return { inside, count };
}

/** Whether each of `size` particles is within all of some ranges, and how many are. */
export function together(size, masks) {
  const keep = new Uint8Array(size).fill(1);
  for (const mask of masks) for (let i = 0; i < size; i++) keep[i] &= mask[i];
  let count = 0;
  for (let i = 0; i < size; i++) count += keep[i];
  return { keep, count };
}

/** Particles by cell, all and those that are kept; `outside` counts those beyond the picture or with an unknown value. */
export function binned(xs, ys, keep, [x0, x1], [y0, y1], across, down) {
  const all = new Uint32Array(across * down), kept = new Uint32Array(across * down);
  const perX = across / (x1 - x0), perY = down / (y1 - y0);
  let outside = 0;
  for (let i = 0; i < xs.length; i++) {
    const x = (xs[i] - x0) * perX, y = (ys[i] - y0) * perY;
    if (x >= 0 && x < across && y >= 0 && y < down) {
      const cell = (down - 1 - (y | 0)) * across + (x | 0);
      all[cell]++;
      kept[cell] += keep[i];
    } else outside++;
  }
  return { all, kept, outside };
}

/** Round numbers for an axis. */
export function ticks(low, high, most = 6) {
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= rough * 0.999);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high; n++) found.push(+(n * step).toPrecision(10));
  return found;
}
