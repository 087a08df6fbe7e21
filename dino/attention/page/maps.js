"use strict";

// From stored weights to pixels, in the same steps as dino/attention/render.py: what the page shows is what the
// files show. A map is {rows, cols, values}: Float32Array, one value per patch, row by row.

const ROUNDING = 1e-6;
const OUTLINE = [255, 170, 0];

/** Base64 of little-endian uint16, relative to the head's maximum `top`, as weights. */
function decodeWeights(text, top) {
  const bytes = atob(text);
  const weights = new Float32Array(bytes.length / 2);
  for (let i = 0; i < weights.length; i++) {
    const level = bytes.charCodeAt(2 * i) | (bytes.charCodeAt(2 * i + 1) << 8);
    weights[i] = level * (top / 65535);
  }
  return weights;
}

/** One map of several heads: their mean or, patch by patch, their maximum. */
function combine(heads, how) {
  const combined = new Float32Array(heads[0].length);
  for (let i = 0; i < combined.length; i++) {
    let value = 0;
    for (const head of heads) value = how === "max" ? Math.max(value, head[i]) : value + head[i];
    combined[i] = how === "max" ? value : value / heads.length;
  }
  return combined;
}

/** Patches from the heaviest down, equal ones from the top left on, and the mass held up to each. */
function rank(values) {
  const order = Uint32Array.from(values, (_, i) => i).sort((a, b) => values[b] - values[a] || a - b);
  const mass = new Float64Array(values.length);
  let sum = 0;
  order.forEach((patch, place) => (mass[place] = sum += values[patch]));
  return { order, mass };
}

/** The smallest set of patches that holds at least `keep` of the mass: Uint8Array, 1 where kept. */
function massMask({ order, mass }, keep) {
  const kept = new Uint8Array(order.length);
  const goal = keep * mass[mass.length - 1] * (1 - 1e-9);
  for (let place = 0; place < order.length && (place ? mass[place - 1] : 0) < goal; place++) kept[order[place]] = 1;
  return kept;
}

/**
 * Values to show as dark and as bright. `scale` is {percentiles: [low, high]} of the values, or {even: [low, high]},
 * in multiples of the weight that each of so many patches has when all are equal.
 */
function limits(values, { percentiles, even }, patches) {
  if (even) return even.map((times) => times / patches);
  const sorted = values.slice().sort();
  const [low, high] = percentiles.map((percent) => percentile(sorted, percent));
  // Where the few patches beyond the percentiles are all that a map has, they are not to be hidden.
  return isFlat(low, high) ? [sorted[0], sorted[sorted.length - 1]] : [low, high];
}

function percentile(sorted, percent) {
  const place = (percent / 100) * (sorted.length - 1);
  const below = Math.floor(place);
  const next = sorted[Math.min(below + 1, sorted.length - 1)];
  return sorted[below] + (place - below) * (next - sorted[below]);
}

function isFlat(low, high) {
  return high - low <= ROUNDING * Math.max(Math.abs(low), Math.abs(high));
}

/** Values in [0, 1] between the limits, beyond them clipped; all 0 without contrast. */
function normalize(values, [low, high]) {
  if (isFlat(low, high)) return new Float32Array(values.length);
  return values.map((value) => Math.min(1, Math.max(0, (value - low) / (high - low))));
}

/** For each pixel along a side: the patches that it is made of and their weights. */
function taps(pixels, side, patch, count, smooth) {
  const step = side / pixels / patch;
  return Array.from({ length: pixels }, (_, pixel) => {
    const place = (pixel + 0.5) * step;
    if (!smooth) return { at: [Math.min(count - 1, Math.floor(place))], weight: [1] };
    const first = Math.floor(place - 0.5) - 1;
    const at = [0, 1, 2, 3].map((i) => Math.min(count - 1, Math.max(0, first + i)));
    return { at, weight: [0, 1, 2, 3].map((i) => cubic(place - 0.5 - first - i)) };
  });
}

/** The interpolation kernel of OpenCV's INTER_CUBIC. */
function cubic(distance) {
  const x = Math.abs(distance);
  if (x < 1) return (1.25 * x - 2.25) * x * x + 1;
  return x < 2 ? ((-0.75 * x + 3.75) * x - 6) * x + 3 : 0;
}

/**
 * Values per patch at the size of the canvas: each patch over the part of the picture that it was made of.
 * `grid` is {rows, cols, patch, height, width}, the last three in pixels of the picture.
 */
function enlarge(values, grid, width, height, smooth) {
  const across = taps(width, grid.width, grid.patch, grid.cols, smooth);
  const down = taps(height, grid.height, grid.patch, grid.rows, smooth);
  const wide = new Float32Array(grid.rows * width);
  for (let row = 0; row < grid.rows; row++) {
    for (let x = 0; x < width; x++) wide[row * width + x] = blend(values, row * grid.cols, 1, across[x]);
  }
  const large = new Float32Array(height * width);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) large[y * width + x] = blend(wide, x, width, down[y]);
  }
  return smooth ? clip(large, values) : large;
}

function blend(values, start, stride, { at, weight }) {
  let sum = 0;
  for (let i = 0; i < at.length; i++) sum += weight[i] * values[start + stride * at[i]];
  return sum;
}

/** Cubic curves overshoot next to an edge; a map must not gain values that no patch has. */
function clip(large, values) {
  const [low, high] = extremes(values);
  return large.map((value) => Math.min(high, Math.max(low, value)));
}

function extremes(values) {
  return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}

/** Pixels of values in [0, 1] in the colours of a table of 256 RGB triples. */
function paintHeat(pixels, values, table) {
  for (let i = 0; i < values.length; i++) {
    const level = 3 * Math.min(255, Math.floor(values[i] * 256));
    pixels[4 * i] = table[level];
    pixels[4 * i + 1] = table[level + 1];
    pixels[4 * i + 2] = table[level + 2];
    pixels[4 * i + 3] = 255;
  }
}

/** Black over what a mask (0 or 1 per pixel) leaves out, a line of so many pixels along the inside of its border. */
function paintMask(pixels, mask, width, height, line) {
  const outside = (x, y) => x >= 0 && y >= 0 && x < width && y < height && !mask[y * width + x];
  const nearOutside = (x, y) =>
    outside(x - line, y) || outside(x + line, y) || outside(x, y - line) || outside(x, y + line);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const i = y * width + x;
      if (!mask[i]) pixels[4 * i + 3] = 255;
      else if (nearOutside(x, y)) pixels.set([...OUTLINE, 255], 4 * i);
    }
  }
}

/**
 * Whose colour each patch has: of the heads that keep it, the one with the largest share of its own mass there;
 * its place in `heads`, counted from 1, and 0 where none keeps the patch.
 */
function owners(heads, rankings, keep) {
  const owner = new Uint8Array(heads[0].length);
  const largest = new Float32Array(owner.length);
  heads.forEach((head, h) => {
    const { mass } = rankings[h];
    massMask(rankings[h], keep).forEach((kept, patch) => {
      const share = kept && Math.fround(head[patch] / mass[mass.length - 1]);
      if (share > largest[patch]) [owner[patch], largest[patch]] = [h + 1, share];
    });
  });
  return owner;
}

/** Pixels in the colours of their owners; those without one are darkened. */
function paintOwners(pixels, owner, colours) {
  for (let i = 0; i < owner.length; i++) {
    if (owner[i]) pixels.set([...colours[owner[i] - 1], 255], 4 * i);
    else pixels[4 * i + 3] = 150;
  }
}

/** Part of the picture's area that the kept patches cover: those at its edge count as far as they lie on it. */
function coveredArea(kept, { rows, cols, patch, width, height }) {
  let area = 0;
  for (let row = 0; row < rows; row++) {
    for (let col = 0; col < cols; col++) {
      if (!kept[row * cols + col]) continue;
      area += Math.min(patch, width - col * patch) * Math.min(patch, height - row * patch);
    }
  }
  return area / (width * height);
}
