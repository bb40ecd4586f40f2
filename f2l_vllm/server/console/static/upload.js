// Videos on their way to the server, a few at a time.
import { Away, address, authorization, call, lose, refused } from "./api.js";
import { put } from "./library.js";
import { Store } from "./store.js";

const AT_ONCE = 3;

// Each: `number`, `name`, `bytes`, `sent` in [0, 1], `state` (waiting, sending, failed), `note`, `error`.
export const uploads = new Store({ list: [] });
// How long videos added from now on are kept, in seconds; null: until they are deleted.
export const keeping = new Store({ seconds: null });
let last = 0;

export function add(files) {
  const { seconds } = keeping.value;
  const fresh = [...files].map((file) => entry({ name: file.name, bytes: file.size, file, seconds }));
  uploads.set({ list: [...uploads.value.list, ...fresh] });
  next();
}

// A link to a video: the server fetches it and keeps it as a file.
export function addLink(url) {
  const one = entry({ name: url, bytes: null, url });
  uploads.set({ list: [...uploads.value.list, one] });
  next();
}

export function dismiss(one) {
  one.abort?.();
  uploads.set({ list: uploads.value.list.filter((other) => other.number !== one.number) });
  next();
}

export function again(one) {
  change(one, { state: "waiting", error: null, note: null, sent: 0 });
  next();
}

function entry(fields) {
  last += 1;
  return { number: last, sent: 0, state: "waiting", note: null, error: null, ...fields };
}

function change(one, fields) {
  Object.assign(one, fields);
  uploads.set({ list: [...uploads.value.list] });
}

function next() {
  const { list } = uploads.value;
  const free = AT_ONCE - list.filter((one) => one.state === "sending").length;
  for (const one of list.filter((other) => other.state === "waiting").slice(0, Math.max(0, free))) run(one);
}

async function run(one) {
  change(one, { state: "sending", sent: 0, note: null });
  try {
    const file = await (one.url ? fetched(one) : sent(one));
    put([file]);
    uploads.set({ list: uploads.value.list.filter((other) => other.number !== one.number) });
  } catch (error) {
    await failed(one, error);
  }
  next();
}

async function failed(one, error) {
  if (error instanceof Away) {
    change(one, { note: "waits for the server" });
    await lose();
    return change(one, { state: "waiting" });
  }
  const passes = error.retryAfter && error.status !== 409;
  if (!passes) return change(one, { state: "failed", error });
  for (let left = error.retryAfter; left > 0; left -= 1) {
    change(one, { note: `${error.headline.toLowerCase()}; again in ${left} s` });
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
  change(one, { state: "waiting" });
}

// `fetch` does not tell how much of a body was sent.
function sent(one) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    const form = new FormData();
    form.append("purpose", "vision");
    if (one.seconds) {
      form.append("expires_after[anchor]", "created_at");
      form.append("expires_after[seconds]", String(one.seconds));
    }
    form.append("file", one.file, one.name);
    request.open("POST", address("v1/files"));
    for (const [name, value] of Object.entries(authorization())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => change(one, { sent: event.loaded / event.total });
    request.onerror = () => {
      lose();
      reject(new Away());
    };
    request.onload = () => {
      if (request.status === 200) return resolve(JSON.parse(request.responseText));
      const headers = { get: (name) => request.getResponseHeader(name) };
      reject(refused(request.status, request.responseText, headers));
    };
    one.abort = () => request.abort();
    request.send(form);
  });
}

// A question that does not wait makes the server fetch the link; its refusal names the file.
async function fetched(one) {
  const { model } = await (await call("console/about")).json();
  const part = { type: "video_url", video_url: { url: one.url } };
  const messages = [{ role: "user", content: [part, { type: "text", text: "?" }] }];
  const body = JSON.stringify({ model, messages, max_tokens: 1, f2l: { wait: "none" } });
  const headers = { "Content-Type": "application/json" };
  let id;
  try {
    const answer = await (await call("v1/chat/completions", { method: "POST", body, headers })).json();
    id = answer.f2l.videos[0].file_id;
  } catch (error) {
    if (error.code !== "video_not_ready") throw error;
    id = error.fileId;
  }
  return (await call(`v1/files/${encodeURIComponent(id)}`)).json();
}
