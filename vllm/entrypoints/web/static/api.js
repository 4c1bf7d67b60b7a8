// What the page asks the server, and the keys that it may need. Paths are relative: a proxy may serve us under a prefix.

const STORED = { user: "api-key", admin: "admin-key" };

/** Keys live as long as the tab. */
export const keys = {
  get: (kind) => sessionStorage.getItem(STORED[kind]) ?? "",
  set: (kind, key) => (key ? sessionStorage.setItem(STORED[kind], key) : sessionStorage.removeItem(STORED[kind])),
};

/** An answer that is an error: `status`, and the server's own line as `message`. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Asks with the key of a kind; the other one will do where there is only that. */
export async function ask(path, { kind = "user", method = "GET", body, signal } = {}) {
  const key = keys.get(kind) || keys.get(kind === "user" ? "admin" : "user");
  const headers = body === undefined ? {} : { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  if (response.ok) return response;
  const text = await response.text();
  let message = text;
  try {
    const error = JSON.parse(text).error;
    message = typeof error === "string" ? error : error.message;
  } catch {
    // Not an answer of this server, but of something before it.
  }
  throw new ApiError(response.status, message || `HTTP ${response.status}`);
}

export const askJson = async (path, options) => (await ask(path, options)).json();

/** `/metrics` as {name: [{labels, value}]}. */
export async function metrics() {
  const found = {};
  for (const line of (await (await ask("metrics")).text()).split("\n")) {
    const match = /^([\w:]+)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!match || line.startsWith("#")) continue;
    const labels = Object.fromEntries([...(match[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map((m) => [m[1], m[2]]));
    (found[match[1]] ??= []).push({ labels, value: Number(match[3]) });
  }
  return found;
}

/** The sum of a metric over the samples whose labels have these values. */
export const sum = (found, name, labels = {}) =>
  (found[name] ?? [])
    .filter((sample) => Object.entries(labels).every(([key, value]) => sample.labels[key] === value))
    .reduce((total, sample) => total + sample.value, 0);

/** The events of a stream, as parsed JSON. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}
