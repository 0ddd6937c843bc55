// A plane of two numbers on a canvas: the frame with its axes, and where a pointer is in it.
import { colour, number } from "./common.js";
import { ticks } from "./density.js";

const LEFT = 84, BOTTOM = 52, EDGE = 10;

/** A colour of the sheet as the lower three bytes of a pixel. */
export const bgr = (hex) => [5, 3, 1].reduce((found, at) => (found << 8) | parseInt(hex.slice(at, at + 2), 16), 0);

/** The frame of a picture in a canvas, without what is written around it: ranges `x` and `y`, `w` and `h` pixels. */
export const frame = (canvas, x, y) => ({ x, y, w: canvas.width - LEFT - EDGE, h: canvas.height - BOTTOM - EDGE });

/** Draw `pixels`, rows from the top, into the frame; each cell as a block. */
export function fillFrame(context, box, picture) {
  const small = new OffscreenCanvas(picture.width, picture.height);
  small.getContext("2d").putImageData(picture, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(small, LEFT, EDGE, box.w, box.h);
}

/** Pixel of the canvas for a place in the plane. */
export const onCanvas = ({ x, y, w, h }, [a, b]) => [LEFT + ((a - x[0]) / (x[1] - x[0])) * w, EDGE + h - ((b - y[0]) / (y[1] - y[0])) * h];

/** The place in the plane under a pointer, at most at the border of the frame. */
export function placeAt(canvas, { x, y, w, h }, event) {
  const seen = canvas.getBoundingClientRect(), scale = canvas.width / seen.width, clip = (v) => Math.min(1, Math.max(0, v));
  const a = clip(((event.clientX - seen.left) * scale - LEFT) / w), b = clip(1 - ((event.clientY - seen.top) * scale - EDGE) / h);
  return [x[0] + a * (x[1] - x[0]), y[0] + b * (y[1] - y[0])];
}

export function axes(canvas, box, across, up) {
  const context = canvas.getContext("2d"), { w, h } = box;
  context.strokeStyle = context.fillStyle = colour("faint");
  context.lineWidth = 1;
  context.strokeRect(LEFT + 0.5, EDGE + 0.5, w, h);
  // on a phone the picture is shown at half its size, and its text must stay legible
  const text = 13 * Math.min(1.5, Math.max(1, canvas.width / (canvas.clientWidth || canvas.width)));
  context.font = `${text}px system-ui, sans-serif`;
  context.textAlign = "center";
  for (const value of ticks(...box.x)) {
    // a number at the border must not be cut off
    const half = context.measureText(number(value)).width / 2, at = onCanvas(box, [value, 0])[0];
    context.fillText(number(value), Math.min(at, canvas.width - half - 1), EDGE + h + text + 4);
  }
  context.fillText(across, LEFT + w / 2, canvas.height - 8);
  context.textAlign = "right";
  for (const value of ticks(...box.y)) context.fillText(number(value), LEFT - 5, onCanvas(box, [0, value])[1] + 4);
  context.save();
  context.rotate(-Math.PI / 2);
  context.textAlign = "center";
  context.fillText(up, -(EDGE + h / 2), text);
  context.restore();
}
