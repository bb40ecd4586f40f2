// The standing questions of a stream, with their latest answers.
import { call, json, post } from "./api.js";
import { html, useReducer, useRef, useState } from "./html.js";
import { IconButton } from "./icons.js";
import { Problem } from "./notice.js";
import { Code } from "./snippets.js";
import { useAgain } from "./streams.js";
import { clock } from "./format.js";

const SHOWN = 5; // answers

export function Watches({ stream }) {
  const [number, again] = useReducer((number) => number + 1, 0);
  const [made, setMade] = useState({});
  const path = `v1/streams/${encodeURIComponent(stream.id)}/watches`;
  const { list = [], error } = useAgain(async (show, signal) => show({ list: (await json(path, { signal })).data }), number);
  const submit = (event) => {
    event.preventDefault();
    const form = event.target;
    const [question, webhook_url] = [form.question.value.trim(), form.webhook.value.trim()];
    const done = async (response) => {
      setMade(await response.json());
      form.reset();
      again();
    };
    post(path, { question, ...(webhook_url && { webhook_url }) }).then(done).catch((error) => setMade({ error }));
  };
  const remove = (id) => () => call(`${path}/${id}`, { method: "DELETE" }).then(again, (error) => setMade({ error }));
  const problem = made.error ?? error;
  return html`<section class="watches" aria-labelledby="watches">
    <h2 id="watches">Standing questions</h2>
    ${stream.status === "live" && html`<form class="begin" onSubmit=${submit}>
      <label>Ask each new segment <input type="text" name="question" required maxlength="8192" dir="auto" autocomplete="off" /></label>
      <label>Webhook, if answers are to be sent <input type="url" name="webhook" autocomplete="off" placeholder="none" /></label>
      <button type="submit">Add</button>
    </form>`}
    ${problem && html`<${Problem} error=${problem} />`}
    ${made.secret && html`<div class="snippets"><p class="hint">The secret of the webhook is shown once: keep it.</p><${Code} name="secret" text=${made.secret} label="The webhook's secret" /></div>`}
    <ul class="streams">${list.map((watch) => html`<${Watch} key=${watch.id} watch=${watch} stream=${stream} path=${path} onRemove=${remove(watch.id)} />`)}</ul>
  </section>`;
}

function Watch({ watch, stream, path, onRemove }) {
  const last = useRef(0);
  const { answers = [], error } = useAgain(async (show, signal) => {
    for (let more = true; more; ) {
      const page = await json(`${path}/${watch.id}/answers?after=${last.current}`, { signal });
      last.current = page.last;
      more = page.has_more;
      show((now) => ({ answers: [...(now.answers ?? []), ...page.data].slice(-SHOWN) }));
    }
  }, watch.id);
  const asked = watch.request.messages.at(-1)?.content;
  const text = typeof asked === "string" ? asked : JSON.stringify(asked);
  const at = (time) => clock(Math.round(time - stream.f2l.started_at));
  return html`<li data-watch=${watch.id}>
    <b dir="auto">${text}</b>
    ${watch.webhook_url && html`<span class="facts">sent to ${watch.webhook_url}</span>`}
    <span class="actions"><${IconButton} name="trash" label=${`Remove ${text}`} onClick=${onRemove} /></span>
    ${error && html`<${Problem} error=${error} />`}
    <ol>${answers.toReversed().map(({ id, data }) => html`<li key=${id}>
      <span class="facts">${at(data.start)} to ${at(data.end)}</span> <span dir="auto">${data.answer ?? data.error?.message}</span>
    </li>`)}</ol>
  </li>`;
}
