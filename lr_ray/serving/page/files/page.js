// The page: what is asked, in which order, and where problems are shown.

import { nearestTo, resultOf, typicalOf } from "./answers.js";
import { Bucket, ImageList, takeDrops } from "./buckets.js";
import { curlOf, pythonOf } from "./code.js";
import { make } from "./images.js";
import { Problem, attend, classifyOnce, embed, key, models, sampleTask } from "./service.js";

const BACKBONE = "backbone";
const byId = (id) => document.getElementById(id);
const PROBLEMS = ["problem", "classes-problem", "queries-problem", "key-problem"];

let buckets = [];
let underWay = Promise.resolve();
let answer = null; // {model, classes: [{name, images}], queries, rows, plainRows: null before they are known}
const queries = new ImageList("images to classify", changed);

function changed() {
  byId("stale").hidden = !answer;
}

// ------------------------------------------------------------------------------------------------------------ classes

function addBucket(name) {
  const bucket = new Bucket(name, changed, () => removeBucket(bucket));
  buckets.push(bucket);
  byId("classes").append(bucket.element);
  return bucket;
}

function removeBucket(bucket) {
  const next = buckets[buckets.indexOf(bucket) + 1];
  buckets = buckets.filter((other) => other !== bucket);
  bucket.element.remove();
  (next?.input ?? byId("add")).focus();
  changed();
}

function freeName() {
  const taken = buckets.map((bucket) => bucket.name);
  let number = 1;
  while (taken.includes(`Class ${number}`)) number += 1;
  return `Class ${number}`;
}

async function loadSample() {
  const there = buckets.some((bucket) => bucket.images.length) || queries.images.length;
  if (there && !window.confirm("Put the sample task in the place of the images that are here?")) return;
  const sample = await sampleTask();
  answer = null;
  byId("results").replaceChildren();
  for (const [id, hidden] of [["empty", false], ["code", true], ["stale", true]]) byId(id).hidden = hidden;
  clearProblems();
  for (const bucket of buckets) bucket.element.remove();
  buckets = [];
  queries.clear();
  for (const [name, files] of Object.entries(sample.classes)) await addBucket(name).list.add(files);
  await queries.add(sample.queries);
  say("The sample task is loaded.");
}

// ----------------------------------------------------------------------------------------------------------- problems

function say(text) {
  byId("status").textContent = text;
}

function showProblem(id, text) {
  byId(id).textContent = text;
  byId(id).hidden = false;
}

function clearProblems() {
  for (const id of PROBLEMS) byId(id).hidden = true;
  for (const list of [queries, ...buckets.map((bucket) => bucket.list)]) list.mark("wrong", []);
}

/** Beside what it is about: an image, the key, or all of it. The service names images by their place in the request. */
function showRefusal(problem, asked) {
  say("");
  if (problem.status === 401) return askForKey(problem.message);
  const places = [
    ...(asked?.classes ?? []).flatMap(({ name, images }) => images.map((image, index) => [`'${name}[${index}]'`, image, "classes-problem"])),
    ...(asked?.queries ?? []).map((image, index) => [`'images[${index}]'`, image, "queries-problem"]),
  ];
  const [place, image, id] = places.find(([text]) => problem.message.includes(text)) ?? ["", null, "problem"];
  if (image) for (const list of [queries, ...buckets.map((bucket) => bucket.list)]) list.mark("wrong", [image]);
  const text = image ? problem.message.replace(place, `'${image.name}'`) : problem.message;
  const traced = problem.status >= 500 && problem.requestId ? `${text} (request ${problem.requestId})` : text;
  return showProblem(id, traced.charAt(0).toUpperCase() + traced.slice(1));
}

function askForKey(reason) {
  byId("key-form").hidden = false;
  if (key.get()) showProblem("key-problem", reason);
  byId("key").focus();
}

/** Does the work when what is under way is done; what the service refuses is shown, a fault of ours is not hidden. */
function attempt(work, asked) {
  const run = async () => {
    byId("classify").setAttribute("aria-disabled", "true"); // `disabled` would take the focus away
    try {
      await work();
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      showRefusal(error, asked);
    } finally {
      byId("classify").removeAttribute("aria-disabled");
    }
  };
  underWay = underWay.then(run, run);
  return underWay;
}

// ----------------------------------------------------------------------------------------------------------- answers

function whatIsAsked() {
  const classes = buckets.map((bucket) => ({ name: bucket.name, images: [...bucket.images] }));
  const names = classes.map(({ name }) => name);
  const twice = names.find((name, index) => names.indexOf(name) !== index);
  const empty = classes.find(({ images }) => !images.length);
  if (names.includes("")) showProblem("classes-problem", "A class has no name; give it one.");
  else if (twice !== undefined) showProblem("classes-problem", `Two classes are called “${twice}”; give one of them another name.`);
  else if (empty) showProblem("classes-problem", `Class “${empty.name}” has no images; add one, or remove the class.`);
  else if (classes.length < 2) showProblem("classes-problem", "Two classes or more are needed; add a class.");
  else if (!queries.images.length) showProblem("queries-problem", "No images to classify; add one.");
  else return { model: byId("model").value, classes, queries: [...queries.images], rows: null, plainRows: null };
  return null;
}

async function classify() {
  if (byId("classify").hasAttribute("aria-disabled")) return undefined;
  clearProblems();
  if (byId("model").disabled) await start(); // which failed before: the service was away
  const asked = byId("model").disabled ? null : whatIsAsked();
  if (!asked) return say("");
  say(`Classifying ${asked.queries.length} images by ${asked.classes.length} classes…`);
  return attempt(async () => {
    asked.rows = (await classifyOnce(asked.model, asked.classes, asked.queries)).results;
    answer = asked;
    render();
    byId("stale").hidden = true;
    await complete();
    const none = answer.rows.filter((row) => row.none_of_these).length;
    say(`${answer.rows.length} images classified${none ? `, ${none} of them as none of these` : ""}.`);
  }, asked);
}

/** What else is wanted of the answer: the other opinion, features, attention. */
async function complete() {
  const asked = answer;
  if (!asked) return; // the sample came in its place
  if (byId("compare").checked && asked.model !== BACKBONE && !asked.plainRows) {
    asked.plainRows = (await classifyOnce(BACKBONE, asked.classes, asked.queries)).results;
    render();
  }
  await embed(asked.model, [...asked.classes.flatMap(({ images }) => images), ...asked.queries]);
  if (byId("attention").checked) await attend(asked.model, asked.queries);
  render();
}

function render() {
  const { model, classes, rows, plainRows } = answer;
  const compared = byId("compare").checked && plainRows;
  const known = (image) => image.features.has(model);
  const all = classes.every(({ images }) => images.every(known)) && answer.queries.every(known);
  const title = model === BACKBONE ? "Plain backbone" : `With ${model}`;
  const entries = answer.queries.map((query, index) => {
    const opinions = [{ title, row: rows[index], plain: model === BACKBONE }];
    if (compared) opinions.push({ title: "Plain backbone", row: plainRows[index], plain: true });
    const grid = byId("attention").checked ? (query.attention.get(model) ?? null) : null;
    return resultOf(query, opinions, all ? nearestTo(query, classes, model) : null, grid);
  });
  byId("results").replaceChildren(...entries);
  const typical = all ? classes.flatMap(({ images }) => typicalOf(images, model)) : [];
  for (const bucket of buckets) bucket.list.mark("typical", typical);
  byId("empty").hidden = true;
  byId("code").hidden = false;
  byId("code-text").hidden = true;
}

async function switched() {
  if (!answer) return undefined;
  render();
  clearProblems();
  return attempt(complete, answer);
}

async function copy(text, what) {
  byId("code-text").textContent = text;
  byId("code-text").hidden = false;
  try {
    await navigator.clipboard.writeText(text);
    byId("copied").textContent = `Copied as ${what}; run it in the folder of the images.`;
  } catch {
    byId("copied").textContent = "The browser does not let this page copy; select the text.";
    byId("code-text").focus();
  }
}

// ------------------------------------------------------------------------------------------------------------- start

async function start() {
  await attempt(async () => {
    const told = await models();
    const options = told.models.map((model) => {
      const text = model.name === BACKBONE ? "backbone, without a meta-LoRA" : model.name;
      return make("option", { value: model.name, textContent: text, selected: model.default });
    });
    byId("model").replaceChildren(...options);
    byId("model").disabled = false;
    byId("facts").textContent = `${told.image_px} px, ${told.num_features} features`;
    byId("key-form").hidden = true;
  });
}

byId("queries").className = "bucket";
byId("queries").append(queries.list, queries.refused);
takeDrops(byId("queries"), queries);
for (const kind of ["dragover", "drop"]) document.addEventListener(kind, (event) => event.preventDefault());
document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (!files.length) return;
  event.preventDefault();
  const bucket = buckets.find((other) => other.element.contains(document.activeElement));
  (bucket?.list ?? queries).add(files);
});
byId("sample").addEventListener("click", () => attempt(loadSample));
byId("add").addEventListener("click", () => {
  const bucket = addBucket(freeName());
  bucket.input.focus();
  bucket.input.select();
});
byId("classify").addEventListener("click", classify);
byId("model").addEventListener("change", changed);
byId("compare").addEventListener("change", switched);
byId("attention").addEventListener("change", switched);
byId("copy-curl").addEventListener("click", () => copy(curlOf(answer.model, answer.classes, answer.queries), "curl"));
byId("copy-python").addEventListener("click", () => copy(pythonOf(answer.model, answer.classes, answer.queries), "Python"));
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(byId("key").value.trim());
  clearProblems();
  start();
});
addBucket("Class 1");
addBucket("Class 2");
start();
