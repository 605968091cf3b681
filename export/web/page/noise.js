// The noise of unnoise: the same float32 bits as runtime/diffusion/noise.py, see docs/noise.md.
// Every operation below is one of IEEE 754's, and their order is that of the original.

export const Stream = { INITIAL: 0, STEP: 1, ENCODE: 2 };

const MULTIPLIERS = [0xd2e7470ee14c6c93n, 0xca5a826395121157n];
const WEYL = [0x9e3779b97f4a7c15n, 0xbb67ae8584caa73bn];
const ROUNDS = 10;
const LN2 = 0.6931471805599453;
const QUARTER_TURN = 0.5 * Math.PI;
const ATANH = [];
const COS = [];
const SIN = [];
for (let k = 9; k >= 0; k--) ATANH.push(1 / (2 * k + 1));
for (let k = 7; k >= 0; k--) {
  const sign = k % 2 ? -1 : 1;
  COS.push(sign / factorial(2 * k));
  SIN.push(sign / factorial(2 * k + 1));
}

/**
 * Standard normal noise: `count` float32 values for a seed (BigInt, below 2^64), a stream and a
 * step.
 */
export function noise(seed, stream, step, count) {
  const pairs = Math.ceil(count / 2);
  const result = new Float32Array(2 * pairs);
  const words = new Uint32Array(8); // a block: four words of 64 bits, low half first
  const keys = schedule(BigInt(seed), BigInt(stream));
  const stepHalves = halves(BigInt(step));
  for (let pair = 0; pair < pairs; pair++) {
    const place = (pair & 1) * 4;
    if (place === 0) philox(words, (pair >> 1) + 1, stepHalves, keys);
    const u = unit(words[place + 1], words[place]);
    const v = unit(words[place + 3], words[place + 2]);
    const radius = Math.sqrt(-2 * log(u));
    // cos and sin of a quarter of the angle, doubled twice.
    const quarter = (v - 0.5) * QUARTER_TURN;
    const square = quarter * quarter;
    let cos = polynomial(square, COS);
    let sin = polynomial(square, SIN) * quarter;
    for (let i = 0; i < 2; i++) {
      const twice = sin * 2;
      const next = 1 - sin * twice;
      sin = cos * twice;
      cos = next;
    }
    result[2 * pair] = radius * cos;
    result[2 * pair + 1] = radius * sin;
  }
  return result.subarray(0, count);
}

/** (the upper 52 bits of a word + 1/2) / 2^52, exact in float64. */
function unit(high, low) {
  return (high * 2 ** 20 + (low >>> 12) + 0.5) * 2 ** -52;
}

const float = new Float64Array(1);
const bits = new Int32Array(float.buffer); // low half first on every machine that has a browser
const LOWEST = 0x3fe80000; // the upper half of 0.75, whose lower half is 0

/** ln p = e ln 2 + 2 atanh((m - 1) / (m + 1)) for p = m 2^e, with m in [3/4, 3/2). */
function log(p) {
  float[0] = p;
  const exponent = (bits[1] - LOWEST) >> 20;
  bits[1] -= exponent << 20;
  const m = float[0];
  const s = (m - 1) / (m + 1);
  return s * 2 * polynomial(s * s, ATANH) + exponent * LN2;
}

function polynomial(x, coefficients) {
  let y = coefficients[0];
  for (let i = 1; i < coefficients.length; i++) y = y * x + coefficients[i];
  return y;
}

function factorial(n) {
  return n < 2 ? 1 : n * factorial(n - 1);
}

// --- Philox4x64-10 (Salmon et al. 2011), in halves of 32 bits: BigInt takes twice the time.

function halves(word) {
  return [Number(word & 0xffffffffn), Number((word >> 32n) & 0xffffffffn)];
}

const [[M0, M0_HIGH], [M1, M1_HIGH]] = MULTIPLIERS.map(halves);

/** The keys of all rounds, as halves. */
function schedule(first, second) {
  const keys = new Uint32Array(4 * ROUNDS);
  for (let round = 0; round < ROUNDS; round++) {
    const pair = [first + BigInt(round) * WEYL[0], second + BigInt(round) * WEYL[1]];
    keys.set(pair.flatMap(halves), 4 * round);
  }
  return keys;
}

const low = new Uint32Array(2); // the lower word of a product
const high = new Uint32Array(2); // the upper word

/** Fill `words` with a block. */
function philox(words, counter, step, keys) {
  let x0 = counter >>> 0;
  let x0High = Math.floor(counter / 2 ** 32);
  let x1 = step[0];
  let x1High = step[1];
  let x2 = 0;
  let x2High = 0;
  let x3 = 0;
  let x3High = 0;
  for (let round = 0; round < 4 * ROUNDS; round += 4) {
    multiply(M0, M0_HIGH, x0, x0High);
    const y3 = low[0];
    const y3High = low[1];
    const y2 = high[0] ^ x3 ^ keys[round + 2];
    const y2High = high[1] ^ x3High ^ keys[round + 3];
    multiply(M1, M1_HIGH, x2, x2High);
    x0 = (high[0] ^ x1 ^ keys[round]) >>> 0;
    x0High = (high[1] ^ x1High ^ keys[round + 1]) >>> 0;
    x1 = low[0];
    x1High = low[1];
    x2 = y2 >>> 0;
    x2High = y2High >>> 0;
    x3 = y3;
    x3High = y3High;
  }
  words[0] = x0;
  words[1] = x0High;
  words[2] = x1;
  words[3] = x1High;
  words[4] = x2;
  words[5] = x2High;
  words[6] = x3;
  words[7] = x3High;
}

/** (high, low) = a · b, for words of 64 bits given as halves. */
function multiply(a, aHigh, b, bHigh) {
  const middle = upper(a, b) + (Math.imul(a, bHigh) >>> 0) + (Math.imul(aHigh, b) >>> 0);
  low[0] = Math.imul(a, b);
  low[1] = middle;
  const rest =
    upper(a, bHigh) + upper(aHigh, b) + (Math.imul(aHigh, bHigh) >>> 0) + Math.floor(middle / 2 ** 32);
  high[0] = rest;
  high[1] = upper(aHigh, bHigh) + Math.floor(rest / 2 ** 32);
}

/** The upper 32 bits of a product of 32-bit numbers, from parts of 16 bits. */
function upper(a, b) {
  const al = a & 0xffff;
  const ah = a >>> 16;
  const bl = b & 0xffff;
  const bh = b >>> 16;
  const cross = ah * bl + ((al * bl) >>> 16);
  return ah * bh + Math.floor((al * bh + (cross & 0xffff)) / 65536) + Math.floor(cross / 65536);
}
