// What the service answers, as elements; and what features tell besides: which labelled images are nearest, which are typical.

import { make } from "./images.js";

/** Red, green, blue, alpha from the least attended patch to the most: dark, so that the looked-at stands out on every image. */
const HEAT = [
  [14, 16, 48, 190],
  [120, 28, 109, 165],
  [237, 105, 37, 140],
  [252, 225, 120, 90],
];
const NEAREST = 3;
const RANKED = 3;

function distance(a, b) {
  return Math.hypot(...a.map((value, index) => value - b[index]));
}

function percent(share) {
  const value = 100 * share;
  return value > 99.9 && share < 1 ? "> 99.9 %" : value > 0 && value < 0.1 ? "< 0.1 %" : `${value.toFixed(1)} %`;
}

/** The labelled images with the least distance to the query, by features of the model: [{name, image, away}]. */
export function nearestTo(query, classes, model) {
  const features = query.features.get(model);
  return classes
    .flatMap(({ name, images }) => images.map((image) => ({ name, image, away: distance(features, image.features.get(model)) })))
    .sort((one, other) => one.away - other.away)
    .slice(0, NEAREST);
}

/** Of a class's images, three or more, that which is nearest to their mean, its prototype. */
export function typicalOf(images, model) {
  if (images.length < 3) return [];
  const rows = images.map((image) => image.features.get(model));
  const mean = rows[0].map((_, column) => rows.reduce((sum, row) => sum + row[column], 0) / rows.length);
  const away = rows.map((row) => distance(row, mean));
  return [images[away.indexOf(Math.min(...away))]];
}

/** An answer's list entry.
 * @param opinions [{title, row, plain}] of one model or two, the first of which is the verdict.
 * @param nearest as of nearestTo, or null before it is known.
 * @param grid attention map over the image, or null.
 */
export function resultOf(query, opinions, nearest, grid) {
  const [{ row }] = opinions;
  const none = row.none_of_these === true;
  const heading = none ? make("h3", {}, make("span", { className: "chip", textContent: "None of these" })) : make("h3", { textContent: row.class });
  const about = none ? `${query.name}: nearest to ${row.class}, but too far` : query.name;
  const verdict = make("div", { className: "verdict" }, heading, make("p", { textContent: about }));
  const told = make("div", { className: "told" }, verdict, make("div", { className: "opinions" }, ...opinions.map(opinionOf)));
  if (nearest) told.append(nearestList(nearest));
  const seen = make("div", { className: "seen" }, make("img", { src: query.url, alt: query.name }));
  if (grid) seen.append(heatMap(grid));
  return make("li", { className: "result" }, seen, told);
}

function opinionOf({ title, row, plain }) {
  const bars = row.ranked.slice(0, RANKED).map((candidate) => {
    const fill = make("i");
    fill.style.width = `${100 * candidate.probability}%`;
    const bar = make("div", { className: "bar" }, fill);
    bar.setAttribute("aria-hidden", "true");
    return make("li", {}, make("span", { textContent: candidate.class }), make("span", { textContent: percent(candidate.probability) }), bar);
  });
  const heading = make("h4", { textContent: row.none_of_these ? `${title}: none of these` : title });
  return make("div", { className: plain ? "opinion plain" : "opinion" }, heading, make("ol", {}, ...bars));
}

function nearestList(nearest) {
  const items = nearest.map(({ name, image, away }) =>
    make("li", {}, make("img", { src: image.url, alt: image.name }), `${name}, ${away.toPrecision(3)} away`),
  );
  return make("div", { className: "nearest" }, make("span", { textContent: "Nearest labelled images" }), make("ol", {}, ...items));
}

/** Between the two stops around `level` in [0, 1]. */
function heat(level) {
  const place = level * (HEAT.length - 1);
  const below = Math.min(Math.floor(place), HEAT.length - 2);
  return HEAT[below].map((value, channel) => value + (place - below) * (HEAT[below + 1][channel] - value));
}

function heatMap(grid) {
  const [height, width, most] = [grid.length, grid[0].length, Math.max(...grid.flat())];
  const canvas = make("canvas", { width, height });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(width, height);
  grid.flat().forEach((share, index) => pixels.data.set(heat(share / most), 4 * index));
  context.putImageData(pixels, 0, 0);
  const row = grid.findIndex((shares) => shares.includes(most));
  const place = `row ${row + 1}, column ${grid[row].indexOf(most) + 1} of ${height} by ${width} patches`;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Where the model looks: most at ${place}, ${percent(most)}`);
  return canvas;
}
