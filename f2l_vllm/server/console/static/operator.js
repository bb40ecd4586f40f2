// The server's page: what it has, what it does now, and how that went since the page was opened.
import { about } from "./about.js";
import { address, authorization, session } from "./api.js";
import { html, useEffect, useState } from "./html.js";
import { by, look, quantile, rate, sum } from "./metrics.js";
import { Problem } from "./notice.js";
import { Plot } from "./plot.js";
import { useStore } from "./store.js";
import { bytes, count, duration } from "./format.js";
import { headline } from "./errors.js";

const EVERY_MS = 2000;
const KEPT = 450; // looks: a quarter of an hour
const WINDOW = 15; // looks that quantiles are taken over
const TTFT = "vllm:time_to_first_token_seconds";

// The looks so far, oldest first, while the page is shown; and the readiness with its reasons.
function useLooks() {
  const { isAway } = useStore(session);
  const [state, setState] = useState({ looks: [], ready: null, error: null });
  useEffect(() => {
    if (isAway) return undefined;
    let timer;
    let isOver = false;
    const again = async () => {
      try {
        const [seen, ready] = await Promise.all([look(), readiness()]);
        if (!isOver) setState(({ looks }) => ({ looks: [...looks, seen].slice(-KEPT), ready, error: null }));
      } catch (error) {
        if (!isOver) setState((now) => ({ ...now, error }));
      }
      if (!isOver) timer = setTimeout(again, EVERY_MS);
    };
    again();
    return () => {
      isOver = true;
      clearTimeout(timer);
    };
  }, [isAway]);
  return state;
}

async function readiness() {
  return (await fetch(address("ready"), { headers: authorization(), cache: "no-store" })).json();
}

export function Operator() {
  const facts = useStore(about);
  const { looks, ready, error } = useLooks();
  const now = looks.at(-1);
  return html`<div class="operator">
    <h1 class="unseen">Server</h1>
    ${error && html`<${Problem} error=${error} />`}
    ${ready && !ready.ready && html`<p class="problem" role="status"><span><strong>Not ready.</strong> ${Object.values(ready.why ?? {}).join("; ")}</span></p>`}
    ${now && html`<${Tiles} facts=${facts} now=${now} />`}
    ${now && html`<${Plots} looks=${looks} />`}
    ${now && html`<${Errors} now=${now} />`}
  </div>`;
}

function Tiles({ facts, now }) {
  const of = (name, labels) => sum(now, name, labels);
  const asked = of("f2l_questions_total", { mode: "adapter" }) + of("f2l_questions_total", { mode: "both" });
  const uploads = of("f2l_uploads_total");
  const queries = of("vllm:prefix_cache_queries_total");
  return html`<dl class="tiles">
    <${Tile} name="Questions in the engine" value=${count(of("vllm:num_requests_running"))} note=${`${count(of("vllm:num_requests_waiting"))} wait`}
      part=${of("vllm:num_requests_running") / facts.device_slots} />
    <${Tile} name="Answers that hold an adapter" value=${count(of("f2l_adapter_leases"))} note=${`${count(facts.device_slots)} slots on the device`}
      part=${of("f2l_adapter_leases") / facts.device_slots} />
    <${Tile} name="Adapters in host memory" value=${count(of("f2l_adapters_resident"))} note=${`${count(facts.host_slots)} places`}
      part=${of("f2l_adapters_resident") / facts.host_slots} />
    <${Tile} name="Videos waiting" value=${count(of("f2l_jobs", { state: "queued" }))} note=${`${count(of("f2l_jobs", { state: "running" }))} in work, queue of ${count(facts.queue_limit)}`}
      part=${of("f2l_jobs", { state: "queued" }) / facts.queue_limit} />
    <${Tile} name="Workers" value=${count(of("f2l_workers"))} note="loaded and alive" />
    <${Tile} name="KV cache in use" value=${percent(of("vllm:kv_cache_usage_perc"))} part=${of("vllm:kv_cache_usage_perc")} note="of its blocks" />
    <${Tile} name="Adapters found in memory" value=${share(asked - of("f2l_adapters_loaded_total"), asked)} note="of questions from adapters" />
    <${Tile} name="Prefixes found" value=${share(of("vllm:prefix_cache_hits_total"), queries)} note="of prompt tokens" />
    <${Tile} name="Uploads known already" value=${share(of("f2l_uploads_total", { reused: "true" }), uploads)} note=${`of ${count(uploads)}`} />
    <${Tile} name="Visual tokens saved" value=${count(of("f2l_visual_tokens_avoided_total"))} note="since the start" />
    <${Tile} name="Videos stored" value=${bytes(of("f2l_stored_bytes"))} note=${`${count(of("f2l_videos"))} files`} />
    <${Tile} name="Disk free" value=${bytes(of("f2l_disk_free_bytes"))} note="for the data folder" />
  </dl>`;
}

const percent = (part) => `${(100 * part).toFixed(part > 0 && part < 0.1 ? 1 : 0)} %`;
const share = (hits, all) => (all > 0 ? percent(Math.max(0, hits) / all) : "–");

function Tile({ name, value, note, part }) {
  return html`<div class="tile">
    <dt>${name}</dt>
    <dd><b>${value}</b><span>${note}</span>
      ${Number.isFinite(part) && html`<i class=${part > 0.9 ? "is-full" : ""} style=${{ "--part": Math.min(1, part) }} />`}</dd>
  </div>`;
}

// One value for each look; `of` gets the look before, or the one at the window's begin, and the look.
const series = (looks, of, back = 1) => looks.map((now, place) => (place ? of(looks[Math.max(0, place - back)], now) : null));

function Plots({ looks }) {
  const times = looks.map((seen) => seen.at);
  const rates = (...one) => series(looks, (before, now) => rate(before, now, ...one), 5);
  const first = (part) => series(looks, (before, now) => quantile(before, now, TTFT, part), WINDOW);
  const sums = (...one) => looks.map((now) => sum(now, ...one));
  const small = (value) => (value >= 10 || value === 0 ? count(value) : value.toPrecision(2));
  return html`<div class="plots">
    <${Plot} title="Questions a second" write=${small} data=${[times, rates("f2l_questions_total", { mode: "adapter" }), rates("f2l_questions_total", { mode: "frames" })]}
      lines=${[{ name: "from adapters", tone: "adapter" }, { name: "from frames", tone: "frames" }]} />
    <${Plot} title="First token" write=${(value) => (value === 0 ? "0" : duration(value))} data=${[times, first(0.5), first(0.95)]}
      lines=${[{ name: "half within", tone: "adapter" }, { name: "95 % within", tone: "edge" }]} />
    <${Plot} title="Tokens a second" write=${small} data=${[times, rates("vllm:generation_tokens_total"), rates("vllm:prompt_tokens_total")]}
      lines=${[{ name: "written", tone: "adapter" }, { name: "read", tone: "edge" }]} />
    <${Plot} title="Videos in the queue" write=${small} data=${[times, sums("f2l_jobs", { state: "running" }), sums("f2l_jobs", { state: "queued" })]}
      lines=${[{ name: "in work", tone: "adapter" }, { name: "waiting", tone: "edge" }]} />
  </div>`;
}

function Errors({ now }) {
  const found = Object.entries(by(now, "f2l_errors_total", "code")).filter(([, times]) => times > 0);
  found.sort(([, one], [, other]) => other - one);
  if (!found.length) return null;
  return html`<section class="errors" aria-label="Errors since the start">
    <h2>Errors since the start</h2>
    <ul>${found.map(([code, times]) => html`<li><b>${count(times)}</b> ${headline(code)} <code>${code}</code></li>`)}</ul>
  </section>`;
}
