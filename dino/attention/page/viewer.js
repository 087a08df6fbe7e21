"use strict";

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
    this.shown = find(".split .shown");
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
    this.slider.setAttribute("aria-valuetext", `${this.slider.value} % attention, the rest the original`);
    this.shown.textContent = this.slider.value === "0" ? "original" : `${this.slider.value} %`;
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
      const scaled = normalize(values, limits(values, scale, picture.maps.grid.patches));
      paintHeat(image.data, spread(scaled, state.smooth), colormaps.get(state.colormap));
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
