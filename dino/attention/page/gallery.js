"use strict";

const element = (id) => document.getElementById(id);
const bar = element("bar");
const large = element("large");

const state = { view: "heat", how: "mean", colormap: "", threshold: 0.6, smooth: false, linked: true };
const tables = Object.entries(JSON.parse(element("colormaps").textContent)).map(([name, text]) => [
  name,
  Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)),
]);
const colormaps = new Map(tables);
const headColours = JSON.parse(element("head-colours").textContent);

/** A picture of the page: its weights, decoded when first needed, and the heads that are switched on. */
class Picture {
  constructor(article, index) {
    this.article = article;
    this.index = index;
    this.image = article.querySelector("img");
    this.name = article.querySelector("h2").textContent;
    this.on = new Array(Number(article.dataset.heads)).fill(true);
    this.viewer = new Viewer(this, article.querySelector(".place"), this.image);
    article.addEventListener("focusin", () => (touched = this));
  }

  get maps() {
    if (!this.decoded) {
      const { heads, tops, ...grid } = JSON.parse(this.article.querySelector(".maps").textContent);
      const weights = heads.map((text, head) => decodeWeights(text, tops[head]));
      const scaled = weights.map((values) => normalize(values, limits(values)));
      this.decoded = { grid, heads: weights, scaled, rankings: [] };
    }
    return this.decoded;
  }

  get chosen() {
    return this.on.flatMap((on, head) => (on ? [head] : []));
  }

  /** The switched-on heads as one map, and its patches by weight. */
  get combined() {
    const key = `${state.how} ${this.chosen}`;
    if (this.kept?.key !== key) {
      const values = combine(this.chosen.map((head) => this.maps.heads[head]), state.how);
      this.kept = { key, values, ranking: rank(values) };
    }
    return this.kept;
  }

  get mask() {
    return massMask(this.combined.ranking, state.threshold);
  }

  /** Whose colour each patch has, and the colours, among the switched-on heads. */
  get owners() {
    const { heads, rankings } = this.maps;
    for (const head of this.chosen) rankings[head] ??= rank(heads[head]);
    const [on, ranked] = [heads, rankings].map((all) => this.chosen.map((head) => all[head]));
    return owners(on, ranked, state.threshold);
  }

  /** Give back the memory, unless the picture is near the screen. */
  letGo() {
    if (!this.viewer.near && largeViewer?.picture !== this) this.decoded = this.kept = undefined;
  }

  /** What is shown, in words. */
  describe() {
    const heads = this.chosen;
    if (!heads.length) return "No head is switched on.";
    const subject = this.subject(heads);
    const { ranking } = this.combined;
    if (!ranking.mass[ranking.mass.length - 1]) return `${subject} ${heads.length > 1 ? "have" : "has"} no attention to show.`;
    const keep = percent(state.threshold);
    if (state.view === "colours" && heads.length > 1) {
      const together = percent(coveredArea(this.owners, this.maps.grid));
      return `${subject} keep ${keep} of their attention each, together in ${together} of the picture.`;
    }
    const which = heads.length > 1 ? `The ${state.how === "max" ? "maximum" : "mean"} of ${lower(subject)}` : subject;
    const area = percent(coveredArea(this.mask, this.maps.grid));
    return `${which} keeps ${keep} of its attention in ${area} of the picture.`;
  }

  subject(heads) {
    return heads.length > 1 && heads.length === this.on.length ? `All ${heads.length} heads` : listed(heads);
  }
}

function listed(heads) {
  if (heads.length === 1) return `Head ${heads[0]}`;
  return `Heads ${heads.slice(0, -1).join(", ")} and ${heads.at(-1)}`;
}

function lower(text) {
  return text[0].toLowerCase() + text.slice(1);
}

function percent(part) {
  const value = 100 * part;
  if (value > 0 && value < 0.1) return "less than 0.1 %";
  return `${value < 10 ? Number(value.toFixed(1)) : Math.round(value)} %`;
}

/** Picture, slider and heads on the page; the large view has one of its own. */
class Viewer {
  constructor(picture, place, image) {
    this.picture = picture;
    place.append(element("viewer").content.cloneNode(true));
    const find = (selector) => place.querySelector(selector);
    this.root = find(".viewer");
    this.stage = find(".stage");
    this.frame = find(".frame");
    this.canvas = find("canvas");
    this.slider = find(".split input");
    this.readout = find(".readout");
    this.enlarge = find(".enlarge");
    this.frame.prepend(image);
    this.frame.style.setProperty("--shape", image.getAttribute("width") / image.getAttribute("height"));
    this.enlarge.setAttribute("aria-label", `Enlarge ${picture.name}`);
    this.enlarge.addEventListener("click", () => openLarge(picture.index));
    this.buildSlider();
    this.buildHeads(find(".heads"));
    this.show(false);
  }

  buildSlider() {
    this.slider.setAttribute("aria-label", `Part of ${this.picture.name} that shows attention, the rest the original`);
    this.slider.addEventListener("input", () => this.split(this.slider.value));
    this.split(this.slider.value);
    const follow = (event) => {
      const box = this.frame.getBoundingClientRect();
      this.split((100 * (event.clientX - box.left)) / box.width);
    };
    this.stage.addEventListener("pointerdown", (event) => {
      if (event.button || event.target.closest("button")) return;
      this.stage.setPointerCapture(event.pointerId);
      // A finger that comes down may be about to scroll; a sideways move tells.
      if (event.pointerType !== "touch") follow(event);
    });
    this.stage.addEventListener("mousedown", (event) => {
      if (event.target.closest("button")) return;
      event.preventDefault(); // or the focus would go to the page
      this.slider.focus({ preventScroll: true });
    });
    this.stage.addEventListener("pointermove", (event) => {
      if (this.stage.hasPointerCapture(event.pointerId)) follow(event);
    });
  }

  split(value) {
    this.slider.value = value;
    fill(this.slider);
    this.slider.setAttribute("aria-valuetext", `${this.slider.value} % attention`);
    this.frame.style.setProperty("--split", `${this.slider.value}%`);
  }

  buildHeads(group) {
    const { picture } = this;
    group.setAttribute("aria-label", `Heads of ${picture.name}`);
    group.querySelector(".all").addEventListener("click", () => choose(picture, () => true));
    group.querySelector(".none").addEventListener("click", () => choose(picture, () => false));
    this.buttons = picture.on.map((_, head) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "head";
      button.title = "Double-click: this head alone";
      button.setAttribute("aria-label", `Head ${head}`);
      button.style.setProperty("--colour", `rgb(${headColours[head]})`);
      const label = document.createElement("span");
      label.textContent = head;
      button.append(document.createElement("canvas"), label);
      button.addEventListener("click", (event) => (event.shiftKey ? solo : toggle)(picture, head));
      button.addEventListener("dblclick", () => solo(picture, head));
      group.append(button);
      return button;
    });
  }

  /** Take up the work near the screen, and let its memory go far from it. */
  show(near) {
    this.near = near;
    if (near) redraw([this]);
    else {
      this.thumbnails = "";
      for (const canvas of this.root.querySelectorAll("canvas")) canvas.width = canvas.height = 0;
    }
  }

  update() {
    const { picture } = this;
    this.buttons.forEach((button, head) => button.setAttribute("aria-pressed", picture.on[head]));
    this.readout.textContent = picture.describe();
    this.drawThumbnails();
    this.draw();
  }

  draw() {
    const { picture, canvas } = this;
    const [width, height] = this.resolution();
    canvas.width = width;
    canvas.height = height;
    if (!picture.chosen.length) return;
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    const spread = (values, smooth) => enlarge(values, picture.maps.grid, width, height, smooth);
    if (state.view === "mask") {
      const patch = (picture.maps.grid.patch * width) / picture.maps.grid.width;
      const line = Math.max(1, Math.min(Math.round(Math.max(width, height) / 400), Math.floor(patch / 8)));
      paintMask(image.data, spread(picture.mask, false), width, height, line);
    } else if (state.view === "colours") {
      const colours = picture.chosen.map((head) => headColours[head]);
      paintOwners(image.data, spread(picture.owners, false), colours);
    } else {
      const { values } = picture.combined;
      paintHeat(image.data, spread(normalize(values, limits(values)), state.smooth), colormaps.get(state.colormap));
    }
    context.putImageData(image, 0, 0);
  }

  /** Pixels of the canvas: those of the preview, more for a picture too small to be enlarged well. */
  resolution() {
    const sides = ["width", "height"].map((side) => Number(this.frame.querySelector("img").getAttribute(side)));
    const times = Math.max(1, Math.ceil(480 / Math.max(...sides)));
    return sides.map((side) => side * times);
  }

  drawThumbnails() {
    const key = state.view === "colours" ? "colours" : state.colormap;
    if (this.thumbnails === key) return;
    this.thumbnails = key;
    const { grid, scaled } = this.picture.maps;
    const shrink = Math.max(1, Math.max(grid.rows, grid.cols) / 96);
    const [width, height] = [grid.cols, grid.rows].map((side) => Math.max(1, Math.round(side / shrink)));
    this.buttons.forEach((button, head) => {
      const canvas = button.querySelector("canvas");
      [canvas.width, canvas.height] = [width, height];
      const context = canvas.getContext("2d");
      const image = context.createImageData(width, height);
      const table = key === "colours" ? ramp(headColours[head]) : colormaps.get(key);
      paintHeat(image.data, enlarge(scaled[head], grid, width, height, false), table);
      context.putImageData(image, 0, 0);
    });
  }
}

/** 256 colours from black to the one given. */
function ramp(colour) {
  return Uint8Array.from({ length: 768 }, (_, i) => (colour[i % 3] * Math.floor(i / 3)) / 255);
}

const waiting = new Set();

/** Draw soon, a few viewers per frame: dragging a slider must not wait for all of them. */
function redraw(viewers) {
  if (!waiting.size) requestAnimationFrame(drawWaiting);
  for (const viewer of viewers) waiting.add(viewer);
}

function drawWaiting() {
  const start = performance.now();
  for (const viewer of waiting) {
    waiting.delete(viewer);
    if (viewer.near) viewer.update();
    if (performance.now() - start > 12) break;
  }
  if (waiting.size) requestAnimationFrame(drawWaiting);
}

function redrawAll() {
  redraw([...(largeViewer ? [largeViewer] : []), ...pictures.map((picture) => picture.viewer).filter((v) => v.near)]);
  announce();
}

let announcement;

/** Tell a screen reader, once things have come to rest. */
function announce() {
  clearTimeout(announcement);
  announcement = setTimeout(() => {
    const picture = current();
    if (picture) element("status").textContent = `${picture.name}: ${picture.describe()}`;
  }, 500);
}

let touched;

/** The picture that the user is at: enlarged, else used last and still near, else the first on the screen. */
function current() {
  if (largeViewer) return largeViewer.picture;
  return touched?.viewer.near ? touched : pictures.find((picture) => picture.viewer.near);
}

function choose(picture, isOn) {
  for (const one of state.linked ? pictures : [picture]) one.on = one.on.map((_, head) => isOn(head));
  redrawAll();
}

function toggle(picture, head) {
  const on = picture.on.map((was, other) => (other === head ? !was : was));
  choose(picture, (other) => Boolean(on[other]));
}

function solo(picture, head) {
  const already = picture.chosen.length === 1 && picture.on[head];
  choose(picture, (other) => already || other === head);
}

let largeViewer;

function openLarge(index) {
  const picture = pictures[(index + pictures.length) % pictures.length];
  const split = (largeViewer ?? picture.viewer).slider.value;
  const before = largeViewer?.picture;
  element("large-viewer").replaceChildren();
  element("large-name").textContent = picture.name;
  element("large-place").textContent = `Picture ${picture.index + 1} of ${pictures.length}`;
  largeViewer = new Viewer(picture, element("large-viewer"), picture.image.cloneNode());
  largeViewer.split(split);
  largeViewer.show(true);
  before?.letGo();
  for (const id of ["previous", "next"]) element(id).hidden = pictures.length < 2;
  if (!large.open) {
    // What is outside of a modal dialog cannot be used: the controls come along.
    element("large-bar").append(bar);
    large.showModal();
    element(pictures.length > 1 ? "next" : "close").focus();
  }
  announce();
}

function closeLarge() {
  const { picture } = largeViewer;
  largeViewer = undefined;
  picture.letGo();
  element("large-viewer").replaceChildren();
  element("dock").append(bar);
  picture.viewer.enlarge.focus();
  picture.article.scrollIntoView({ block: "nearest" });
}

function onKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const digit = /^(?:Digit|Numpad)(\d)$/.exec(event.code);
  const picture = largeViewer ? largeViewer.picture : event.target.closest(".picture") && current();
  if (digit && picture && Number(digit[1]) < picture.on.length) {
    event.preventDefault();
    (event.shiftKey ? solo : toggle)(picture, Number(digit[1]));
  }
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (largeViewer && step && !event.target.matches("input")) {
    event.preventDefault();
    openLarge(largeViewer.picture.index + step);
  }
}

/** The part of a slider's track that is behind its thumb. */
function fill(slider) {
  slider.style.setProperty("--done", `${(100 * (slider.value - slider.min)) / (slider.max - slider.min)}%`);
}

/** Read all controls; browsers bring back what was set before a reload. */
function readControls() {
  const checked = (name) => bar.querySelector(`input[name="${name}"]:checked`).value;
  state.view = checked("view");
  state.how = checked("how");
  state.colormap = checked("colormap");
  state.smooth = element("smooth").checked;
  state.threshold = element("threshold").value / 100;
  for (const id of ["threshold", "opacity"]) {
    fill(element(id));
    element(`${id}-value`).textContent = `${element(id).value} %`;
    element(id).setAttribute("aria-valuetext", `${element(id).value} %`);
  }
  document.documentElement.style.setProperty("--opacity", element("opacity").value / 100);
  document.documentElement.dataset.view = state.view;
  for (const control of bar.querySelectorAll("[data-views]")) {
    control.hidden = !control.dataset.views.split(" ").includes(state.view);
  }
  const relinked = element("linked").checked && !state.linked;
  const model = relinked ? current() : undefined;
  state.linked = element("linked").checked;
  if (model) choose(model, (head) => Boolean(model.on[head]));
}

const pictures = [...document.querySelectorAll(".picture")].map((article, index) => new Picture(article, index));

if (pictures.length) {
  element("dock").hidden = false;
  readControls();
  const observer = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        const picture = pictures[entry.target.dataset.index];
        picture.viewer.show(entry.isIntersecting);
        picture.letGo();
      }
    },
    { rootMargin: "400px 0px" },
  );
  for (const picture of pictures) {
    picture.article.dataset.index = picture.index;
    observer.observe(picture.article);
  }
  bar.addEventListener("input", (event) => {
    readControls();
    if (event.target.id !== "opacity") redrawAll();
  });
  element("more").addEventListener("click", ({ currentTarget }) => {
    currentTarget.setAttribute("aria-expanded", currentTarget.getAttribute("aria-expanded") !== "true");
  });
  element("previous").addEventListener("click", () => openLarge(largeViewer.picture.index - 1));
  element("next").addEventListener("click", () => openLarge(largeViewer.picture.index + 1));
  element("close").addEventListener("click", () => large.close());
  large.addEventListener("click", (event) => event.target === large && large.close());
  large.addEventListener("close", closeLarge);
  document.addEventListener("keydown", onKey);
  const far = () => pictures.filter((picture) => !picture.viewer.near);
  window.addEventListener("beforeprint", () => far().forEach((picture) => picture.viewer.update()));
  window.addEventListener("afterprint", () => far().forEach((picture) => (picture.viewer.show(false), picture.letGo())));
}
