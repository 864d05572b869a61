"use strict";
// Readings under the pointer, tiles that grow, and a reload while the run goes on. The page is complete without it.

const short = (v) => {
  if (v === null || v === undefined) return "–";
  const size = Math.abs(v);
  if (size >= 1e4) {
    for (const [power, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
      if (size >= power) return Number((v / power).toPrecision(3)) + " " + letter;
    }
  }
  return size >= 1000 ? v.toLocaleString("en", { maximumFractionDigits: 0 }) : String(Number(v.toPrecision(4)));
};

const nearest = (xs, x) => {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const mid = (low + high) >> 1;
    if (xs[mid] <= x) low = mid; else high = mid;
  }
  return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
};

let touched = 0;

for (const figure of document.querySelectorAll("figure.chart")) {
  const { x0, x1, lines } = JSON.parse(figure.querySelector("script").textContent);
  const plot = figure.querySelector(".plot");
  const values = [...figure.querySelectorAll(".legend b")];
  const now = values.map((node) => node.textContent);
  const cursor = document.createElement("div");
  const label = document.createElement("b");
  cursor.className = "cursor";
  cursor.hidden = true;
  cursor.append(label);
  plot.append(cursor);
  const show = (event) => {
    touched = Date.now();
    const box = plot.getBoundingClientRect();
    const part = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const x = x0 + part * (x1 - x0);
    const longest = lines.reduce((a, b) => (b[1].length > a[1].length ? b : a));
    const at = longest[1][nearest(longest[1], x)];
    cursor.hidden = false;
    const left = ((at - x0) / (x1 - x0)) * 100;
    cursor.style.left = left + "%";
    label.style.transform = left < 12 ? "none" : left > 88 ? "translateX(-100%)" : "";
    label.textContent = at >= 1e7 ? short(at) : at.toLocaleString("en");
    lines.forEach(([, xs, ys], i) => { values[i].textContent = short(ys[nearest(xs, at)]); });
  };
  const hide = () => {
    cursor.hidden = true;
    now.forEach((text, i) => { values[i].textContent = text; });
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", hide);
}

for (const tile of document.querySelectorAll("button.tile")) {
  tile.addEventListener("click", () => {
    tile.setAttribute("aria-expanded", String(tile.getAttribute("aria-expanded") !== "true"));
  });
}

const every = Number(document.documentElement.dataset.refresh || 0) * 1000;
if (every) {
  setInterval(() => {
    const reading = document.querySelector("details[open], .tile[aria-expanded='true']") || Date.now() - touched < every;
    if (document.visibilityState === "visible" && !reading) location.reload();
  }, every);
}
