// The page: which part is shown, and what stands around it.
import { about, learn } from "./about.js";
import { lose, session, useKey } from "./api.js";
import { Ask } from "./ask.js";
import { Confirm } from "./confirm.js";
import { DropZone } from "./drop.js";
import { Gallery } from "./gallery.js";
import { html, render, useEffect, useRef, useState } from "./html.js";
import { IconButton } from "./icons.js";
import { close, open } from "./library.js";
import { Live } from "./live.js";
import { forget } from "./pictures.js";
import { useStore } from "./store.js";
import { isDark, switchTheme, theme } from "./theme.js";

const PAGES = [["", "Videos"], ["ask", "Ask"], ["live", "Live"], ["server", "Server"]];

function useRoute() {
  const read = () => location.hash.replace(/^#\/?/, "").split("/");
  const [route, setRoute] = useState(read);
  useEffect(() => {
    const change = () => setRoute(read());
    addEventListener("hashchange", change);
    return () => removeEventListener("hashchange", change);
  }, []);
  return route;
}

function App() {
  const { tries, isRefused, isAway } = useStore(session);
  const [page, argument = ""] = useRoute();
  const main = useRef(null);
  useEffect(() => {
    if (isAway) return undefined;
    learn().then(open, (error) => error.status === 401 || lose());
    return () => {
      close();
      forget();
    };
  }, [tries, isAway]);
  useEffect(() => {
    document.title = `${PAGES.find(([name]) => name === page)?.[1] ?? "Videos"} · f2l-vllm`;
    main.current?.scrollTo(0, 0);
  }, [page]);
  const ids = decodeURIComponent(argument).split(",").filter(Boolean);
  return html`
    <${Header} page=${page} />
    ${isAway && html`<p class="away" role="status">The server does not answer. This page goes on as soon as it is back.</p>`}
    <main ref=${main} data-scroller tabindex="0">
      ${isRefused ? html`<${KeyForm} />`
        : page === "ask" ? html`<${Ask} ids=${ids} />`
        : page === "live" ? html`<${Live} id=${ids[0]} />`
        : page === "server" ? html`<${Later} />`
        : html`<${Gallery} />`}
    </main>
    <${DropZone} />
    <${Confirm} />
  `;
}

// The server's page has the plots, which most visits do not need.
function Later() {
  const [Page, setPage] = useState(null);
  useEffect(() => void import("./operator.js").then(({ Operator }) => setPage(() => Operator)), []);
  return Page && html`<${Page} />`;
}

function Header({ page }) {
  const { model } = useStore(about);
  const { key, isAway } = useStore(session);
  useStore(theme);
  return html`<header class="top">
    <a class="mark" href="#/"><b>f2l</b> <span>vllm</span></a>
    <nav aria-label="Pages">
      ${PAGES.map(([name, text]) => html`<a href=${`#/${name}`} aria-current=${name === page ? "page" : undefined}>${text}</a>`)}
    </nav>
    <span class=${`model ${isAway ? "is-away" : ""}`} dir="auto">${model}</span>
    ${key && html`<button type="button" class="small" onClick=${() => useKey("")}>Forget the key</button>`}
    <${IconButton} name=${isDark() ? "sun" : "moon"} label=${isDark() ? "Light colours" : "Dark colours"} onClick=${switchTheme} />
  </header>`;
}

function KeyForm() {
  const [value, setValue] = useState("");
  const input = useRef(null);
  useEffect(() => input.current.focus(), []);
  const { key } = useStore(session);
  const submit = (event) => {
    event.preventDefault();
    useKey(value.trim());
  };
  return html`<form class="key" onSubmit=${submit}>
    <h1>This server needs a key</h1>
    <p>The one that its clients send. It stays in this tab until you close it.</p>
    <label>Key <input ref=${input} type="password" autocomplete="off" value=${value} onInput=${(event) => setValue(event.target.value)} /></label>
    <button type="submit" class="primary" disabled=${!value.trim()}>Open</button>
    ${key && html`<p role="alert">The server does not know this key.</p>`}
  </form>`;
}

const root = document.getElementById("app");
root.replaceChildren();
render(html`<${App} />`, root);
