"use strict";
(() => {
  const controls = document.getElementById("maps");
  if (!controls) return;
  const slider = document.getElementById("opacity");
  const boxes = document.getElementById("boxes");
  const show = () => {
    const chosen = controls.querySelector("input[name=sentence]:checked").value;
    for (const part of document.querySelectorAll("[data-sentence]")) {
      part.toggleAttribute("hidden", part.dataset.sentence !== chosen || (part.localName === "svg" && !boxes.checked));
    }
  };
  const fade = () => {
    document.documentElement.style.setProperty("--opacity", slider.value / 100);
    document.getElementById("percent").textContent = `${slider.value} %`;
  };
  controls.addEventListener("change", show);
  slider.addEventListener("input", fade);
  controls.hidden = false;
  show();
  fade();
})();
