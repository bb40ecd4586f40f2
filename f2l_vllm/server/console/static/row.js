// One video of the list, and one upload.
import { html, useState } from "./html.js";
import { IconButton } from "./icons.js";
import { STAGE_NAMES, download, hasFailed, isReady, pin, remove, standing } from "./library.js";
import { Poster, Strip } from "./pictures.js";
import { moveFocus } from "./rows.js";
import { unchoose } from "./selection.js";
import { again, dismiss } from "./upload.js";
import { ask as confirm } from "./confirm.js";
import { ago, bytes, clock, count, duration, span } from "./format.js";
import { headline } from "./errors.js";

export function Video({ file, style, index, height, isChosen, onChoose }) {
  const [error, setError] = useState(null);
  const attempt = (work) => () => work().catch(setError);
  const erase = async () => {
    if (!(await confirm(`Delete ${file.filename}?`, "Its bytes and its adapter are erased from every server.", "Delete"))) return;
    await remove(file.id);
    unchoose(file.id);
  };
  const pinned = file.f2l.pinned;
  const onKey = (event) => {
    moveFocus(event, height);
    if (event.target !== event.currentTarget) return;
    if (event.key === "Enter" && !hasFailed(file)) location.hash = `#/ask/${file.id}`;
    if (event.key === "Delete") attempt(erase)();
    if (event.key === " ") {
      event.preventDefault();
      onChoose();
    }
  };
  return html`<li class=${`row ${isChosen ? "is-chosen" : ""}`} style=${style} data-row=${index} data-file=${file.id} tabindex="0"
    aria-label=${`${file.filename}, ${STAGE_NAMES[standing(file)[0]]}`} onKeyDown=${onKey}>
    <input type="checkbox" aria-label=${`Choose ${file.filename}`} checked=${isChosen} disabled=${hasFailed(file)} onChange=${onChoose} />
    <${Poster} file=${file} />
    <div class="what">
      <span class="name">
        ${hasFailed(file)
          ? html`<span dir="auto">${file.filename}</span>`
          : html`<a href=${`#/ask/${file.id}`} dir="auto">${file.filename}</a>`}
      </span>
      <span class="facts">${facts(file).map((fact) => html`<span>${fact}</span>`)}</span>
    </div>
    ${error || hasFailed(file)
      ? html`<p class="row-problem"><strong>${error?.headline ?? headline(file.f2l.error?.code)}.</strong> ${error?.message ?? file.f2l.error?.message}</p>`
      : isReady(file) ? html`<${Strip} file=${file} />` : html`<${Stages} file=${file} />`}
    <div class="actions">
      ${!hasFailed(file) && html`<a class="button small" href=${`#/ask/${file.id}`} aria-label=${`Ask about ${file.filename}`}>Ask</a>`}
      <${IconButton} name="pin" label=${`${pinned ? "Unpin" : "Pin"} ${file.filename}`} aria-pressed=${pinned} onClick=${attempt(() => pin(file))} />
      <${IconButton} name="download" label=${`Download the adapter of ${file.filename}`} disabled=${!isReady(file)} onClick=${attempt(() => download(file))} />
      <${IconButton} name="trash" label=${`Delete ${file.filename}`} onClick=${attempt(erase)} />
    </div>
  </li>`;
}

function facts(file) {
  const { f2l } = file;
  return [
    f2l.duration_s && clock(f2l.duration_s),
    f2l.frames && `${count(f2l.frames)} frames`,
    bytes(file.bytes),
    f2l.adapter_bytes && `adapter ${bytes(f2l.adapter_bytes)}`,
    f2l.internalize_seconds && `read in ${duration(f2l.internalize_seconds)}`,
    ago(file.created_at),
    f2l.pinned ? "pinned" : file.expires_at && `gone in ${span(file.expires_at - Date.now() / 1000)}`,
  ].filter(Boolean);
}

// The five stages, those behind filled, the present one as far as it has come.
function Stages({ file }) {
  const [stage, progress] = standing(file);
  const value = Math.round((100 * (stage + progress)) / (STAGE_NAMES.length - 1));
  return html`<div class="stages" role="progressbar" aria-label=${`Reading ${file.filename}`} aria-valuenow=${Math.min(100, value)}
    aria-valuetext=${`${STAGE_NAMES[stage]}, ${Math.round(100 * progress)} %`}>
    ${STAGE_NAMES.map((name, place) => html`<span class=${place < stage ? "is-done" : place === stage ? "is-now" : ""}>
      <i style=${{ width: `${place < stage ? 100 : place === stage ? Math.max(4, 100 * progress) : 0}%` }} />
      ${name}
    </span>`)}
    ${file.f2l.waits_for && html`<em>${file.f2l.waits_for}</em>`}
  </div>`;
}

export function Upload({ one, style, index }) {
  const percent = Math.round(100 * one.sent);
  const state = one.note ?? (one.state === "waiting" ? "waits for its turn" : one.url ? "fetched by the server" : `sending, ${percent} %`);
  return html`<li class="row is-upload" style=${style} data-row=${index} data-upload=${one.number}>
    <span></span>
    <span class="poster"></span>
    <div class="what">
      <span class="name" dir="auto">${one.name}</span>
      <span class="facts">${one.bytes !== null && html`<span>${bytes(one.bytes)}</span>`}</span>
    </div>
    ${one.state === "failed"
      ? html`<p class="row-problem" role="alert"><strong>${one.error.headline}.</strong> ${one.error.message}</p>`
      : html`<div class="sending" role="progressbar" aria-label=${`Sending ${one.name}`} aria-valuenow=${percent}>
          <i style=${{ width: `${percent}%` }} /><span>${state}</span>
        </div>`}
    <div class="actions">
      ${one.state === "failed" && html`<${IconButton} name="retry" label=${`Try ${one.name} again`} onClick=${() => again(one)} />`}
      <${IconButton} name="close" label=${`Dismiss ${one.name}`} onClick=${() => dismiss(one)} />
    </div>
  </li>`;
}
