// Requests to the service that this page comes from, and its refusals.

import { allBase64 } from "./images.js";

const KEY = "lr-ray-key";

/** What the service says (RFC 9457), or that it says nothing. */
export class Problem extends Error {
  constructor(detail, status = 0, requestId = "") {
    super(detail);
    this.status = status;
    this.requestId = requestId;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (text) => (text ? sessionStorage.setItem(KEY, text) : sessionStorage.removeItem(KEY)),
};

export function address(path, parameters = {}) {
  const url = new URL(path, document.baseURI);
  for (const [name, value] of Object.entries(parameters)) url.searchParams.set(name, value);
  return url;
}

async function send(path, parameters, options) {
  let response;
  try {
    response = await fetch(address(path, parameters), options);
  } catch {
    throw new Problem("The service does not answer; is it still running?");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  throw new Problem(told.detail ?? `${response.status} ${response.statusText}`, response.status, told.request_id);
}

async function ask(path, parameters, body) {
  const headers = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  const json = { method: "POST", headers: { ...headers, "Content-Type": "application/json" }, body: JSON.stringify(body) };
  return (await send(path, parameters, body === undefined ? { headers } : json)).json();
}

/** Class names and files of the sample task: {classes: {name: [file]}, queries: [file]}. */
export async function sampleTask() {
  const fetchFile = async (name) => new File([await (await send(`page/${name}`)).blob()], name, { type: "image/png" });
  const sample = await (await send("page/sample.json")).json();
  const entries = Object.entries(sample.classes).map(async ([name, files]) => [name, await Promise.all(files.map(fetchFile))]);
  return { classes: Object.fromEntries(await Promise.all(entries)), queries: await Promise.all(sample.queries.map(fetchFile)) };
}

export function models() {
  return ask("v1/models");
}

export async function classifyOnce(model, classes, queries) {
  const encoded = await Promise.all(classes.map(async ({ name, images }) => [name, await allBase64(images)]));
  return ask("v1/classify", { model }, { classes: Object.fromEntries(encoded), images: await allBase64(queries) });
}

/** Sees to it that each image has features of the model. */
export async function embed(model, images) {
  const missing = images.filter((image) => !image.features.has(model));
  if (!missing.length) return;
  const { features } = await ask("v1/embeddings", { model }, { images: await allBase64(missing) });
  missing.forEach((image, index) => image.features.set(model, features[index]));
}

/** Sees to it that each image has an attention map of the model. */
export async function attend(model, images) {
  const missing = images.filter((image) => !image.attention.has(model));
  if (!missing.length) return;
  const { grids } = await ask("v1/attention", { model }, { images: await allBase64(missing) });
  missing.forEach((image, index) => image.attention.set(model, grids[index]));
}
