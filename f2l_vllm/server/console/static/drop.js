// Videos dropped anywhere on the page.
import { html, useEffect, useState } from "./html.js";
import { add } from "./upload.js";

export function DropZone() {
  const [isOver, setOver] = useState(false);
  useEffect(() => {
    const has = (event) => event.dataTransfer?.types.includes("Files");
    const over = (event) => {
      if (!has(event)) return;
      event.preventDefault();
      setOver(true);
    };
    const leave = (event) => event.relatedTarget === null && setOver(false);
    const drop = (event) => {
      if (!has(event)) return;
      event.preventDefault();
      setOver(false);
      add(event.dataTransfer.files);
      location.hash = "#/";
    };
    addEventListener("dragover", over);
    addEventListener("dragleave", leave);
    addEventListener("drop", drop);
    return () => {
      removeEventListener("dragover", over);
      removeEventListener("dragleave", leave);
      removeEventListener("drop", drop);
    };
  }, []);
  return isOver && html`<div class="drop"><p>Drop to add</p></div>`;
}
