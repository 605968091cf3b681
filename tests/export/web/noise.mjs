// Standard input: [{"seed": "0", "stream": 0, "step": "0", "count": 4}, …]. Standard output: the
// noise of all of them, as float32. Argument: noise.js.
import { readFileSync, writeSync } from "node:fs";

const { noise } = await import(process.argv[2]);
for (const { seed, stream, step, count } of JSON.parse(readFileSync(0, "utf8"))) {
  const values = noise(BigInt(seed), stream, BigInt(step), count);
  const bytes = new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
  for (let sent = 0; sent < bytes.length; ) sent += writeSync(1, bytes, sent);
}
