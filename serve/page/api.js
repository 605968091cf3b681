// Calls to the service: the token, errors in the service's own words, and event streams.

const TOKEN = "unnoise-token";

/** A response that is an error. Its message is the service's own sentence. */
export class Refusal extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** Whether the service asked for a token in this tab. */
export const hasToken = () => sessionStorage.getItem(TOKEN) !== null;

let askToken = async () => null;

/** Set how a token is asked for: (sentence) → Promise of the token, or null. */
export function onToken(ask) {
  askToken = ask;
}

/** Fetch. Resolves with a response that is no error; rejects with a Refusal or an AbortError. */
export async function call(path, options = {}) {
  for (;;) {
    const token = sessionStorage.getItem(TOKEN);
    const headers = { ...options.headers, ...(token && { Authorization: `Bearer ${token}` }) };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      ended(error);
      throw new Refusal("The service cannot be reached. Check that it still runs, and try again.");
    }
    if (response.ok) return response;
    const sentence = await sentenceOf(response);
    if (response.status !== 401) throw new Refusal(sentence, response.status);
    const given = await askToken(sentence);
    if (!given) throw new Refusal(sentence, 401);
    // Other characters fit no header.
    if (/^[!-~]+$/.test(given)) sessionStorage.setItem(TOKEN, given);
  }
}

async function sentenceOf(response) {
  try {
    const problem = await response.json();
    if (problem.detail) return problem.detail;
  } catch {
    // A proxy in between may answer with HTML.
  }
  return `The service responded with ${response.status} ${response.statusText}.`;
}

function ended(error) {
  if (error.name === "AbortError") throw error;
  return { done: true };
}

/** Yield the events of a stream as {name, data}. Comments, which keep it alive, are left out. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch(ended);
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const name = part.match(/^event: (.*)$/m)?.[1];
      const data = part.match(/^data: (.*)$/m)?.[1];
      if (name && data) yield { name, data: JSON.parse(data) };
    }
  }
}

/**
 * Follow a run to its end.
 *
 * onEvent is awaited, so a page that draws slowly reads slowly; the service then skips previews.
 * Resolves with the data of `done`.
 */
export async function follow(response, onEvent) {
  for await (const { name, data } of events(response)) {
    if (name === "error") throw new Refusal(data.detail, data.status);
    if (name === "done") return data;
    await onEvent(name, data);
  }
  throw new Refusal("The connection ended before the result came. Try again.");
}

/**
 * Return an object as JSON. Seeds are strings of digits here: they go up to 2^64 - 1, where a
 * number of JavaScript would be rounded.
 */
export function toJson(value) {
  return JSON.stringify(value).replace(
    /"(seed|first|last)":"(\d+)"/g,
    (_, name, digits) => `"${name}":${BigInt(digits)}`,
  );
}
