// The caller's videos: read a page at a time, and kept up to date by one stream of events.
import { call, eventsOf, json, lose, post, session } from "./api.js";
import { Store } from "./store.js";

const PAGE = 500;
const AGAIN_MS = 2000;

// `ids`: newest first, as far as they were read; `files`: by id; `last`: where the next page begins; `hasMore`: whether
// there is one.
const EMPTY = { ids: [], last: null, hasMore: true, error: null };
export const library = new Store({ ...EMPTY, files: new Map(), stored: 0, why: null });

let reading = null;
let life = null;

// Begins anew: with another key, or when a server is back.
export function open() {
  close();
  library.set({ ...EMPTY, files: new Map() });
  life = new AbortController();
  reading = null;
  follow(life.signal);
  return more();
}

export function close() {
  life?.abort();
  life = null;
}

// Reads the next page, once at a time.
export function more() {
  if (!library.value.hasMore || !life) return Promise.resolve();
  reading ??= read(life.signal).finally(() => (reading = null));
  return reading;
}

async function read(signal) {
  const { last } = library.value;
  try {
    const page = await json(`v1/files?limit=${PAGE}${last ? `&after=${last}` : ""}`, { signal });
    const { ids, files } = library.value;
    const videos = page.data.filter((file) => !file.purpose.startsWith("batch"));
    for (const file of videos) files.set(file.id, file);
    const known = new Set(ids);
    const added = videos.map((file) => file.id).filter((id) => !known.has(id));
    const next = { last: page.last_id, hasMore: page.has_more, stored: page.f2l?.stored_bytes ?? 0, error: null };
    library.set({ ids: [...ids, ...added], ...next });
    if (!videos.length && page.has_more) await read(signal);
  } catch (error) {
    if (error.code === "invalid_cursor") return open(); // the last file was deleted elsewhere
    if (error.name !== "AbortError") library.set({ error });
  }
}

// Puts new or changed files into the list; new ones are the newest.
export function put(list) {
  const { files, ids } = library.value;
  const fresh = list.filter((file) => !files.has(file.id));
  for (const file of list) files.set(file.id, file);
  fresh.sort((one, other) => other.created_at - one.created_at);
  const stored = fresh.reduce((sum, file) => sum + file.bytes, library.value.stored);
  library.set({ ids: [...fresh.map((file) => file.id), ...ids], stored });
}

export function drop(gone) {
  const { files, ids } = library.value;
  let { stored } = library.value;
  for (const id of gone) {
    stored -= files.get(id)?.bytes ?? 0;
    files.delete(id);
  }
  library.set({ ids: ids.filter((id) => files.has(id)), stored });
}

async function follow(signal) {
  while (!signal.aborted) {
    try {
      const response = await call("console/events", { signal });
      for await (const event of eventsOf(response)) take(JSON.parse(event));
    } catch (error) {
      if (signal.aborted || session.value.isRefused) return;
    }
    if (signal.aborted) return;
    // The stream ended: the server may have gone. Ask, and look again at everything that was in work.
    if (session.value.isAway) return void lose().then(() => signal.aborted || open());
    await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
  }
}

function take(event) {
  if (event.error) return;
  const { files } = library.value;
  put(event.files);
  for (const [id, [stage, progress]] of Object.entries(event.progress)) {
    const file = files.get(id);
    if (file) files.set(id, { ...file, f2l: { ...file.f2l, stage, progress } });
  }
  if (event.gone.length) drop(event.gone);
  library.set({ why: event.waits_for });
}

export async function find(id) {
  const known = library.value.files.get(id);
  if (known) return known;
  return json(`v1/files/${encodeURIComponent(id)}`);
}

export async function remove(id) {
  try {
    await call(`v1/files/${encodeURIComponent(id)}`, { method: "DELETE" });
  } catch (error) {
    if (error.code !== "video_not_found") throw error;
  }
  drop([id]);
}

export async function pin(file) {
  const answer = await post(`v1/files/${encodeURIComponent(file.id)}`, { f2l: { pinned: !file.f2l.pinned } });
  await answer.json();
  const fresh = await json(`v1/files/${encodeURIComponent(file.id)}`);
  put([fresh]);
}

// Lets the browser save the adapter: it is fetched with the key, which a link could not carry.
export async function download(file) {
  const response = await call(`v1/files/${encodeURIComponent(file.id)}/adapter`);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await response.blob());
  link.download = `${file.f2l.adapter}.tar`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

const STAGES = ["uploaded", "decoding", "encoding", "publishing", "processed"];
export const STAGE_NAMES = ["uploaded", "decoding", "reading", "writing", "ready"];

// Where a file stands: the place in STAGE_NAMES, and how much of that stage is done.
export function standing(file) {
  return [Math.max(0, STAGES.indexOf(file.f2l.stage)), file.f2l.progress];
}

export const isReady = (file) => file.status === "processed";
export const hasFailed = (file) => file.status === "error";
