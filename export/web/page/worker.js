// Samples off the page's thread, so that the page stays responsive. One request at a time.

import { graphsOf, Sampler } from "./sampler.js";

let sampler = null;
let cancelled = 0; // requests up to this number have been cancelled
let before = Promise.resolve(); // ends when the messages before have been dealt with

/** Fetch a file, and report how much of it has arrived. */
async function read(name) {
  const response = await fetch(`./${name}`);
  if (!response.ok) throw new Error(`${name} cannot be fetched (status ${response.status})`);
  const parts = [];
  let received = 0;
  const reader = response.body.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    parts.push(part.value);
    received += part.value.length;
    postMessage({ kind: "loading", name, received });
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

/** Open the model on a backend: "wasm", "webgpu", or "auto" for the best that there is. */
async function open(backend) {
  const model = await (await fetch("./model.json")).json();
  const table = new Float32Array((await read("programs.bin")).buffer);
  let error = null;
  for (const name of await choices(backend, model)) {
    try {
      const ort = await import(`./ort/ort.${name}.min.mjs`);
      ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
      // Threads need a page that is isolated from other origins, see `_headers`.
      ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
      ort.env.logLevel = "error";
      const graphs = graphsOf(ort, { executionProviders: [name] }, read);
      await graphs.plain();
      sampler = new Sampler(ort, model, table, graphs);
      return { model, backend: name, threads: ort.env.wasm.numThreads };
    } catch (failure) {
      error = failure;
    }
  }
  throw error;
}

async function choices(backend, model) {
  if (backend !== "auto") return [backend];
  const adapter = model.webgpu && navigator.gpu ? await navigator.gpu.requestAdapter() : null;
  return adapter ? ["webgpu", "wasm"] : ["wasm"];
}

async function sample(id, request) {
  if (id <= cancelled) return postMessage({ kind: "cancelled", id });
  const began = performance.now();
  const onStep = async (row, rows, denoised) => {
    postMessage({ kind: "step", id, row, rows, pixels: sampler.pixels(denoised) });
    // A task of its own, in which a message that cancels can arrive.
    await new Promise((resolve) => setTimeout(resolve));
    return id > cancelled;
  };
  const x = await sampler.sample(request, onStep);
  const ms = performance.now() - began;
  if (x === null) postMessage({ kind: "cancelled", id });
  else postMessage({ kind: "done", id, x, pixels: sampler.pixels(x), ms });
  return null;
}

onmessage = ({ data }) => {
  if (data.kind === "cancel") cancelled = data.id;
  // In turn: a session on a GPU cannot run twice at the same time.
  else before = before.then(() => act(data));
};

async function act(data) {
  try {
    if (data.kind === "open") postMessage({ kind: "opened", ...(await open(data.backend)) });
    else await sample(data.id, data.request);
  } catch (error) {
    postMessage({ kind: "failed", id: data.id, message: String(error?.message ?? error) });
  }
}
