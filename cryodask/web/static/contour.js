// Marching squares: the line on which a picture has a value.

/** Pieces of the line, as pairs of [row, column]; `value(row, column)` is the picture, of `size` rows and columns. */
export function boundary(value, size, level) {
  const pieces = [];
  for (let row = 0; row < size - 1; row++) for (let column = 0; column < size - 1; column++) {
    const corners = [[row, column], [row, column + 1], [row + 1, column + 1], [row + 1, column]], values = corners.map((c) => value(...c)), crossed = [];
    for (let k = 0; k < 4; k++) {
      const a = values[k], b = values[(k + 1) % 4];
      if (a > level === b > level) continue;
      const share = (level - a) / (b - a), [p, q] = [corners[k], corners[(k + 1) % 4]];
      crossed.push([p[0] + share * (q[0] - p[0]), p[1] + share * (q[1] - p[1])]);
    }
    for (let k = 0; k + 1 < crossed.length; k += 2) pieces.push([crossed[k], crossed[k + 1]]);
  }
  return pieces;
}
