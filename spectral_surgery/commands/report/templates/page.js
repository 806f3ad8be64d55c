"use strict";
// Tables sort by a click on a heading: numbers by size, what is not known at the end.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const heading = button.parentElement, headings = [...heading.parentElement.children];
    const column = headings.indexOf(heading), body = heading.closest("table").tBodies[0];
    const numeric = heading.classList.contains("number");
    const before = heading.getAttribute("aria-sort");
    const falling = before === "ascending" || (before === "none" && numeric);
    headings.forEach((other) => other.setAttribute("aria-sort", "none"));
    heading.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const value = (row) => row.cells[column].dataset.value;
    const compare = numeric
      ? (a, b) => Number(a) - Number(b)
      : (a, b) => a.localeCompare(b, "en", { numeric: true });
    body.append(...[...body.rows].sort((one, other) => {
      const a = value(one), b = value(other);
      if (a === "" || b === "") return (a === "") - (b === "");
      return falling ? compare(b, a) : compare(a, b);
    }));
  });
}
// Pointing at a shape says what it is; without this script the browser shows the same title after a while.
const tip = document.getElementById("tip"), words = new WeakMap();
for (const title of document.querySelectorAll("svg title")) {
  words.set(title.parentElement, title.textContent);
  title.remove();
}
document.addEventListener("pointermove", (event) => {
  const text = words.get(event.target);
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const wide = document.documentElement.clientWidth, high = document.documentElement.clientHeight;
  const left = Math.max(4, Math.min(event.clientX + 14, wide - tip.offsetWidth - 4));
  const above = event.clientY + 18 + tip.offsetHeight > high;
  tip.style.left = `${left}px`;
  tip.style.top = `${above ? event.clientY - tip.offsetHeight - 10 : event.clientY + 18}px`;
});
document.addEventListener("pointerleave", () => { tip.hidden = true; });
