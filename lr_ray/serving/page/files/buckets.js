// Where images are put: a list of them with a way to choose files, and the bucket of a class around one.

import { isImage, make, takeImage } from "./images.js";

/** Thumbnails that can be removed, and more of them from files. */
export class ImageList {
  constructor(what, onChange) {
    this.images = [];
    this.onChange = onChange;
    this.input = make("input", { type: "file", multiple: true, accept: "image/png,image/jpeg,image/webp" });
    this.input.setAttribute("aria-label", `Choose ${what}`);
    this.input.addEventListener("change", async () => {
      await this.add(this.input.files);
      this.input.value = "";
    });
    this.choose = make("li", { className: "choose" }, make("span", {}, make("b", { textContent: "+" }), "images"), this.input);
    this.choose.firstChild.setAttribute("aria-hidden", "true");
    this.refused = make("p", { className: "refused", hidden: true });
    this.refused.setAttribute("role", "alert");
    this.list = make("ul", { className: "thumbs" }, this.choose);
    this.thumbs = new Map();
  }

  async add(files) {
    const given = [...files];
    const refused = given.filter((file) => !isImage(file)).map((file) => file.name);
    this.refused.hidden = !refused.length;
    this.refused.textContent = `${refused.join(", ")}: no PNG, JPEG or WebP; left out.`;
    const taken = await Promise.all(given.filter(isImage).map(takeImage));
    for (const image of taken) this.#show(image);
    this.images.push(...taken);
    if (taken.length) this.onChange();
  }

  clear() {
    for (const image of this.images) URL.revokeObjectURL(image.url);
    for (const thumb of this.thumbs.values()) thumb.remove();
    this.thumbs.clear();
    this.images = [];
    this.refused.hidden = true;
  }

  /** Of these images the thumbnails are `kind` (typical, wrong), of the others not; their descriptions say so, too. */
  mark(kind, images) {
    for (const { id, name } of this.images) {
      const thumb = this.thumbs.get(id);
      thumb.classList.toggle(kind, images.some((image) => image.id === id));
      thumb.firstChild.alt = [name, ...["typical", "wrong"].filter((mark) => thumb.classList.contains(mark))].join(", ");
    }
  }

  #show(image) {
    const remove = make("button", { type: "button", textContent: "×" });
    remove.setAttribute("aria-label", `Remove ${image.name}`);
    remove.addEventListener("click", () => this.#remove(image));
    const thumb = make("li", { className: "thumb" }, make("img", { src: image.url, alt: image.name, title: image.name }), remove);
    this.thumbs.set(image.id, thumb);
    this.choose.before(thumb);
  }

  #remove(image) {
    const thumb = this.thumbs.get(image.id);
    const next = thumb.nextElementSibling;
    thumb.remove();
    this.thumbs.delete(image.id);
    this.images = this.images.filter((other) => other !== image);
    (next.querySelector("button") ?? this.input).focus();
    this.onChange();
  }
}

/** The whole of the element takes images that are dropped on it. */
export function takeDrops(element, list) {
  element.addEventListener("dragover", (event) => {
    event.preventDefault();
    element.classList.add("over");
  });
  element.addEventListener("dragleave", (event) => {
    if (!element.contains(event.relatedTarget)) element.classList.remove("over");
  });
  element.addEventListener("drop", (event) => {
    event.preventDefault();
    element.classList.remove("over");
    list.add(event.dataTransfer.files);
  });
}

export class Bucket {
  constructor(name, onChange, onRemove) {
    this.list = new ImageList("", () => this.#changed(onChange));
    this.input = make("input", { value: name, maxLength: 200, autocomplete: "off", spellcheck: false });
    this.input.setAttribute("aria-label", "Name of the class");
    this.input.addEventListener("input", () => this.#changed(onChange));
    this.count = make("span");
    this.remove = make("button", { type: "button", className: "quiet", textContent: "Remove" });
    this.remove.addEventListener("click", onRemove);
    const head = make("div", { className: "head" }, this.input, this.count, this.remove);
    this.element = make("li", { className: "bucket" }, head, this.list.list, this.list.refused);
    takeDrops(this.element, this.list);
    this.#tell();
  }

  get name() {
    return this.input.value.trim();
  }

  get images() {
    return this.list.images;
  }

  #changed(onChange) {
    this.#tell();
    onChange();
  }

  #tell() {
    this.count.textContent = this.images.length === 1 ? "1 image" : `${this.images.length} images`;
    this.list.input.setAttribute("aria-label", `Choose images of ${this.name || "the class"}`);
    this.remove.setAttribute("aria-label", `Remove class ${this.name}`);
  }
}
