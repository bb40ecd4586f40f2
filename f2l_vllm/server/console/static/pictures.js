// Posters and strips: fetched with the key, kept in memory for the rows seen last.
import { call } from "./api.js";
import { html, useEffect, useState } from "./html.js";

const MOST = 400;
const AT_ONCE = 3;
const REST_MS = 120; // a row that is scrolled past asks for nothing

const kept = new Map(); // by path: a promise of `{ url, seconds }`
const waiting = [];
let running = 0;

export function forget() {
  for (const picture of kept.values()) picture.then(({ url }) => URL.revokeObjectURL(url), () => {});
  kept.clear();
}

function picture(path, signal) {
  let found = kept.get(path);
  if (found) {
    kept.delete(path);
  } else {
    found = turn(signal).then(() => load(path).finally(done));
    found.catch(() => kept.delete(path));
  }
  kept.set(path, found);
  if (kept.size > MOST) {
    const [oldest, gone] = kept.entries().next().value;
    kept.delete(oldest);
    gone.then(({ url }) => URL.revokeObjectURL(url), () => {});
  }
  return found;
}

async function load(path) {
  const response = await call(path);
  const seconds = (response.headers.get("X-F2L-Seconds") ?? "").split(",").map(Number);
  return { url: URL.createObjectURL(await response.blob()), seconds };
}

// In the order of the rows; one that was scrolled past has left.
function turn(signal) {
  return new Promise((resolve, reject) => {
    signal.addEventListener("abort", () => reject(signal.reason));
    waiting.push({ resolve, signal });
    begin();
  });
}

function begin() {
  while (running < AT_ONCE && waiting.length) {
    const { resolve, signal } = waiting.shift();
    if (signal.aborted) continue;
    running += 1;
    resolve();
  }
}

function done() {
  running -= 1;
  begin();
}

// The picture at `path`, or null until it is there. `path` null: none.
export function usePicture(path) {
  const [shown, show] = useState({ path: null, picture: null });
  useEffect(() => {
    if (!path) return undefined;
    const life = new AbortController();
    const ask = () => picture(path, life.signal).then((found) => show({ path, picture: found }), () => {});
    const timer = setTimeout(ask, kept.has(path) ? 0 : REST_MS);
    return () => {
      clearTimeout(timer);
      life.abort();
    };
  }, [path]);
  return shown.path === path ? shown.picture : null;
}

export function Poster({ file }) {
  const found = usePicture(`console/files/${encodeURIComponent(file.id)}/poster`);
  return html`<span class="poster">${found && html`<img draggable=${false} src=${found.url} alt="" />`}</span>`;
}

export function Strip({ file }) {
  const path = file.status === "processed" ? `console/files/${encodeURIComponent(file.id)}/strip` : null;
  const found = usePicture(path);
  return html`<span class="strip">${found && html`<img draggable=${false} src=${found.url} alt="" />`}</span>`;
}
