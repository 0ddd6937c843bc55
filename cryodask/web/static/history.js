// FSC curves of two results in one plot.
import { attempt, get } from "./common.js";
import { drawFsc } from "./fsc.js";

const place = document.getElementById("fsc");
if (place) {
  const found = await attempt(() => get(`fsc?which=${encodeURIComponent(place.dataset.which)}`));
  const curves = Object.entries(found || {}).map(([label, { frequency, values }]) => ({ label, frequency, values }));
  if (curves.length) drawFsc(place, curves);
  else place.classList.add("hidden");
}
