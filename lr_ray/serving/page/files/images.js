// Images as the page keeps them and as JSON bodies carry them; and elements, made without markup in strings.

const KINDS = ["image/png", "image/jpeg", "image/webp"];
const LONGEST_PX = 1600;
const CHUNK = 0x8000;
let count = 0;

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
}

export function isImage(file) {
  return KINDS.includes(file.type);
}

/** What the page knows of a file: features and attention come later, by the name of a model. */
export async function takeImage(file) {
  const blob = await shrink(file);
  const name = file.name || `pasted-${count + 1}.png`;
  return { id: ++count, name, blob, url: URL.createObjectURL(blob), features: new Map(), attention: new Map() };
}

/** Photographs have far more pixels than any model here sees, and would fill a request. */
async function shrink(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file); // turned as EXIF says, whatever is asked for
  } catch {
    return file; // the service says what is wrong with it
  }
  const scale = LONGEST_PX / Math.max(bitmap.width, bitmap.height);
  if (scale >= 1) return file;
  const canvas = make("canvas", { width: Math.round(bitmap.width * scale), height: Math.round(bitmap.height * scale) });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob((blob) => resolve(blob ?? file), "image/jpeg", 0.95));
}

export async function base64(image) {
  const bytes = new Uint8Array(await image.blob.arrayBuffer());
  let text = "";
  for (let start = 0; start < bytes.length; start += CHUNK) text += String.fromCharCode(...bytes.subarray(start, start + CHUNK));
  return btoa(text);
}

export function allBase64(images) {
  return Promise.all(images.map(base64));
}
