// Dark or light: the system's choice until somebody chooses here.
import { Store } from "./store.js";

const NAME = "f2l-theme";
const system = matchMedia("(prefers-color-scheme: dark)");

export const theme = new Store({ chosen: localStorage.getItem(NAME) });

export function isDark() {
  return theme.value.chosen ? theme.value.chosen === "dark" : system.matches;
}

export function switchTheme() {
  const chosen = isDark() ? "light" : "dark";
  localStorage.setItem(NAME, chosen);
  theme.set({ chosen });
}

function show() {
  document.documentElement.dataset.theme = theme.value.chosen ?? "";
}

theme.subscribe(show);
system.addEventListener("change", () => theme.set({}));
show();
