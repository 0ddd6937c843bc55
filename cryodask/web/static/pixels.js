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
export function blurred(bytes, height, width, widths) {
  const out = new Float32Array(height * width), first = new Float32Array(width), second = new Float32Array(width);
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

/** Values as bytes: the mean becomes 128, four standard deviations 127 more or less. */
export function quantised(values) {
  let sum = 0, squares = 0, count = 0;
  for (let i = 0; i < values.length; i += 7) {
    sum += values[i];
    squares += values[i] * values[i];
    count += 1;
  }
  const mean = sum / count, scale = 31.75 / Math.max(Math.sqrt(Math.max(squares / count - mean * mean, 0)), 1e-6);
  const out = new Uint8ClampedArray(values.length), offset = 128 - mean * scale;
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
