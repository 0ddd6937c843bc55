// Arithmetic on the pixels of a micrograph: low-pass and contrast. Plain loops: they are fast everywhere, also without a GPU.

/** Widths of three running means that together are close to a Gaussian of this standard deviation. */
export function boxWidths(sigma) {
  let low = Math.floor(Math.sqrt(4 * sigma * sigma + 1));
  if (low % 2 === 0) low -= 1;
  const narrow = Math.round((12 * sigma * sigma - 3 * low * low - 12 * low - 9) / (-4 * low - 4));
  return [0, 1, 2].map((pass) => (pass < narrow ? low : low + 2));
}

/** Standard deviation, in pixels, of the Gaussian whose transform falls to one half at a resolution. */
export const sigmaOf = (resolution, pixelSize) => (0.18739 * resolution) / pixelSize;

/** Three running means along rows and columns; beyond the edges the outermost pixels continue. Returns a Float32Array. */
export function blurred(bytes, height, width, widths, out = new Float32Array(height * width)) {
  const first = new Float32Array(width), second = new Float32Array(width);
  for (let y = 0; y < height; y++) {
    let row = first, other = second;
    for (let x = 0, at = y * width; x < width; x++) row[x] = bytes[at + x];
    for (const size of widths) {
      if (size === 1) continue;
      meanOfRow(row, other, size);
      [row, other] = [other, row];
    }
    out.set(row, y * width);
  }
  // strips of columns stay in the cache of the processor for all three means
  let here = new Float32Array(height * STRIP), there = new Float32Array(height * STRIP);
  for (let left = 0; left < width; left += STRIP) {
    const strip = Math.min(STRIP, width - left);
    for (let y = 0; y < height; y++) {
      for (let x = 0, from = y * width + left, to = y * strip; x < strip; x++) here[to + x] = out[from + x];
    }
    for (const size of widths) {
      if (size === 1) continue;
      meanOfColumns(here, there, height, strip, size);
      [here, there] = [there, here];
    }
    for (let y = 0; y < height; y++) {
      for (let x = 0, to = y * width + left, from = y * strip; x < strip; x++) out[to + x] = here[from + x];
    }
  }
  return out;
}

const STRIP = 64;

function meanOfRow(row, out, size) {
  const width = row.length, reach = (size - 1) / 2, last = width - 1, share = 1 / size;
  let sum = row[0] * (reach + 1);
  for (let k = 1; k <= reach; k++) sum += row[k < last ? k : last];
  for (let x = 0; x < width; x++) {
    out[x] = sum * share;
    const leaves = x - reach, enters = x + reach + 1;
    sum += row[enters < last ? enters : last] - row[leaves > 0 ? leaves : 0];
  }
}

function meanOfColumns(from, to, height, width, size) {
  // columns are summed as whole rows: walking down single columns is ten times slower
  const reach = (size - 1) / 2, share = 1 / size, last = height - 1, sums = new Float64Array(width);
  for (let k = -reach; k <= reach; k++) {
    const at = Math.min(Math.max(k, 0), last) * width;
    for (let x = 0; x < width; x++) sums[x] += from[at + x];
  }
  for (let y = 0; y < height; y++) {
    const at = y * width, enters = Math.min(y + reach + 1, last) * width, leaves = Math.max(y - reach, 0) * width;
    for (let x = 0; x < width; x++) {
      to[at + x] = sums[x] * share;
      sums[x] += from[enters + x] - from[leaves + x];
    }
  }
}

/** An area of a picture (rows from `bottom`, columns from `left`), as bytes. */
export function cut(picture, { bottom, left, height, width }, out = new Uint8Array(height * width)) {
  for (let y = 0; y < height; y++) {
    const from = (bottom + y) * picture.width + left;
    out.set(picture.bytes.subarray(from, from + width), y * width);
  }
  return out;
}

const kept = new Map();

/** An array that is used again each time: filters that follow each other would fill the heap faster than the browser empties it. */
function room(Kind, length) {
  if (!(kept.get(Kind)?.length >= length)) kept.set(Kind, new Kind(length));
  return kept.get(Kind).subarray(0, length);
}

/**
 * An area as the three running means of the whole picture give it: only what reaches into the area is summed. Returns a Float32Array that
 * holds until the next call.
 */
export function blurredArea(picture, area, widths) {
  const reach = widths.reduce((sum, size) => sum + (size - 1) / 2, 0);
  const bottom = Math.max(area.bottom - reach, 0), left = Math.max(area.left - reach, 0);
  const height = Math.min(area.bottom + area.height + reach, picture.height) - bottom;
  const width = Math.min(area.left + area.width + reach, picture.width) - left;
  const bytes = cut(picture, { bottom, left, height, width }, room(Uint8Array, height * width));
  const all = blurred(bytes, height, width, widths, room(Float32Array, height * width));
  for (let y = 0; y < area.height; y++) {
    const from = (area.bottom - bottom + y) * width + area.left - left;
    all.copyWithin(y * area.width, from, from + area.width);
  }
  return all.subarray(0, area.height * area.width);
}

const BLOCKS = 4, BLOCK = 96;

/** Mean and standard deviation of a blurred picture, from blocks all over it: greys must not change when it is moved. */
export function spread(picture, widths) {
  let sum = 0, squares = 0, count = 0;
  const begin = (i, length, size) => Math.round(((i + 0.5) * length) / BLOCKS - size / 2);
  const height = Math.min(BLOCK, Math.floor(picture.height / BLOCKS)), width = Math.min(BLOCK, Math.floor(picture.width / BLOCKS));
  for (let i = 0; i < BLOCKS * BLOCKS; i++) {
    const bottom = begin(i % BLOCKS, picture.height, height), left = begin(Math.floor(i / BLOCKS), picture.width, width);
    for (const value of blurredArea(picture, { bottom, left, height, width }, widths)) {
      sum += value;
      squares += value * value;
      count += 1;
    }
  }
  const mean = sum / count;
  return { mean, deviation: Math.sqrt(Math.max(squares / count - mean * mean, 0)) };
}

/** Values as bytes: the mean becomes 128, four standard deviations 127 more or less. */
export function quantised(values, { mean, deviation }) {
  const scale = 31.75 / Math.max(deviation, 1e-6), offset = 128 - mean * scale, out = new Uint8ClampedArray(values.length);
  for (let i = 0; i < values.length; i++) out[i] = values[i] * scale + offset;
  return out;
}

/** Opaque greys for bytes; `contrast` 1 shows four standard deviations, `brightness` is added, from -1 to 1. */
export function greys(contrast, brightness, inverted) {
  const table = new Uint32Array(256);
  for (let value = 0; value < 256; value++) {
    let grey = Math.min(255, Math.max(0, (value - 128) * contrast + 128 + 127 * brightness)) | 0;
    if (inverted) grey = 255 - grey;
    table[value] = 0xff000000 | (grey << 16) | (grey << 8) | grey;
  }
  return table;
}

/** Write bytes whose first row is the lowest as pixels whose first row is the topmost. */
export function paint(bytes, height, width, table, pixels) {
  for (let y = 0; y < height; y++) {
    let to = (height - 1 - y) * width;
    for (let at = y * width, end = at + width; at < end; at++) pixels[to++] = table[bytes[at]];
  }
}
