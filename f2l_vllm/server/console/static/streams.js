// The caller's live streams, and one of them as it changes.
import { call, eventsOf, json, post, session } from "./api.js";
import { useEffect, useState } from "./html.js";
import { useStore } from "./store.js";

const AGAIN_MS = 3000;
const path = (id) => `v1/streams/${encodeURIComponent(id)}`;

export const begin = async (given) => (await post("v1/streams", given)).json();
export const end = (id) => call(`${path(id)}/end`, { method: "POST" });
export const remove = (id) => call(path(id), { method: "DELETE" });
export const named = (stream) => stream.name || stream.id;

// What `work` shows, as fields or as a function of those shown, which is done again after a while until it is over: while the server is there, and anew for another `id`.
export function useAgain(work, id) {
  const { isAway } = useStore(session);
  const [state, setState] = useState({});
  useEffect(() => {
    if (isAway) return undefined;
    const life = new AbortController();
    let timer;
    const show = (fields) => life.signal.aborted || setState((now) => ({ ...now, error: null, ...(typeof fields === "function" ? fields(now) : fields) }));
    const again = async () => {
      const isOver = await work(show, life.signal).catch((error) => {
        show({ error });
        return error.status === 404;
      });
      if (!isOver && !life.signal.aborted) timer = setTimeout(again, AGAIN_MS);
    };
    again();
    return () => {
      life.abort();
      clearTimeout(timer);
    };
  }, [id, isAway]);
  return state;
}

// `list`: the newest; `hasMore`: whether there are others. `number` is another when it is to be read at once.
export function useStreams(number) {
  return useAgain(async (show, signal) => {
    const { data, has_more: hasMore } = await json("v1/streams?limit=100", { signal });
    show({ list: data, hasMore });
  }, number);
}

// `stream`, and `at`, when it was told.
export function useStream(id) {
  return useAgain(async (show, signal) => {
    for await (const event of eventsOf(await call(`${path(id)}/events`, { signal }))) {
      if (event === "[DONE]") return true;
      const stream = JSON.parse(event);
      if (!stream.error) show({ stream, at: Date.now() });
    }
    return false;
  }, id);
}
