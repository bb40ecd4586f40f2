// The videos that the next question is about.
import { Store } from "./store.js";

export const chosen = new Store({ set: new Set() });

export function toggle(id) {
  const set = new Set(chosen.value.set);
  if (!set.delete(id)) set.add(id);
  chosen.set({ set });
}

export function unchoose(id) {
  if (chosen.value.set.has(id)) toggle(id);
}
