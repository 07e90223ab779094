// The page's request as commands that a person can run in the folder of the images.

import { address, key } from "./service.js";

const QUERY = "query";

function shell(text) {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`;
}

function file(name) {
  return /[",;\\]/.test(name) ? `"${name.replaceAll("\\", "\\\\").replaceAll('"', '\\"')}"` : name;
}

/** A part's name is the class; curl ends it at the first `=`, quotes are mangled on the way, and `query` has a meaning. */
function fitsParts(name) {
  return name !== QUERY && !/[=";\\]/.test(name);
}

export function curlOf(model, classes, queries) {
  const parts = classes.every(({ name }) => fitsParts(name));
  const head = ["curl", ...(key.get() ? [`-H "Authorization: Bearer $LR_RAY_KEY"`] : [])];
  const url = shell(address("v1/classify", { model }).href);
  if (!parts) return curlOfJson(head, url, classes, queries);
  const support = classes.flatMap(({ name, images }) => images.map((image) => `-F ${shell(`${name}=@${file(image.name)}`)}`));
  const asked = queries.map((image) => `-F ${shell(`${QUERY}=@${file(image.name)}`)}`);
  return [head.join(" "), ...support, ...asked, url].join(" \\\n  ");
}

function curlOfJson(head, url, classes, queries) {
  const literal = (text) => JSON.stringify(text).replace(/[\\$`]/g, "\\$&");
  const content = (image) => `"$(base64 < ${shell(image.name)} | tr -d '\\n')"`;
  const contents = (images) => `[${images.map(content).join(", ")}]`;
  const entries = classes.map(({ name, images }) => `  ${literal(name)}: ${contents(images)}`);
  const body = `{"classes": {\n${entries.join(",\n")}\n}, "images": ${contents(queries)}}`;
  return [...head, "-H 'Content-Type: application/json' --data-binary @-", url, "<<END"].join(" ") + `\n${body}\nEND`;
}

export function pythonOf(model, classes, queries) {
  const list = (images) => `[${images.map((image) => JSON.stringify(image.name)).join(", ")}]`;
  const service = JSON.stringify(address(".").href.replace(/\/$/, ""));
  return [
    ...(key.get() ? ["import os", ""] : []),
    "from lr_ray.serving.client import Client",
    "",
    `client = Client(${service}${key.get() ? ', key=os.environ["LR_RAY_KEY"]' : ""})`,
    "answer = client.classify_once(",
    "    {",
    ...classes.map(({ name, images }) => `        ${JSON.stringify(name)}: ${list(images)},`),
    "    },",
    `    ${list(queries)},`,
    `    model=${JSON.stringify(model)},`,
    ")",
    "for row in answer.results:",
    "    print(row.file, row.class_name, row.probability, row.none_of_these)",
  ].join("\n");
}
