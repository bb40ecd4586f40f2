"use strict";
const form = document.getElementById("filters");
const sections = [...document.querySelectorAll("section.video")];
const rows = [...document.querySelectorAll("tr.question")];
const words = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));

function fits(row, wanted) {
  const text = (wanted.get("text") || "").trim().toLowerCase();
  const type = wanted.get("type") || "";
  const wrong = [...row.cells].filter((cell) => cell.dataset.verdict === "wrong").map((cell) => cell.dataset.arm);
  return words.get(row).includes(text) && (!type || row.dataset.type === type)
    && wanted.getAll("wrong").every((arm) => wrong.includes(arm));
}

function show(wanted) {
  for (const row of rows) row.hidden = !fits(row, wanted);
  for (const section of sections) section.hidden = !section.querySelector("tr.question:not([hidden])");
  const shown = rows.filter((row) => !row.hidden).length;
  document.getElementById("count").textContent = `${shown} of ${rows.length} questions`;
  document.getElementById("nothing").hidden = shown > 0;
}

// The filters stand in the page's address, so that a view can be kept and sent.
function fromForm() {
  const wanted = new URLSearchParams([...new FormData(form)].filter(([, value]) => value));
  history.replaceState(null, "", "#" + wanted);
  show(wanted);
}

function fromAddress() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  form.elements.text.value = wanted.get("text") || "";
  form.elements.type.value = wanted.get("type") || "";
  for (const box of form.querySelectorAll("input[name=wrong]")) box.checked = wanted.getAll("wrong").includes(box.value);
  show(wanted);
}

form.addEventListener("input", fromForm);
form.addEventListener("reset", () => setTimeout(fromForm));
form.addEventListener("submit", (event) => event.preventDefault());
window.addEventListener("hashchange", fromAddress);
fromAddress();

// A video's first frame is fetched when the video comes near the screen: a page may hold hundreds.
const near = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (entry.isIntersecting) {
      entry.target.preload = "metadata";
      near.unobserve(entry.target);
    }
  }
}, { rootMargin: "600px" });
for (const video of document.querySelectorAll("video")) near.observe(video);
