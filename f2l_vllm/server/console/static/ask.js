// The page that asks about one or several videos.
import { about } from "./about.js";
import { session } from "./api.js";
import { html, useEffect, useRef, useState } from "./html.js";
import { find, hasFailed, isReady, library } from "./library.js";
import { Problem } from "./notice.js";
import { Question } from "./answer.js";
import { ask, isStream, questions } from "./question.js";
import { chosen } from "./selection.js";
import { useStore } from "./store.js";
import { Timeline } from "./timeline.js";

export function Ask({ ids }) {
  const { files } = useStore(library);
  const list = useStore(questions).list.filter((one) => !isStream(one));
  const { isAway } = useStore(session);
  const { max_videos: most = 1 } = useStore(about);
  const [others, setOthers] = useState({}); // files that the list has not read yet, by id; or what was said of them
  const [spans, setSpans] = useState({});
  const wanted = ids.join();
  useEffect(() => {
    for (const id of ids) {
      if (library.value.files.has(id)) continue;
      const keep = (found) => setOthers((now) => ({ ...now, [id]: found }));
      find(id).then(keep, keep);
    }
    if (ids.length) chosen.set({ set: new Set(ids) });
  }, [wanted, isAway]);
  const known = ids.map((id) => files.get(id) ?? others[id]).filter(Boolean);
  const problems = known.filter((one) => one instanceof Error);
  const here = known.filter((one) => !(one instanceof Error));
  if (!ids.length) {
    return html`<div class="ask"><h1>Ask</h1><p class="lead">Choose the videos first.</p>
      <p><a class="button primary" href="#/">Choose videos</a></p>${list.map((one) => html`<${Question} key=${one.number} one=${one} />`)}</div>`;
  }
  const leave = (id) => () => (location.hash = `#/ask/${ids.filter((other) => other !== id).join()}`);
  return html`<div class="ask">
    <h1 class="unseen">Ask</h1>
    ${problems.map((error) => html`<${Problem} error=${error} />`)}
    ${here.map((file) => html`<${Timeline} key=${file.id} file=${file} span=${spans[file.id]}
      onSpan=${(span) => setSpans({ ...spans, [file.id]: span })} onLeave=${ids.length > 1 && leave(file.id)} />`)}
    ${here.filter(hasFailed).map((file) => html`<${Problem} error=${{ ...file.f2l.error, headline: `${file.filename} could not be read` }} />`)}
    <${Form} files=${here} isFinding=${known.length < ids.length} spans=${spans} tooMany=${ids.length > most && most} />
    ${list.map((one) => html`<${Question} key=${one.number} one=${one} />`)}
  </div>`;
}

// `isFinding`: not all files are known yet. A question asked until then is about all of them, once they are.
function Form({ files, isFinding, spans, tooMany }) {
  const [text, setText] = useState("");
  const [isHeld, setHeld] = useState(false);
  const [compare, setCompare] = useState(true);
  const input = useRef(null);
  useEffect(() => input.current?.focus(), []);
  const ready = files.length > 0 && files.every(isReady);
  const cannot = !text.trim() || Boolean(tooMany) || (!files.length && !isFinding);
  const send = () => {
    setHeld(isFinding && !cannot);
    if (isFinding || cannot) return;
    const cut = Object.fromEntries(files.filter((file) => spans[file.id]).map((file) => [file.id, spans[file.id]]));
    ask(text.trim(), files, cut, compare ? ["adapter", "frames"] : ["adapter"]);
    setText("");
  };
  const submit = (event) => {
    event.preventDefault();
    send();
  };
  useEffect(() => {
    if (isHeld) send();
  }, [isHeld, isFinding]);
  const isCut = files.some((file) => spans[file.id]);
  return html`<form class="asking" onSubmit=${submit}>
    <input ref=${input} type="text" dir="auto" autocomplete="off" aria-label="Question" value=${text} disabled=${Boolean(tooMany)}
      placeholder=${files.length > 1 ? "Ask about these videos" : "Ask about this video"} onInput=${(event) => setText(event.target.value)} />
    <button type="submit" class="primary" disabled=${cannot}>Ask</button>
    <label><input type="checkbox" checked=${compare} onChange=${(event) => setCompare(event.target.checked)} /> Beside it, the answer from the frames${isCut ? " (of whole videos)" : ""}</label>
    <a href="#/">Add a video</a>
    ${tooMany && html`<p class="hint">One question takes at most ${tooMany} videos here.</p>`}
    ${!ready && files.length > 0 && html`<p class="hint" role="status">Not everything is read yet: a question waits for it.</p>`}
  </form>`;
}
