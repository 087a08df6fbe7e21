"use strict";

const player = document.getElementById("player");

/** Attention from epoch to epoch: a slider over the sheets, and a button that runs through them. */
function setUp(sheets) {
  const sheet = document.getElementById("sheet");
  const slider = document.getElementById("epoch");
  const button = document.getElementById("play");
  const label = document.getElementById("label");
  const last = sheets.length - 1;
  const loaded = new Map();
  const secondsPerSheet = Math.min(1, Math.max(0.25, 12 / sheets.length));
  let timer;

  function load(index) {
    const wanted = Math.min(last, Math.max(0, index));
    if (!loaded.has(wanted)) {
      const image = new Image();
      image.src = sheets[wanted].address;
      loaded.set(wanted, image);
    }
    return loaded.get(wanted);
  }

  async function show(index) {
    slider.value = index;
    slider.setAttribute("aria-valuetext", sheets[index].label);
    slider.style.setProperty("--done", `${last ? (100 * index) / last : 100}%`);
    label.textContent = sheets[index].label;
    // A sheet that is not there any more is shown as missing.
    await load(index).decode().catch(() => {});
    if (Number(slider.value) !== index) return;
    sheet.src = sheets[index].address;
    sheet.alt = `Attention maps, ${sheets[index].label}`;
    sheet.closest("a").href = sheets[index].address;
    for (const near of [index - 1, index + 1, index + 2]) load(near);
    for (const known of loaded.keys()) if (Math.abs(known - index) > 8) loaded.delete(known);
  }

  function pause() {
    clearTimeout(timer);
    timer = undefined;
    button.textContent = "▶ Play";
  }

  async function step() {
    await show(Number(slider.value) + 1);
    if (timer === undefined) return;
    if (Number(slider.value) >= last) pause();
    else timer = setTimeout(step, 1000 * secondsPerSheet);
  }

  async function play() {
    button.textContent = "❚❚ Pause";
    timer = setTimeout(step, 1000 * secondsPerSheet);
    if (Number(slider.value) >= last) await show(0);
  }

  const toggle = () => (timer === undefined ? play() : pause());
  button.addEventListener("click", toggle);
  slider.addEventListener("input", () => {
    pause();
    show(Number(slider.value));
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.target.matches("a, button, .scroll")) return;
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    // Elsewhere the space bar scrolls the page.
    if (event.key === " " && event.target === slider) toggle();
    else if (move && event.target !== slider) {
      pause();
      show(Math.min(last, Math.max(0, Number(slider.value) + move)));
    } else return;
    event.preventDefault();
  });
  player.hidden = sheets.length < 2;
  pause();
  show(last);
}

if (player) setUp(JSON.parse(document.getElementById("sheets").textContent));
