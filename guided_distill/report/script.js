"use strict";
(() => {
  const sliders = [...document.querySelectorAll("input[type=range]")];
  const figures = [...document.querySelectorAll(".pictures figure")];
  const chosen = (slider) => slider.dataset.values.split(" ")[Number(slider.value)];
  const show = () => {
    for (const slider of sliders) {
      slider.closest("label").querySelector("output").textContent = chosen(slider);
      slider.setAttribute("aria-valuetext", chosen(slider));
    }
    // A figure without a value, as the reference teacher's of steps, stays whatever is chosen.
    const fits = (figure) => sliders.every((slider) => ["", chosen(slider)].includes(figure.dataset[slider.name]));
    for (const figure of figures) figure.hidden = !fits(figure);
  };
  for (const slider of sliders) slider.addEventListener("input", show);
  show();
})();
