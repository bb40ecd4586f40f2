// Requests to this server. The key is kept for this tab alone and travels in a header, never in an address.
import { Store } from "./store.js";
import { headline } from "./errors.js";

const ROOT = new URL("../", document.baseURI);
const KEY = "f2l-key";
const RETRY_MS = 1000;

// `key`: what the user gave, for the time `tries`; `isRefused`: another is needed; `isAway`: the server does not answer.
export const session = new Store({ key: sessionStorage.getItem(KEY) ?? "", isRefused: false, isAway: false, tries: 0 });

export class Refused extends Error {
  constructor(status, error, headers) {
    super(error.message);
    this.status = status;
    this.code = error.code;
    this.retryAfter = Number(headers.get("Retry-After")) || null;
    this.fileId = headers.get("X-F2L-File");
  }

  get headline() {
    return headline(this.code);
  }
}

export class Away extends Error {
  headline = "The server does not answer";

  constructor() {
    super("It may be restarting, or the network is down. This page goes on as soon as it is back.");
  }
}

export function address(path) {
  return new URL(path, ROOT).href;
}

export function authorization() {
  return session.value.key ? { Authorization: `Bearer ${session.value.key}` } : {};
}

export function useKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
  session.set({ key, isRefused: false, tries: session.value.tries + 1 });
}

// The response to a request, or an exception: `Refused`, `Away`, or an `AbortError` of `signal`.
export async function call(path, { headers = {}, ...options } = {}) {
  let response;
  try {
    response = await fetch(address(path), {
      ...options,
      headers: { ...authorization(), ...headers },
      credentials: "omit",
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    lose();
    throw new Away();
  }
  if (response.ok) return response;
  throw refused(response.status, await response.text(), response.headers);
}

export async function json(path, options) {
  return (await call(path, options)).json();
}

export function post(path, body, options = {}) {
  return call(path, {
    method: "POST",
    body: JSON.stringify(body),
    headers: { "Content-Type": "application/json" },
    ...options,
  });
}

// The error of an answer that is not 2xx. Proxies answer in HTML, which is shown to nobody.
export function refused(status, text, headers) {
  let error;
  try {
    error = JSON.parse(text).error;
  } catch {
    error = null;
  }
  error = error?.message ? error : { code: String(status), message: `The server answered with the status ${status}.` };
  if (status === 401) session.set({ isRefused: true });
  return new Refused(status, error, headers);
}

let waiting = null;

// Notes that the server is away, and asks until it is back.
export function lose() {
  session.set({ isAway: true });
  waiting ??= back();
  return waiting;
}

async function back() {
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    try {
      const response = await fetch(address("health"), { cache: "no-store" });
      if (response.ok) break;
    } catch {
      continue;
    }
  }
  waiting = null;
  session.set({ isAway: false });
}

// The data of a stream's events, as they come: https://html.spec.whatwg.org/multipage/server-sent-events.html
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      left += value;
      let end;
      while ((end = left.indexOf("\n\n")) >= 0) {
        const lines = left.slice(0, end).split("\n").filter((line) => line.startsWith("data:"));
        left = left.slice(end + 2);
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
