// The page of live streams, and of one of them.
import { session } from "./api.js";
import { Question } from "./answer.js";
import { ask as confirm } from "./confirm.js";
import { html, useEffect, useReducer, useRef, useState } from "./html.js";
import { Problem } from "./notice.js";
import { usePicture } from "./pictures.js";
import { ask, questions } from "./question.js";
import { Code } from "./snippets.js";
import { useStore } from "./store.js";
import { Stretch } from "./stretch.js";
import { begin, end, named, remove, useStream, useStreams } from "./streams.js";
import { Watches } from "./watches.js";
import { ago, clock, count, span as roughly } from "./format.js";

export function Live({ id }) {
  return id ? html`<${One} key=${id} id=${id} />` : html`<${All} />`;
}

function All() {
  const [number, again] = useReducer((number) => number + 1, 0);
  const { list, hasMore, error } = useStreams(number);
  return html`<div class="live">
    <h1>Live streams</h1>
    <${Begin} />
    ${error && html`<${Problem} error=${error} />`}
    ${list && html`<p class="tally" role="status">${count(list.length)}${hasMore ? "+" : ""} ${list.length === 1 ? "stream" : "streams"}</p>`}
    <ul class="streams" aria-label="Streams">
      ${list?.map((stream) => html`<li key=${stream.id} data-stream=${stream.id}>
        <a href=${`#/live/${stream.id}`} dir="auto">${named(stream)}</a>
        <span class="facts">${facts(stream).map((fact) => html`<span>${fact}</span>`)}</span>
        <${Actions} stream=${stream} onEnd=${again} onGone=${again} />
      </li>`)}
    </ul>
  </div>`;
}

function facts({ status, created_at, f2l }) {
  const read = f2l.covered.reduce((sum, [start, end]) => sum + end - start, 0);
  return [status, `${count(f2l.segments)} ${f2l.segments === 1 ? "segment" : "segments"}`, `${clock(Math.round(read))} read`, `begun ${ago(created_at)}`];
}

function Begin() {
  const [error, setError] = useState(null);
  const submit = (event) => {
    event.preventDefault();
    const { name, source, segment, window, on_end } = Object.fromEntries(new FormData(event.target));
    const given = { name, segment_seconds: Number(segment), window_seconds: Number(window), on_end, ...(source && { source }) };
    begin(given).then(({ id }) => (location.hash = `#/live/${id}`), setError);
  };
  return html`<form class="begin" onSubmit=${submit}>
    <label>Name <input type="text" name="name" maxlength="256" dir="auto" autocomplete="off" /></label>
    <label>Source <input type="text" name="source" maxlength="2048" autocomplete="off" placeholder="rtsp://…, or empty to push" /></label>
    <label>Segment in seconds <input type="number" name="segment" required min="1" max="600" step="any" value="10" /></label>
    <label>Window in seconds <input type="number" name="window" required min="1" max="86400" step="any" value="60" /></label>
    <label>At its end <select name="on_end"><option value="file">it becomes a video</option><option value="delete">nothing stays</option></select></label>
    <button type="submit" class="primary">Begin a stream</button>
    ${error && html`<${Problem} error=${error} />`}
  </form>`;
}

function Actions({ stream, onEnd, onGone }) {
  const [error, setError] = useState(null);
  const attempt = (work, done, ...words) => async () => {
    if (await confirm(...words)) await work(stream.id).then(done, setError);
  };
  const name = named(stream);
  const kept = stream.on_end === "file" ? "It takes no more segments, and becomes a video." : "It takes no more segments, and nothing of it stays.";
  return html`<span class="actions">
    ${error && html`<${Problem} error=${error} />`}
    ${stream.file_id && html`<a class="button small" href=${`#/ask/${stream.file_id}`} aria-label=${`The video of ${name}`}>Video</a>`}
    ${stream.status === "live" && html`<button type="button" class="small" aria-label=${`End ${name}`} onClick=${attempt(end, onEnd, `End ${name}?`, kept, "End")}>End</button>`}
    <button type="button" class="small" aria-label=${`Delete ${name}`}
      onClick=${attempt(remove, onGone, `Delete ${name}?`, "All that was read of it is erased. A video that it has become stays.", "Delete")}>Delete</button>
  </span>`;
}

function One({ id }) {
  const { stream, at, error } = useStream(id);
  const [stretch, setStretch] = useState({ kind: "window", last: 30, span: null });
  const mine = useStore(questions).list.filter(({ files: [first] }) => first.id === id);
  const problem = error && html`<${Problem} error=${error} />`;
  if (!stream) return html`<div class="live"><h1 class="unseen">Live</h1>${problem}</div>`;
  const { f2l } = stream;
  const length = f2l.head - f2l.started_at;
  const last = stretch.kind === "last" ? stretch.last : stream.window_seconds;
  const span = stretch.kind === "span" ? stretch.span : [Math.max(0, length - last), length];
  const asked = stretch.kind === "span" ? { start: span[0], end: span[1] } : stretch.kind === "last" ? { last } : undefined;
  const answered = mine.find(({ sides }) => sides.adapter.source)?.sides.adapter.source;
  const file = { id, filename: named(stream), object: "stream", f2l: {} };
  return html`<div class="live">
    <header>
      <h1 dir="auto">${named(stream)}</h1>
      <${Freshness} stream=${stream} at=${at} />
      <${Actions} stream=${stream} onGone=${() => (location.hash = "#/live")} />
    </header>
    ${problem}
    ${f2l.pieces > 0 && html`<div class="scene">
        <${Picture} stream=${stream} />
        <${Stretch} stream=${stream} span=${span} isFree=${stretch.kind === "span"} covered=${answered?.videos[0].covered ?? []}
          onSpan=${(next) => setStretch({ ...stretch, kind: "span", span: next })} />
      </div>
      <${Form} stream=${stream} stretch=${stretch} setStretch=${setStretch} whole=${[0, length]}
        onAsk=${(text) => ask(text, [file], { [id]: asked }, ["adapter"])} />`}
    ${mine.map((one) => html`<${Question} key=${one.number} one=${one} />`)}
    <${Watches} stream=${stream} />
    ${stream.push_url && stream.status === "live" && html`<${Sending} stream=${stream} />`}
  </div>`;
}

// Its age grows between two events.
function Freshness({ stream, at }) {
  const [, tick] = useReducer((number) => number + 1, 0);
  useEffect(() => {
    const timer = setInterval(tick, 1000);
    return () => clearInterval(timer);
  }, []);
  const { age_seconds: age, behind_seconds: behind, reading, in_work: inWork, source } = stream.f2l;
  const now = [
    age !== null && `newest read is ${roughly(age + (Date.now() - at) / 1000)} old`,
    behind > 0 && `${roughly(behind)} behind`,
    inWork > 0 && `${count(inWork)} in work`,
    `reading ${reading}`,
  ].filter(Boolean);
  const from = source ? [`source ${source.state}${source.state === "connected" ? "" : `: ${source.why}`}`] : [];
  return html`<span class="facts">${[...facts(stream), ...from, ...(stream.status === "live" ? now : [])].map((fact) => html`<span>${fact}</span>`)}</span>`;
}

// The picture before stays until the next one is here.
function Picture({ stream }) {
  const found = usePicture(`console/streams/${encodeURIComponent(stream.id)}/picture?${stream.f2l.segments}`);
  const last = useRef(null);
  last.current = found ?? last.current;
  return html`<div class="picture">${last.current && html`<img draggable=${false} src=${last.current.url} alt="A frame of the newest segment" />`}</div>`;
}

function Form({ stream, stretch, setStretch, whole, onAsk }) {
  const [text, setText] = useState("");
  const submit = (event) => {
    event.preventDefault();
    if (text.trim()) onAsk(text.trim());
    setText("");
  };
  return html`<form class="asking" onSubmit=${submit}>
    <input type="text" dir="auto" autocomplete="off" aria-label="Question" placeholder="Ask about this stream" value=${text} onInput=${(event) => setText(event.target.value)} />
    <button type="submit" class="primary" disabled=${!text.trim()}>Ask</button>
    <label>About
      <select value=${stretch.kind} onChange=${({ target }) => setStretch({ ...stretch, kind: target.value, span: stretch.span ?? whole })}>
        <option value="window">the last ${roughly(stream.window_seconds)}</option>
        <option value="last">the last seconds</option>
        <option value="span">what is chosen above</option>
      </select>
      ${stretch.kind === "last" && html`<input type="number" aria-label="Seconds" required min="1" step="any" value=${stretch.last}
        onInput=${({ target }) => setStretch({ ...stretch, last: Number(target.value) || 1 })} />`}
      ${stretch.kind === "span" && html`<span>${clock(stretch.span[0])} to ${clock(stretch.span[1])}</span>`}
    </label>
  </form>`;
}

function Sending({ stream }) {
  const { value: { key } } = session;
  const ffmpeg = `ffmpeg -re -i INPUT -c:v copy -an -f hls -hls_time ${stream.segment_seconds} \\
  ${key ? '-headers "Authorization: Bearer $F2L_KEY" ' : ""}-method PUT '${stream.push_url}live.m3u8'`;
  return html`<details class="snippets" open=${!stream.f2l.segments}>
    <summary>How to send it</summary>
    <${Code} name="address" text=${stream.push_url} label="Where segments are put" />
    <${Code} name="ffmpeg" text=${ffmpeg} label="The command for ffmpeg" />
  </details>`;
}
