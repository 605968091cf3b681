// Standard input: requests as JSON. Standard output: their samples, as float32, and their pixels.
// Argument: the folder of a site.
import { readFileSync, writeSync } from "node:fs";
import { pathToFileURL } from "node:url";

const site = process.argv[2];
const file = (name) => pathToFileURL(`${site}/${name}`).href;
const { graphsOf, Sampler } = await import(file("sampler.js"));
const ort = await import(file("ort/ort.wasm.min.mjs"));
ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmBinary = readFileSync(`${site}/ort/ort-wasm-simd-threaded.wasm`);
ort.env.wasm.wasmPaths = { mjs: file("ort/ort-wasm-simd-threaded.mjs") };
const read = async (name) => new Uint8Array(readFileSync(`${site}/${name}`));
const model = JSON.parse(readFileSync(`${site}/model.json`, "utf8"));
const table = new Float32Array((await read("programs.bin")).buffer);
const sampler = new Sampler(ort, model, table, graphsOf(ort, {}, read));

function write(values) {
  const bytes = new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
  for (let sent = 0; sent < bytes.length; ) sent += writeSync(1, bytes, sent);
}

for (const request of JSON.parse(readFileSync(0, "utf8"))) {
  const x = await sampler.sample({ ...request, seed: BigInt(request.seed) });
  write(x);
  write(sampler.pixels(x));
}
