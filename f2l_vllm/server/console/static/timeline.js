// A video on the ask page: its frames over time, and the span that the question is about.
import { about } from "./about.js";
import { html } from "./html.js";
import { IconButton } from "./icons.js";
import { usePicture } from "./pictures.js";
import { useStore } from "./store.js";
import { bytes, clock, count } from "./format.js";
import { STAGE_NAMES, isReady, standing } from "./library.js";

const TICKS = [0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600];
const MOST_TICKS = 9;
const [STRIP_FRAMES, WIDEST] = [12, 2.4]; // as `previews.py` makes strips

export function ticks(length, from = 0) {
  const step = TICKS.find((one) => length / one <= MOST_TICKS) ?? length / MOST_TICKS;
  const first = Math.ceil(from / step);
  return Array.from({ length: Math.floor((from + length) / step) - first + 1 }, (_, place) => (first + place) * step);
}

const at = (second, length) => ({ left: `${(100 * second) / length}%` });

// `span`: [start, end] or undefined for all of it; `onSpan` takes the same.
export function Timeline({ file, span, onSpan, onLeave }) {
  const { is_chunked: isCut } = useStore(about);
  const length = file.f2l.duration_s ?? 0;
  const spans = file.f2l.spans ?? [];
  return html`<section class="timeline" aria-label=${file.filename}>
    <header>
      <h2 dir="auto">${file.filename}</h2>
      <span class="facts">${facts(file).map((fact) => html`<span>${fact}</span>`)}</span>
      ${onLeave && html`<${IconButton} name="close" label=${`Leave ${file.filename} out`} onClick=${onLeave} />`}
    </header>
    ${length > 0 &&
    html`<div class="track">
      <${Film} file=${file} />
      ${spans.slice(1).map(([start]) => html`<b class="cut" style=${at(start, length)} />`)}
      ${span && html`<b class="veil" style=${{ left: 0, width: `${(100 * span[0]) / length}%` }} />
        <b class="veil" style=${{ right: 0, width: `${100 - (100 * span[1]) / length}%` }} />`}
      ${spans.length > 1 && html`<${Range} file=${file} length=${length} span=${span ?? [0, length]} onSpan=${onSpan} />`}
    </div>
    <div class="axis" aria-hidden="true">
      ${ticks(length).map((second) => html`<span style=${at(second, length)}>${length < 5 ? second.toFixed(1) : clock(second)}</span>`)}
    </div>
    ${spans.length > 1
      ? html`<p class="hint">
          ${span ? `Asked about ${clock(span[0])} to ${clock(span[1])}.` : `Asked about all of it. Move the ends to choose a span; it is cut into ${spans.length} chunks.`}
          ${span && html` <button type="button" class="small" onClick=${() => onSpan(undefined)}>All of it</button>`}
        </p>`
      : !isCut && html`<p class="hint">Read in one pass. With <code>--chunk-seconds</code> the server also answers about a span of a video.</p>`}`}
  </section>`;
}

function facts(file) {
  if (!isReady(file)) return [STAGE_NAMES[standing(file)[0]]];
  const { f2l } = file;
  return [
    clock(f2l.duration_s),
    `${count(f2l.frames)} frames read`,
    `${count(f2l.visual_tokens)} visual tokens, once`,
    `adapter ${bytes(f2l.adapter_bytes)}, rank ${f2l.rank}`,
  ];
}

// The frames that were read, each where it stands in time.
function Film({ file }) {
  const found = usePicture(isReady(file) ? `console/files/${encodeURIComponent(file.id)}/strip` : null);
  const { frames = 1, width = 4, height = 3 } = file.f2l;
  const shape = Math.min(frames, STRIP_FRAMES) * Math.min(width / height, WIDEST);
  return html`<div class="film" style=${{ aspectRatio: String(shape) }}>${found && html`<img draggable=${false} src=${found.url} alt=${`${found.seconds.length} of the frames that were read`} />`}</div>`;
}

// Two sliders, from the second `from` to `length`.
export function Range({ file, from = 0, length, span, onSpan }) {
  const change = (place) => (event) => {
    const value = Number(event.target.value);
    const next = place ? [span[0], Math.max(value, span[0] + 0.1)] : [Math.min(value, span[1] - 0.1), span[1]];
    onSpan(next[0] <= from && next[1] >= length ? undefined : next);
  };
  return ["From", "To"].map(
    (name, place) => html`<input type="range" class="end" min=${from} max=${length} step="0.1" value=${span[place]}
      aria-label=${`${name}, ${file.filename}`} aria-valuetext=${clock(span[place])} onInput=${change(place)} />`,
  );
}
