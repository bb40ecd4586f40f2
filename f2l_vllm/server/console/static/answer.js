// One question with its answers, side by side, and what each cost.
import { about } from "./about.js";
import { html } from "./html.js";
import { IconButton } from "./icons.js";
import { library } from "./library.js";
import { Problem } from "./notice.js";
import { Snippets } from "./snippets.js";
import { dismiss, isStream, stop } from "./question.js";
import { bytes, clock, count, duration, ratio } from "./format.js";

const NAMES = { adapter: "From the adapter", frames: "From the frames" };

export function Question({ one }) {
  const sides = Object.values(one.sides);
  const isRunning = sides.some((side) => side.state === "asking" || side.state === "waiting");
  return html`<article class="question">
    <header>
      <h2 dir="auto">${one.text}</h2>
      <span class="facts">${one.files.map((file) => html`<span dir="auto">${named(file, one.spans[file.id])}</span>`)}</span>
      ${isRunning && html`<button type="button" class="small" onClick=${() => stop(one)}>Stop</button>`}
      <${IconButton} name="close" label="Remove this question" onClick=${() => dismiss(one)} />
    </header>
    <div class=${`sides of-${sides.length}`}>${sides.map((side) => html`<${Side} key=${side.mode} side=${side} />`)}</div>
    ${sides.some((side) => side.usage) && html`<${Costs} one=${one} />`}
    <${Snippets} one=${one} mode="adapter" />
  </article>`;
}

function named(file, span) {
  if (span?.last) return `${file.filename}, last ${span.last} s`;
  const [start, end] = Array.isArray(span) ? span : [span?.start, span?.end];
  return span ? `${file.filename}, ${clock(start)} to ${clock(end)}` : file.filename;
}

function Side({ side }) {
  const notes = { waiting: "waits for the other answer", asking: "reads", stopped: "stopped" };
  return html`<section class=${`side is-${side.mode}`} aria-label=${NAMES[side.mode]} aria-busy=${side.state === "asking"}>
    <h3>${NAMES[side.mode]}${side.first !== undefined && html`<span>first token after <b>${duration(side.first)}</b>${waited(side)}</span>`}</h3>
    ${side.state === "failed"
      ? html`<${Problem} error=${side.error} />`
      : html`<p class="text" dir="auto" data-state=${side.state} aria-live="polite">${side.text || html`<i>${notes[side.state] ?? "no words"}</i>`}</p>`}
    ${side.source?.age_seconds !== undefined && html`<p class="hint">Read from ${side.source.videos[0].covered.map((ends) => ends.map((at) => clock(Math.round(at))).join(" to ")).join(", ")}. The newest of it was ${duration(side.source.age_seconds)} old.</p>`}
  </section>`;
}

function waited(side) {
  const seconds = side.source?.waited_seconds ?? 0;
  return seconds >= 0.01 ? `, of which ${duration(seconds)} for the video to be read` : "";
}

// Rows of the table: a name, the value of each side, how it is written, and what stands beside it.
function measures(one) {
  const { adapter = {}, frames = {} } = one.sides;
  const known = about.value.kv_bytes_per_token ?? 0;
  const present = one.files.map((file) => library.value.files.get(file.id) ?? file); // it may have been read since
  const stored = present.reduce((sum, file) => sum + (file.f2l.adapter_bytes ?? 0), 0);
  const seen = frames.source?.visual_tokens;
  return [
    ["First token", adapter.first, frames.first, duration],
    ["Prompt tokens", adapter.usage?.prompt_tokens, frames.usage?.prompt_tokens, count],
    ["Visual tokens", adapter.source?.visual_tokens, seen, count],
    !isStream(one) && ["Kept for the next question", adapter.source && stored, seen === undefined ? undefined : seen * known, bytes, ["adapter", "KV cache"]],
  ].filter(Boolean);
}

function Costs({ one }) {
  const both = Boolean(one.sides.adapter && one.sides.frames);
  const saved = one.sides.adapter?.source?.visual_tokens_avoided;
  return html`<table class="costs">
    <caption class="unseen">What the answers cost</caption>
    <thead><tr>
      <td></td>
      ${Object.keys(one.sides).map((mode) => html`<th scope="col" class=${`is-${mode}`}>${mode === "adapter" ? "Adapter" : "Frames"}</th>`)}
      ${both && html`<th scope="col" class="ratio">Ratio</th>`}
    </tr></thead>
    <tbody>
      ${measures(one).map(([name, adapter, frames, write, units = []]) => {
        const values = { adapter, frames };
        const most = Math.max(adapter ?? 0, frames ?? 0);
        return html`<tr>
          <th scope="row">${name}</th>
          ${Object.keys(one.sides).map((mode, place) => html`<td class=${`is-${mode}`}>
            <span>${values[mode] === undefined ? "–" : write(values[mode])}${values[mode] !== undefined && units[mode === "adapter" ? 0 : 1] ? html` <small>${units[mode === "adapter" ? 0 : 1]}</small>` : ""}</span>
            <i style=${{ width: `${most ? (100 * (values[mode] ?? 0)) / most : 0}%` }} />
          </td>`)}
          ${both && html`<td class="ratio">${adapter && frames ? ratio(frames, adapter) : ""}</td>`}
        </tr>`;
      })}
    </tbody>
    ${saved !== undefined && html`<tfoot><tr><th scope="row">Saved</th>
      <td colspan=${both ? 3 : 1}>${count(saved)} visual tokens in this question: they were read once, when the video came.</td>
    </tr></tfoot>`}
  </table>`;
}
