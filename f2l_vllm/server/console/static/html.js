// Preact and htm as one module: `html` makes elements from templates, always as text and attributes, never as HTML.
import { h } from "./vendor/preact.js";
import htm from "./vendor/htm.js";

export { render } from "./vendor/preact.js";
export * from "./vendor/hooks.js";
export const html = htm.bind(h);
