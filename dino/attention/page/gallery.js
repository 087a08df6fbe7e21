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
const scale = JSON.parse(element("scale").textContent);
const headColours = JSON.parse(element("head-colours").textContent);

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
