// A long list of which only the rows in view exist.
import { html, useEffect, useLayoutEffect, useRef, useState } from "./html.js";

const SPARE = 6; // rows above and below those in view

// `count` rows of `height` pixels, made by `row(index)`; `onEnd` is called when the last ones come into view.
export function Rows({ count, height, row, label, onEnd }) {
  const list = useRef(null);
  const [view, setView] = useState([0, 20]);
  const measure = () => {
    const { top } = list.current.getBoundingClientRect();
    const scroller = list.current.parentElement.closest("[data-scroller]");
    const box = scroller.getBoundingClientRect();
    const first = Math.max(0, Math.floor((box.top - top) / height) - SPARE);
    const end = Math.ceil((box.bottom - top) / height) + SPARE;
    setView((now) => (now[0] === first && now[1] === end ? now : [first, end]));
  };
  useLayoutEffect(measure);
  useEffect(() => {
    const scroller = list.current.closest("[data-scroller]");
    scroller.addEventListener("scroll", measure, { passive: true });
    addEventListener("resize", measure);
    return () => {
      scroller.removeEventListener("scroll", measure);
      removeEventListener("resize", measure);
    };
  }, []);
  const end = Math.min(count, view[1]);
  const first = Math.min(view[0], Math.max(0, end - 1));
  useEffect(() => {
    if (view[1] >= count - SPARE) onEnd?.();
  }, [view[1], count]);
  const shown = Array.from({ length: Math.max(0, end - first) }, (_, place) => first + place);
  return html`<ul class="rows" ref=${list} aria-label=${label} style=${{ height: `${count * height}px` }}>
    ${shown.map((index) => row(index, { top: `${index * height}px`, height: `${height}px` }))}
  </ul>`;
}

// Moves the focus among rows with the arrow keys; rows in view carry `data-row`.
export function moveFocus(event, height) {
  const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8 };
  const step = steps[event.key];
  const from = event.target.closest("[data-row]");
  if (!step || event.target !== from) return;
  event.preventDefault();
  const scroller = from.closest("[data-scroller]");
  const list = from.parentElement;
  const last = Math.round(list.clientHeight / height) - 1;
  const index = Math.min(last, Math.max(0, Number(from.dataset.row) + step));
  const focus = () => list.querySelector(`[data-row="${index}"]`)?.focus({ preventScroll: false });
  if (list.querySelector(`[data-row="${index}"]`)) return focus();
  scroller.scrollBy(0, step * height);
  requestAnimationFrame(() => requestAnimationFrame(focus));
}
