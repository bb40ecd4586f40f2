// What the server says of itself.
import { json } from "./api.js";
import { Store } from "./store.js";

export const about = new Store({});

export async function learn() {
  about.set(await json("console/about"));
}
