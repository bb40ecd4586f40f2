// Errors as sentences.
import { html } from "./html.js";
import { IconButton } from "./icons.js";

export function Problem({ error, children, onDismiss }) {
  return html`<div class="problem" role="alert">
    <p>
      <strong>${error.headline ?? "That did not work"}.</strong> ${error.message}
      ${error.code && html` <code>${error.code}</code>`}
    </p>
    ${children}
    ${onDismiss && html`<${IconButton} name="close" label="Dismiss" onClick=${onDismiss} />`}
  </div>`;
}
