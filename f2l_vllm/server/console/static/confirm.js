// A question before something is lost. The dialog is the browser's: it keeps the focus and closes with Escape.
import { html, useEffect, useRef } from "./html.js";
import { Store, useStore } from "./store.js";

const open = new Store({ question: null });

export function ask(title, text, verb) {
  return new Promise((resolve) => open.set({ question: { title, text, verb, resolve } }));
}

export function Confirm() {
  const { question } = useStore(open);
  const dialog = useRef(null);
  useEffect(() => {
    if (question) dialog.current.showModal();
  }, [question]);
  if (!question) return null;
  const end = (answer) => {
    question.resolve(answer);
    open.set({ question: null });
  };
  return html`<dialog ref=${dialog} aria-labelledby="confirm-title" onCancel=${() => end(false)}>
    <h2 id="confirm-title" dir="auto">${question.title}</h2>
    <p>${question.text}</p>
    <div class="buttons">
      <button type="button" onClick=${() => end(false)}>Cancel</button>
      <button type="button" class="danger" onClick=${() => end(true)}>${question.verb}</button>
    </div>
  </dialog>`;
}
