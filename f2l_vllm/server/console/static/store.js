// A value that several parts of the page show.
import { useEffect, useReducer } from "./html.js";

export class Store {
  #listeners = new Set();

  constructor(value) {
    this.value = value;
  }

  // Changes fields of the value, and tells everybody who shows it.
  set(fields) {
    this.value = { ...this.value, ...fields };
    for (const listener of [...this.#listeners]) listener();
  }

  subscribe(listener) {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }
}

export function useStore(store) {
  const [, again] = useReducer((count) => count + 1, 0);
  useEffect(() => store.subscribe(again), [store]);
  return store.value;
}
