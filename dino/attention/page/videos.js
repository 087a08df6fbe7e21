"use strict";

for (const group of document.querySelectorAll(".videos")) {
  const videos = [...group.querySelectorAll("video")];
  if (videos.length > 1) addPlayAll(group, videos);
}

// A GIF cannot be stopped, only put away.
if (matchMedia("(prefers-reduced-motion: reduce)").matches) {
  for (const animation of document.querySelectorAll("details.animation")) animation.open = false;
}

/** A button that plays several videos in step, from the start of the first one's place. */
function addPlayAll(group, videos) {
  const button = document.createElement("button");
  button.type = "button";
  const say = () => (button.textContent = videos.some((video) => !video.paused) ? "Pause all" : "Play all in step");
  button.addEventListener("click", () => {
    const playing = videos.some((video) => !video.paused);
    for (const video of videos) {
      video.currentTime = videos[0].currentTime;
      if (playing) video.pause();
      // A video that cannot be played says so itself, in its place.
      else video.play().catch(() => {});
    }
  });
  for (const video of videos) for (const event of ["play", "pause"]) video.addEventListener(event, say);
  say();
  group.querySelector("header").append(button);
}
