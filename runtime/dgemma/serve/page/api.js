// The server's API. The key stays in this module's memory.

let key = null;
let wanted = null; // what asks a person for a key

export class Failure extends Error {
  constructor(message, { status = 0, retry = 0, code = null } = {}) {
    super(message);
    Object.assign(this, { status, retry, code });
  }
}

export const onKeyWanted = (ask) => { wanted = ask; };

async function send(path, given) {
  const headers = { ...given.headers, ...(key === null ? {} : { Authorization: `Bearer ${key}` }) };
  try {
    return await fetch(path, { ...given, headers });
  } catch (failure) {
    if (failure.name === "AbortError") throw failure;
    throw new Failure("The server does not answer. Is dg-serve still running?");
  }
}

async function request(path, given = {}) {
  let response = await send(path, given);
  for (let tried = key !== null; response.status === 401 && wanted; tried = true) {
    key = await wanted(tried);
    response = await send(path, given);
  }
  if (response.ok) return response;
  let error = {};
  try { ({ error } = await response.json()); } catch { /* no JSON: the status says it */ }
  throw new Failure(error.message ?? `The server answered ${response.status}.`, {
    status: response.status,
    retry: Number(response.headers.get("Retry-After") ?? 0),
    code: error.code ?? null,
  });
}

export async function card() {
  const { data: [first] } = await (await request("/v1/models")).json();
  return first;
}

// The chunks of a stream, as they come. Raises a Failure for an error in their midst, or an end too early.
export async function* stream(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await request(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      let read;
      try {
        read = await reader.read();
      } catch (failure) {
        throw failure.name === "AbortError" ? failure : new Failure("The connection was lost before the answer’s end.");
      }
      if (read.done) throw new Failure("The connection was lost before the answer’s end.");
      const parts = (rest + read.value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.split("\n").find((line) => line.startsWith("data: "))?.slice(6);
        if (data === undefined) continue; // a comment: it goes on
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Failure(chunk.error.message, { code: chunk.error.code });
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
