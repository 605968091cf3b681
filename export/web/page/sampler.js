// One sample at a time: the loop of runtime/engine, over programs that Python has computed.

import { noise, Stream } from "./noise.js";

const CALL = 6;
const GUIDANCE = 5; // its column in `call`

export class Sampler {
  /**
   * model: the value of model.json. table: programs.bin, as Float32Array. graphs: an object with
   * `plain` and `guided`, which return a promise of a session each.
   */
  constructor(ort, model, table, graphs) {
    this.ort = ort;
    this.model = model;
    this.table = table;
    this.graphs = graphs;
    this.size = model.shape.reduce((a, b) => a * b, 1);
  }

  /** The program of a solver with so many steps. */
  program(solver, steps) {
    const found = this.model.programs.find((p) => p.solver === solver && p.steps === steps);
    if (!found) throw new Error(`the site has no program of ${steps} steps of ${solver}`);
    return found;
  }

  /**
   * Returns x, float32 of the sample's shape. seed: a BigInt. label: a number or null.
   * onStep(row, rows, denoised, x) may return false, which ends the sample: the result is null.
   */
  async sample({ seed, label, solver, steps, guidance }, onStep) {
    const { registers: R, null_label: nullLabel, shape } = this.model;
    const program = this.program(solver, steps);
    const width = CALL + R * (R + 2);
    // The null label is not guided: its two predictions are one.
    const isNull = label === null || label === undefined;
    if (!isNull && !(label in this.model.labels)) throw new Error(`the model has no label ${label}`);
    const scale = isNull ? 1 : Math.fround(guidance ?? 1);
    const session = await (scale === 1 ? this.graphs.plain() : this.graphs.guided());
    let state = new Float32Array(R * this.size);
    const first = noise(seed, Stream.INITIAL, 0, this.size);
    for (let i = 0; i < this.size; i++) state[i] = program.start * first[i];
    const zeros = new Float32Array(this.size);
    const number = BigInt(isNull ? (nullLabel ?? 0) : label);
    for (let row = 0; row < program.rows; row++) {
      const offset = program.offset + row * width;
      const call = this.table.slice(offset, offset + CALL);
      call[GUIDANCE] = scale;
      const update = this.table.slice(offset + CALL, offset + width);
      const isNoisy = program.noisy[row] === "1";
      const z = isNoisy ? noise(seed, Stream.STEP, row, this.size) : zeros;
      const result = await this.run(session, {
        state: this.floats(state, [1, R, ...shape]),
        noise: this.floats(z, [1, ...shape]),
        call: this.floats(call, [1, CALL]),
        update: this.floats(update, [1, R, R + 2]),
        label: new this.ort.Tensor("int64", BigInt64Array.of(number), [1]),
      });
      state = result.next_state;
      const x = state.subarray(0, this.size);
      if (onStep && (await onStep(row + 1, program.rows, result.denoised, x)) === false) return null;
    }
    return state.slice(0, this.size);
  }

  /** Run a graph with the inputs that it has. */
  async run(session, inputs) {
    const feeds = {};
    for (const name of session.inputNames) feeds[name] = inputs[name];
    const outputs = await session.run(feeds);
    return { next_state: outputs.next_state.data, denoised: outputs.denoised.data };
  }

  floats(data, dims) {
    return new this.ort.Tensor("float32", data, dims);
  }

  /** Pixels of a sample, as RGBA bytes for a canvas. */
  pixels(x) {
    const [channels, height, width] = this.model.shape;
    const [least, most] = this.model.range;
    const area = height * width;
    const rgba = new Uint8ClampedArray(4 * area).fill(255);
    for (let i = 0; i < area; i++) {
      for (let c = 0; c < 3; c++) {
        const value = (x[(c % channels) * area + i] - least) / (most - least);
        rgba[4 * i + c] = roundEven(Math.min(1, Math.max(0, value)) * 255);
      }
    }
    return rgba;
  }
}

/** Round to the nearest, halves to even, as numpy does. */
function roundEven(value) {
  const whole = Math.round(value);
  return whole - value === 0.5 && whole % 2 ? whole - 1 : whole;
}

/** The sessions of a site's graphs, each made when it is first needed. */
export function graphsOf(ort, options, read) {
  const made = {};
  let shared = null; // the weights, which both graphs use
  async function open(name) {
    shared ??= read("weights.bin");
    const [graph, weights] = await Promise.all([read(name), shared]);
    return ort.InferenceSession.create(graph, {
      ...options,
      externalData: [{ path: "weights.bin", data: weights }],
    });
  }
  const forget = (name) => (error) => {
    made[name] = shared = null; // so that a later call fetches again
    throw error;
  };
  const session = (name) => (made[name] ??= open(name).catch(forget(name)));
  return { plain: () => session("step.onnx"), guided: () => session("step_guided.onnx") };
}
