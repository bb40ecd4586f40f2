// The page of all videos: upload, search, watch, choose.
import { about } from "./about.js";
import { html, useRef, useState } from "./html.js";
import { Icon } from "./icons.js";
import { library, more } from "./library.js";
import { Problem } from "./notice.js";
import { Rows } from "./rows.js";
import { Upload, Video } from "./row.js";
import { chosen, toggle } from "./selection.js";
import { useStore } from "./store.js";
import { add, addLink, keeping, uploads } from "./upload.js";
import { bytes, count } from "./format.js";

const ROW = 84;
const KEEP = [["", "Keep until deleted"], ["3600", "Keep for an hour"], ["86400", "Keep for a day"], ["604800", "Keep for a week"]];

function matches(file, words) {
  const text = `${file.filename} ${file.id} ${file.status} ${file.f2l.stage} ${file.f2l.error?.code ?? ""}`.toLowerCase();
  return words.every((word) => text.includes(word));
}

export function Gallery() {
  const { ids, files, hasMore, stored, error, why } = useStore(library);
  const { list } = useStore(uploads);
  const { set } = useStore(chosen);
  const [search, setSearch] = useState("");
  const words = search.toLowerCase().split(/\s+/).filter(Boolean);
  const found = words.length ? ids.filter((id) => matches(files.get(id), words)) : ids;
  const entries = [...list.toReversed(), ...found.map((id) => files.get(id))];
  const isEmpty = !ids.length && !list.length && !hasMore;
  if (words.length && hasMore) more();
  return html`<div class="gallery">
    <h1 class="unseen">Videos</h1>
    <${Bar} search=${search} setSearch=${setSearch} />
    ${why && html`<p class="hint" role="status">Videos wait: ${why}.</p>`}
    ${error && html`<${Problem} error=${error} />`}
    ${isEmpty
      ? html`<${Welcome} />`
      : html`<p class="tally" role="status">
            ${words.length ? `${count(found.length)} found${hasMore ? ", still looking" : ""}` : total(ids.length, hasMore, stored)}
          </p>
          <${Rows}
            label="Videos"
            count=${entries.length}
            height=${ROW}
            onEnd=${more}
            row=${(index, style) => {
              const one = entries[index];
              return one.number
                ? html`<${Upload} key=${`upload-${one.number}`} one=${one} style=${style} index=${index} />`
                : html`<${Video} key=${one.id} file=${one} style=${style} index=${index} height=${ROW}
                    isChosen=${set.has(one.id)} onChoose=${() => toggle(one.id)} />`;
            }}
          />`}
    ${set.size > 0 && html`<${Chosen} set=${set} />`}
  </div>`;
}

function total(known, hasMore, stored) {
  return `${count(known)}${hasMore ? "+" : ""} ${known === 1 ? "video" : "videos"}, ${bytes(stored)}`;
}

function Bar({ search, setSearch }) {
  const input = useRef(null);
  const { seconds } = useStore(keeping);
  const [url, setUrl] = useState("");
  const { media_domains: domains = [] } = useStore(about);
  const take = (event) => {
    add(event.target.files);
    event.target.value = "";
  };
  const link = (event) => {
    event.preventDefault();
    if (url.trim()) addLink(url.trim());
    setUrl("");
  };
  return html`<div class="bar">
    <button type="button" class="primary" onClick=${() => input.current.click()}><${Icon} name="plus" /> Add videos</button>
    <input ref=${input} type="file" multiple hidden accept="video/*,.mkv,.ts,.avi" aria-label="Video files" onChange=${take} />
    <select aria-label="How long new videos are kept" value=${seconds ?? ""}
      onChange=${(event) => keeping.set({ seconds: Number(event.target.value) || null })}>
      ${KEEP.map(([value, text]) => html`<option value=${value}>${text}</option>`)}
    </select>
    ${domains.length > 0 &&
    html`<form class="link" onSubmit=${link}>
      <input type="url" required placeholder=${`Link from ${domains[0]}`} aria-label=${`Link to a video from ${domains.join(", ")}`}
        value=${url} onInput=${(event) => setUrl(event.target.value)} />
      <button type="submit">Fetch</button>
    </form>`}
    <label class="search">
      <${Icon} name="search" />
      <input type="search" placeholder="Search" aria-label="Search videos by name, id or state" value=${search}
        onInput=${(event) => setSearch(event.target.value)} />
    </label>
  </div>`;
}

function Welcome() {
  return html`<div class="welcome">
    <p class="lead">Drop videos anywhere on this page.</p>
    <p>Each is read once. After that, questions about it cost no more than text.</p>
  </div>`;
}

function Chosen({ set }) {
  const { max_videos: most = 1 } = useStore(about);
  const tooMany = set.size > most;
  return html`<div class="chosen" role="region" aria-label="Chosen videos">
    <span>${count(set.size)} chosen${tooMany ? `; one question takes at most ${most}` : ""}</span>
    <button type="button" onClick=${() => chosen.set({ set: new Set() })}>Clear</button>
    <a class="button primary" href=${tooMany ? undefined : `#/ask/${[...set].join(",")}`} aria-disabled=${tooMany}>
      Ask about ${set.size === 1 ? "it" : "them"}
    </a>
  </div>`;
}
