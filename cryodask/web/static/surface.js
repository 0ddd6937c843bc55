// A turnable surface on a plain canvas: triangles into a depth buffer, shaded by their normals. Needs no graphics card.
import { ask } from "./common.js";

const FAR = -1e9;
const INK = [110, 190, 225], VEIL = [240, 160, 70];
/** Colours of values from low to high, evenly spaced. */
export const SCALE = [[66, 90, 205], [62, 155, 254], [24, 214, 203], [70, 247, 131], [162, 252, 60], [225, 220, 55], [253, 165, 49], [239, 90, 17], [190, 34, 2]];

export class Surface {
  #mesh = null;
  #veil = null;
  #turn = [1, 0, 0, 0, 1, 0, 0, 0, 1];
  #zoom = 1;
  #reach = 0;
  #waiting = false;

  /** `steady`: surfaces of a series are shown at one scale, that of the largest; `fit()` begins another series. */
  constructor(canvas, steady = false) {
    this.canvas = canvas;
    this.steady = steady;
    let from = null;
    canvas.addEventListener("pointerdown", (event) => {
      from = [event.clientX, event.clientY];
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!from) return;
      this.turn((event.clientX - from[0]) * 0.01, (event.clientY - from[1]) * 0.01);
      from = [event.clientX, event.clientY];
    });
    for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, () => { from = null; });
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.#scale(Math.exp(-event.deltaY * 0.001));
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [-0.12, 0], ArrowRight: [0.12, 0], ArrowUp: [0, -0.12], ArrowDown: [0, 0.12] }[event.key];
      if (step) this.turn(...step);
      else if (event.key === "+" || event.key === "=") this.#scale(1.15);
      else if (event.key === "-") this.#scale(1 / 1.15);
      else return;
      event.preventDefault();
    });
  }

  /** The surface that is shown from now on; a veil is drawn over it, and lets it be seen through. */
  async load(address, veil = false) {
    const buffer = await (await ask(address)).arrayBuffer();
    const length = new DataView(buffer).getUint32(0, true);
    const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
    const vertices = new Float32Array(buffer, 4 + length, 3 * head.vertices);
    const triangles = new Uint32Array(buffer, 4 + length + vertices.byteLength, 3 * head.triangles);
    this.#reach = Math.max(this.steady ? this.#reach : 0, Math.sqrt(longest(vertices)) || head.size / 2);
    const values = head.label ? new Float32Array(buffer, 4 + length + vertices.byteLength + triangles.byteLength, head.vertices) : null;
    const inks = values ? colours(values, head.low, head.high) : plain(head.vertices, veil ? VEIL : INK);
    const mesh = { vertices, triangles, normals: normals(vertices, triangles), reach: this.#reach, inks };
    if (veil) this.#veil = mesh;
    else this.#mesh = mesh;
    this.canvas.dataset[veil ? "veil" : "triangles"] = head.triangles;
    this.draw();
    return head;
  }

  fit() {
    this.#reach = 0;
  }

  /** Turn about the vertical and the horizontal axis of the screen, radians. */
  turn(across, down) {
    const [c, s] = [Math.cos(across), Math.sin(across)], [d, t] = [Math.cos(down), Math.sin(down)];
    this.#turn = times([1, 0, 0, 0, d, t, 0, -t, d], times([c, 0, s, 0, 1, 0, -s, 0, c], this.#turn));
    this.draw();
  }

  #scale(factor) {
    this.#zoom = Math.min(8, Math.max(0.3, this.#zoom * factor));
    this.draw();
  }

  draw() {
    if (this.#waiting || !(this.#mesh || this.#veil)) return;
    this.#waiting = true;
    requestAnimationFrame(() => {
      this.#waiting = false;
      this.#paint();
    });
  }

  #paint() {
    const { width, height } = this.canvas, context = this.canvas.getContext("2d"), picture = context.createImageData(width, height);
    const reach = Math.max(this.#mesh?.reach || 0, this.#veil?.reach || 0), scale = (Math.min(width, height) / (2 * reach)) * 0.92 * this.#zoom;
    const nearest = new Float32Array(width * height).fill(FAR);
    if (this.#mesh) this.#shade(this.#mesh, scale, picture, nearest, () => true);
    // every other pixel, with a depth of its own: what lies behind is seen between them
    if (this.#veil) this.#shade(this.#veil, scale, picture, new Float32Array(width * height).fill(FAR), (x, y, z) => (x + y) % 2 === 0 && z > nearest[y * width + x]);
    context.putImageData(picture, 0, 0);
  }

  #shade({ vertices, triangles, normals: facing, inks }, scale, picture, nearest, covers) {
    const { width, height } = picture, m = this.#turn, count = vertices.length / 3;
    const xs = new Float32Array(count), ys = new Float32Array(count), depth = new Float32Array(count), light = new Float32Array(count);
    for (let i = 0, k = 0; i < count; i++, k += 3) {
      const x = vertices[k], y = vertices[k + 1], z = vertices[k + 2];
      xs[i] = width / 2 + scale * (m[0] * x + m[1] * y + m[2] * z);
      ys[i] = height / 2 - scale * (m[3] * x + m[4] * y + m[5] * z);
      depth[i] = m[6] * x + m[7] * y + m[8] * z;
      const nx = facing[k], ny = facing[k + 1], nz = facing[k + 2];
      const right = m[0] * nx + m[1] * ny + m[2] * nz, up = m[3] * nx + m[4] * ny + m[5] * nz, near = m[6] * nx + m[7] * ny + m[8] * nz;
      light[i] = Math.min(1, 0.28 + 0.72 * Math.max(0, 0.75 * near + 0.45 * up - 0.35 * right));
    }
    const pixels = picture.data;
    for (let t = 0; t < triangles.length; t += 3) {
      const a = triangles[t], b = triangles[t + 1], c = triangles[t + 2];
      const area = (xs[b] - xs[a]) * (ys[c] - ys[a]) - (xs[c] - xs[a]) * (ys[b] - ys[a]);
      if (area >= 0) continue; // seen from behind: y runs downwards on a screen
      const left = Math.max(0, Math.ceil(Math.min(xs[a], xs[b], xs[c]))), right = Math.min(width - 1, Math.floor(Math.max(xs[a], xs[b], xs[c])));
      const top = Math.max(0, Math.ceil(Math.min(ys[a], ys[b], ys[c]))), bottom = Math.min(height - 1, Math.floor(Math.max(ys[a], ys[b], ys[c])));
      for (let y = top; y <= bottom; y++) for (let x = left; x <= right; x++) {
        const u = ((xs[c] - xs[b]) * (y - ys[b]) - (ys[c] - ys[b]) * (x - xs[b])) / area;
        const v = ((xs[a] - xs[c]) * (y - ys[c]) - (ys[a] - ys[c]) * (x - xs[c])) / area;
        const w = 1 - u - v;
        if (u < 0 || v < 0 || w < 0) continue;
        const z = u * depth[a] + v * depth[b] + w * depth[c], at = y * width + x;
        if (z <= nearest[at] || !covers(x, y, z)) continue;
        nearest[at] = z;
        const shade = u * light[a] + v * light[b] + w * light[c];
        for (let i = 0; i < 3; i++) pixels[4 * at + i] = (u * inks[3 * a + i] + v * inks[3 * b + i] + w * inks[3 * c + i]) * shade;
        pixels[4 * at + 3] = 255;
      }
    }
  }
}

/** The same colour for every vertex. */
function plain(count, ink) {
  const out = new Uint8Array(3 * count);
  for (let k = 0; k < out.length; k++) out[k] = ink[k % 3];
  return out;
}

/** Colours of the vertices by their values; what lies beyond the ends of the scale has the colour of the end. */
function colours(values, low, high) {
  const out = new Uint8Array(3 * values.length), last = SCALE.length - 1;
  values.forEach((value, n) => {
    const at = Math.min(last, Math.max(0, ((value - low) / Math.max(high - low, 1e-9)) * last)), below = Math.min(last - 1, Math.floor(at));
    for (let i = 0; i < 3; i++) out[3 * n + i] = SCALE[below][i] + (at - below) * (SCALE[below + 1][i] - SCALE[below][i]);
  });
  return out;
}

/** Square of the distance of the vertex that is farthest from the centre. */
function longest(vertices) {
  let most = 0;
  for (let k = 0; k < vertices.length; k += 3) most = Math.max(most, vertices[k] ** 2 + vertices[k + 1] ** 2 + vertices[k + 2] ** 2);
  return most;
}

function normals(vertices, triangles) {
  const out = new Float32Array(vertices.length);
  for (let t = 0; t < triangles.length; t += 3) {
    const [a, b, c] = [3 * triangles[t], 3 * triangles[t + 1], 3 * triangles[t + 2]];
    const p = [0, 1, 2].map((i) => vertices[b + i] - vertices[a + i]), q = [0, 1, 2].map((i) => vertices[c + i] - vertices[a + i]);
    const n = [p[1] * q[2] - p[2] * q[1], p[2] * q[0] - p[0] * q[2], p[0] * q[1] - p[1] * q[0]];
    for (const at of [a, b, c]) for (let i = 0; i < 3; i++) out[at + i] += n[i];
  }
  for (let k = 0; k < out.length; k += 3) {
    const length = Math.hypot(out[k], out[k + 1], out[k + 2]) || 1;
    for (let i = 0; i < 3; i++) out[k + i] /= length;
  }
  return out;
}

function times(a, b) {
  const out = [];
  for (let r = 0; r < 3; r++) for (let c = 0; c < 3; c++) out.push(a[3 * r] * b[c] + a[3 * r + 1] * b[3 + c] + a[3 * r + 2] * b[6 + c]);
  return out;
}
