// Questions, and how their answers come: one side after the other, so that neither is timed while the other runs.
import { eventsOf, post, Refused } from "./api.js";
import { about } from "./about.js";
import { Store } from "./store.js";

export const MOST_TOKENS = 256;
export const SIDES = ["adapter", "frames"];

// Newest first. Each: `number`, `text`, `files`, `spans`, `sides` by mode.
export const questions = new Store({ list: [] });
let last = 0;

// The body of a question in OpenAI's shape. `spans`: by file id, `[start, end]` in seconds; by stream id, its `f2l`.
export function bodyOf(text, files, spans, mode) {
  const options = { max_tokens: MOST_TOKENS, temperature: 0, ...(mode === "adapter" ? {} : { f2l: { mode } }) };
  const cut = mode === "adapter" ? spans : {};
  const span = cut[files[0].id];
  if (files.length === 1 && !Array.isArray(span)) {
    return { model: files[0].id, messages: [{ role: "user", content: text }], ...options, ...(span && { f2l: span }) };
  }
  const parts = files.map((file) => {
    const span = cut[file.id];
    return { type: "file", file: { file_id: file.id, ...(span && { f2l: { start: span[0], end: span[1] } }) } };
  });
  const messages = [{ role: "user", content: [...parts, { type: "text", text }] }];
  return { model: about.value.model, messages, ...options };
}

export const isStream = ({ files: [first] }) => first.object === "stream";

export function ask(text, files, spans, modes) {
  last += 1;
  const sides = Object.fromEntries(modes.map((mode) => [mode, { mode, text: "", state: "waiting" }]));
  const one = { number: last, text, files, spans, sides, life: new AbortController() };
  questions.set({ list: [one, ...questions.value.list] });
  run(one);
}

export function dismiss(one) {
  one.life.abort();
  questions.set({ list: questions.value.list.filter((other) => other.number !== one.number) });
}

export function stop(one) {
  one.life.abort();
}

async function run(one) {
  for (const side of Object.values(one.sides)) {
    if (one.life.signal.aborted) change(side, { state: "stopped" });
    else await answer(one, side);
  }
}

function change(side, fields) {
  Object.assign(side, fields);
  questions.set({ list: [...questions.value.list] });
}

async function answer(one, side) {
  change(side, { state: "asking" });
  const body = bodyOf(one.text, one.files, one.spans, side.mode);
  const begun = performance.now();
  try {
    const sent = { ...body, stream: true, stream_options: { include_usage: true } };
    const response = await post("v1/chat/completions", sent, { signal: one.life.signal });
    for await (const event of eventsOf(response)) {
      if (event === "[DONE]") break;
      read(side, JSON.parse(event), (performance.now() - begun) / 1000);
    }
    change(side, { state: "done", seconds: (performance.now() - begun) / 1000 });
  } catch (error) {
    if (error.name === "AbortError") change(side, { state: "stopped" });
    else change(side, { state: "failed", error });
  }
}

function read(side, chunk, seconds) {
  if (chunk.error) throw new Refused(200, chunk.error, new Headers());
  const more = chunk.choices?.[0]?.delta?.content;
  if (more) change(side, { text: side.text + more, first: side.first ?? seconds });
  if (chunk.usage) change(side, { usage: chunk.usage, source: chunk.f2l });
}
