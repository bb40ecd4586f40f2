// Line icons on a grid of 16. They are decoration: the button around one has the name.
import { html } from "./html.js";

const PATHS = {
  ask: "M2.5 3h11v7.5h-6L4.5 13v-2.5h-2z",
  close: "M4 4l8 8M12 4l-8 8",
  download: "M8 2.5v7.5M4.8 7.2 8 10.4l3.2-3.2M3 13.5h10",
  link: "M6.8 9.2 9.2 6.8M7.3 4.7l1.2-1.2a2.83 2.83 0 0 1 4 4l-1.2 1.2M8.7 11.3l-1.2 1.2a2.83 2.83 0 0 1-4-4l1.2-1.2",
  moon: "M13 9.5A5.5 5.5 0 0 1 6.5 3a5.5 5.5 0 1 0 6.5 6.5z",
  pin: "M6 2.5h4M7 2.5v4L4.5 9v1h7V9L9 6.5v-4M8 10v3.5",
  plus: "M8 3v10M3 8h10",
  retry: "M12.5 8A4.5 4.5 0 1 1 11 4.6M11.2 2v2.8H8.4",
  search: "M7 11.5a4.5 4.5 0 1 0 0-9 4.5 4.5 0 0 0 0 9zM10.4 10.4 13.5 13.5",
  sun: "M8 10.8a2.8 2.8 0 1 0 0-5.6 2.8 2.8 0 0 0 0 5.6zM8 1.5v1.6M8 12.9v1.6M1.5 8h1.6M12.9 8h1.6M3.4 3.4l1.1 1.1M11.5 11.5l1.1 1.1M12.6 3.4l-1.1 1.1M4.5 11.5l-1.1 1.1",
  trash: "M3 4.5h10M6 4.5v-2h4v2M4.5 4.5l.6 9h5.8l.6-9M6.8 7v4M9.2 7v4",
};

export function Icon({ name }) {
  return html`<svg class="icon" viewBox="0 0 16 16" aria-hidden="true"><path d=${PATHS[name]} /></svg>`;
}

export function IconButton({ name, label, ...rest }) {
  return html`<button type="button" class="icon-button" aria-label=${label} title=${label} ...${rest}>
    <${Icon} name=${name} />
  </button>`;
}
