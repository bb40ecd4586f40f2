// What was read of a stream over time: a bar for each piece, and the stretch that the question is about.
import { html, useState } from "./html.js";
import { Range, ticks } from "./timeline.js";
import { clock } from "./format.js";

const WINDOWS = 5; // that are shown, unless all is

// `span`: [start, end] in seconds of the stream; `onSpan` takes the same, and is called when it is dragged. `covered`: what the
// last answer was read from. `isFree`: whether the ends have sliders.
export function Stretch({ stream, span, onSpan, isFree, covered }) {
  const [isWhole, setWhole] = useState(false);
  const [held, hold] = useState(null); // the second that the pointer went down at
  const { timeline, started_at: origin, head } = stream.f2l;
  const length = head - origin;
  const longest = WINDOWS * stream.window_seconds;
  const from = isWhole ? 0 : Math.max(0, length - longest);
  const shown = length - from;
  const percent = (seconds) => `${(100 * Math.max(0, seconds)) / shown}%`;
  const bar = (start, end, kind) => html`<i class=${`is-${kind}`} style=${{ left: percent(start - from), width: percent(end - Math.max(start, from)) }} />`;
  const here = timeline.map(([level, start, end, state]) => [level, start - origin, end - origin, state]).filter(([, , end]) => end > from);
  const levels = [...new Set(here.map(([level]) => level))].sort((one, other) => other - one);
  const tally = ["ready", "reading", "failed"].map((kind) => [here.filter(([, , , state]) => state === kind).length, kind]);
  const second = ({ currentTarget, clientX }) => {
    const { left, width } = currentTarget.getBoundingClientRect();
    return from + shown * Math.min(1, Math.max(0, (clientX - left) / width));
  };
  const down = (event) => {
    if (event.target.matches("input")) return;
    event.currentTarget.setPointerCapture(event.pointerId);
    hold(second(event));
  };
  const move = (event) => {
    if (held === null) return;
    const [start, end] = [held, second(event)].sort((one, other) => one - other);
    if (end - start >= 0.1) onSpan([start, end]);
  };
  return html`<div class="stretch">
    <div class="track" onPointerDown=${down} onPointerMove=${move} onPointerUp=${() => hold(null)} onPointerCancel=${() => hold(null)}>
      <div class="lanes" role="img" aria-label=${`Pieces from ${clock(from)} to ${clock(length)}: ${tally.map(([count, kind]) => `${count} ${kind}`).join(", ")}`}>
        ${levels.map((level) => html`<div class=${level ? "" : "is-fine"}>${here.filter(([one]) => one === level).map(([, start, end, state]) => bar(start, end, state))}</div>`)}
        <div>${covered.map(([start, end]) => bar(start, Math.max(from, end), "covered"))}</div>
      </div>
      <b class="veil" style=${{ left: 0, width: percent(span[0] - from) }} />
      <b class="veil" style=${{ right: 0, width: percent(length - Math.max(from, span[1])) }} />
      ${isFree && html`<${Range} file=${{ filename: "the stretch" }} from=${from} length=${length} span=${span} onSpan=${(next = [from, length]) => onSpan(next)} />`}
    </div>
    <div class="axis" aria-hidden="true">${ticks(shown, from).map((at) => html`<span style=${{ left: percent(at - from) }}>${clock(at)}</span>`)}</div>
    <p class="hint legend">
      ${["ready", "reading", "failed", "covered"].map((kind) => html`<span><i class=${`is-${kind}`} />${kind === "covered" ? "the last answer" : kind}</span>`)}
      ${length > longest && html`<button type="button" class="small" aria-pressed=${isWhole} onClick=${() => setWhole(!isWhole)}>All of it</button>`}
    </p>
  </div>`;
}
