// The picker in a notebook (anywidget): asks Python instead of a server.
import { Picker } from "./picker.js";

const LOOK_MS = 2000;

function source(model) {
  const open = new Map();
  let next = 0, timer = 0, seen = -1;
  const answered = (reply, buffers) => {
    const { resolve, reject } = open.get(reply.id) || {};
    open.delete(reply.id);
    if (reply.error) reject?.(Object.assign(new Error(reply.error), { status: reply.status }));
    else resolve?.([reply.result, buffers]);
  };
  model.on("msg:custom", answered);
  const call = (name, given = null) => new Promise((resolve, reject) => {
    const id = next++;
    open.set(id, { resolve, reject });
    model.send({ id, call: name, given });
  });
  return {
    async picture(step) {
      const [{ height, width }, [data]] = await call("picture", step);
      return { height, width, bytes: new Uint8Array(data.buffer, data.byteOffset, data.byteLength) };
    },
    async picks() {
      const [info] = await call("picks");
      seen = info.version;
      return info;
    },
    send: async (ops) => (await call("send", ops))[0],
    freeze: async () => (await call("freeze"))[0],
    onChange(handle) {
      timer = setInterval(async () => {
        if ((await call("version"))[0] !== seen) handle();
      }, LOOK_MS);
    },
    close() {
      clearInterval(timer);
      model.off("msg:custom", answered);
    },
  };
}

export default {
  render({ model, el }) {
    const from = source(model), picker = new Picker(el, from);
    el.picker = picker;
    el.addEventListener("refused", (event) => (picker.queue.trouble = event.detail));
    picker.open().then(() => (el.dataset.ready = "yes"), (error) => (el.textContent = error.message));
    return () => from.close();
  },
};
