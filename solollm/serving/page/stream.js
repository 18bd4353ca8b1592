// The server's API: what it offers, and one answer as it comes.

/** An answer that the server refused or broke off. */
class Refused extends Error {}

/** The models offered: [{id, chat, ...}]. */
async function offeredModels() {
  const answer = await fetch("/v1/models");
  if (!answer.ok) throw new Refused(await reason(answer));
  return (await answer.json()).data;
}

async function reason(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the server answered ${answer.status}`;
  }
}

/** Yields {text, finish, usage} as they come; any may be missing. Throws Refused. */
async function* streamAnswer(request, signal) {
  const route = request.messages ? "/v1/chat/completions" : "/v1/completions";
  const answer = await fetch(route, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!answer.ok) throw new Refused(await reason(answer));
  for await (const data of events(answer.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(chunk.error.message);
    const choice = chunk.choices[0];
    const text = choice?.delta?.content ?? choice?.text;
    yield { text, finish: choice?.finish_reason, usage: chunk.usage };
  }
  throw new Refused("the connection was lost before the answer ended");
}

/** The data of server-sent events. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (held + value).split("\n\n");
      held = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
    }
  } finally {
    reader.cancel().catch(() => {}); // it may have been aborted already
  }
}
