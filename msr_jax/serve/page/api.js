// The HTTP API, as the page uses it.

async function answer(response) {
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const error = new Error(typeof body.detail === "string" ? body.detail : `the server answered ${response.status}`);
  throw Object.assign(error, { status: response.status });
}

export async function models() {
  return (await answer(await fetch("/api/models"))).json();
}

// Fields: file or source (the id of a job whose song to take again), model, refine, steps. `progress` gets 0 to 1. Fails where
// `signal`, of an AbortController, ends it.
export function createJob(fields, progress, signal) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) if (value !== null && value !== undefined) form.append(name, value);
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(); // fetch does not tell how much is sent
    request.open("POST", "/api/jobs");
    request.responseType = "json";
    request.upload.onprogress = (event) => event.lengthComputable && progress(event.loaded / event.total);
    request.onerror = () => reject(new Error("the server could not be reached, is busy, or the file is too large for it"));
    request.onabort = () => reject(new Error("it was cancelled"));
    signal.addEventListener("abort", () => request.abort());
    request.onload = () => {
      if (request.status === 202) resolve(request.response);
      else reject(new Error(request.response?.detail ?? `the server answered ${request.status}`));
    };
    request.send(form);
  });
}

// Calls `changed` with each new state of a job, `interrupted` while the server cannot be reached, `lost` when it does not know the
// job; returns what stops that.
export function watch(id, changed, interrupted, lost) {
  const events = new EventSource(`/api/jobs/${id}`);
  events.onmessage = (event) => {
    const job = JSON.parse(event.data);
    if (job.state === "done" || job.state === "failed") events.close();
    changed(job);
  };
  events.onerror = () => {
    if (events.readyState === EventSource.CLOSED) lost();
    else interrupted(); // the browser tries again by itself
  };
  return () => events.close();
}

// A server that does not hear of it removes the job when its time is over.
export function removeJob(id) {
  return fetch(`/api/jobs/${id}`, { method: "DELETE" }).catch(() => {});
}

export const fileUrl = (id, track, suffix) => `/api/jobs/${id}/${encodeURIComponent(track)}.${suffix}`;
export const zipUrl = (id, suffix) => `/api/jobs/${id}/stems.zip?format=${suffix}`;
export const mixUrl = (id, gains, suffix) =>
  `/api/jobs/${id}/mixdown.${suffix}?gains=${encodeURIComponent(Object.entries(gains).map(([t, g]) => `${t}:${g.toFixed(4)}`).join(","))}`;

// Samples [start, start + frames) of a track: one Float32Array per channel, as many as are there.
export async function samples(id, track, start, frames) {
  const url = `${fileUrl(id, track, "wav")}?start=${start}&frames=${frames}`;
  const data = new DataView(await (await answer(await fetch(url))).arrayBuffer());
  const channels = data.getUint16(22, true);
  const at = 56; // the server's pieces have one form: RIFF, fmt, fact, data
  const length = data.getUint32(52, true) / 4 / channels;
  const interleaved = new Float32Array(data.buffer, at, length * channels);
  return Array.from({ length: channels }, (_, c) => {
    const own = new Float32Array(length);
    for (let i = 0; i < length; i++) own[i] = interleaved[i * channels + c];
    return own;
  });
}

// Columns of a track's picture from `start` on: a Uint8Array of `2 + bands` bytes a column.
export async function columns(id, track, start) {
  const response = await answer(await fetch(`${fileUrl(id, track, "view")}?start=${start}`));
  return {
    bytes: new Uint8Array(await response.arrayBuffer()),
    samples: Number(response.headers.get("x-column-samples")),
    bands: Number(response.headers.get("x-column-bands")),
  };
}
