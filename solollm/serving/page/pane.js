// One conversation with one model: its turns, how they are shown, and the answer under way.

const FINISHES = {
  length: "cut off at the token limit",
  content_filter: "ended by the guard",
};

class Pane {
  /** `settings()` gives the sampling and the system prompt as they are now; `changed()` hears of
   * answers that begin and end; `tell(text)` is read out. */
  constructor(models, model, { settings, changed, tell }) {
    this.turns = []; // {role, text, article, figures, note, error}
    this.models = models;
    this.abort = null;
    this.settings = settings;
    this.changed = changed;
    this.tell = tell;
    this.node = document.getElementById("pane-template").content.firstElementChild.cloneNode(true);
    this.log = this.node.querySelector(".log");
    this.empty = this.node.querySelector(".empty");
    this.select = this.node.querySelector(".model");
    this.select.append(...models.map(({ id }) => new Option(id, id, id === model, id === model)));
    this.select.addEventListener("change", () => this.refresh());
    this.node.addEventListener("click", (event) => this.clicked(event));
    this.refresh();
  }

  get model() {
    return this.models.find(({ id }) => id === this.select.value);
  }

  get isBusy() {
    return this.abort !== null;
  }

  get isChat() {
    const { mode } = this.settings();
    return mode === "auto" ? this.model.chat !== false : mode === "chat";
  }

  /** Show what depends on the model and the mode. */
  refresh() {
    this.node.setAttribute("aria-label", `Conversation with ${this.model.id}`);
    this.log.setAttribute("aria-label", `Messages, ${this.model.id}`);
    const what = this.isChat
      ? "Ask something. Nothing you write leaves this server."
      : "This model continues a text rather than answering: write how it begins.";
    this.empty.replaceChildren(element("strong", "", this.model.id), element("p", "", what));
    this.empty.hidden = this.turns.length > 0;
    for (const turn of this.turns) this.show(turn);
  }

  clear() {
    this.stop();
    this.turns = [];
    this.log.replaceChildren(this.empty);
    this.refresh();
  }

  stop() {
    this.abort?.abort();
  }

  /** Ask; `text` is the user's next turn. */
  ask(text) {
    this.add({ role: "user", text });
    return this.answer();
  }

  add(turn) {
    turn.article = document.getElementById("message-template").content.firstElementChild.cloneNode(true);
    turn.article.querySelector(".again").hidden = turn.role === "user";
    this.turns.push(turn);
    this.log.append(turn.article);
    this.empty.hidden = true;
    this.show(turn);
    this.log.scrollTop = this.log.scrollHeight;
    return turn;
  }

  /** Forget every turn from one on. */
  cutAt(turn) {
    for (const gone of this.turns.splice(this.turns.indexOf(turn))) gone.article.remove();
  }

  show(turn) {
    const { article, role, text } = turn;
    article.className = `message ${role}${this.isChat ? "" : " continued"}`;
    article.setAttribute("aria-label", role === "user" ? "You" : this.model.id);
    const place = article.querySelector(".text");
    const isMarkdown = role === "assistant" && this.isChat;
    place.replaceChildren(isMarkdown ? renderMarkdown(text) : text);
    if (turn.error) {
      const wrong = element("div", "wrong", turn.error);
      wrong.setAttribute("role", "alert");
      place.append(wrong);
    }
    article.querySelector(".figures").textContent = [turn.note, turn.figures].filter(Boolean).join(" · ");
  }

  request() {
    const { system, mode, ...sampling } = this.settings();
    const said = this.turns.filter(({ text }) => text);
    const body = { model: this.model.id, ...sampling };
    if (!this.isChat) return { ...body, prompt: said.map(({ text }) => text).join("") };
    const messages = said.map(({ role, text }) => ({ role, content: text }));
    if (system) messages.unshift({ role: "system", content: system });
    return { ...body, messages };
  }

  /** Let the model speak after the last turn. */
  async answer() {
    this.stop();
    const request = this.request();
    const turn = this.add({ role: "assistant", text: "" });
    const abort = (this.abort = new AbortController());
    turn.article.setAttribute("aria-busy", "true");
    this.changed();
    try {
      await this.receive(turn, request, abort.signal);
      this.tell(`${this.model.id} has answered`);
    } catch (error) {
      if (abort.signal.aborted) turn.note = "stopped";
      else turn.error = error instanceof Refused ? error.message : "the server cannot be reached";
      this.tell(turn.error ?? "stopped");
    }
    turn.article.removeAttribute("aria-busy");
    if (turn.article.isConnected) this.paint(turn);
    if (this.abort === abort) this.abort = null;
    this.changed();
  }

  async receive(turn, request, signal) {
    const pace = new Pace();
    let frame = 0;
    try {
      for await (const { text, finish, usage } of streamAnswer(request, signal)) {
        if (text) {
          turn.text += text;
          pace.note();
        }
        if (finish) turn.note = FINISHES[finish];
        if (usage) pace.total = usage.completion_tokens;
        turn.figures = pace.words();
        if (!frame) frame = requestAnimationFrame(() => ((frame = 0), this.paint(turn)));
      }
    } finally {
      cancelAnimationFrame(frame);
    }
  }

  /** Show a growing turn, and keep its end in view for a reader who is there. */
  paint(turn) {
    const { log } = this;
    const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    this.show(turn);
    if (isAtEnd) log.scrollTop = log.scrollHeight;
  }

  clicked({ target }) {
    const button = target.closest("button");
    const turn = this.turns.find(({ article }) => article.contains(target));
    if (!button || !turn) return;
    if (button.classList.contains("copy-code")) copyText(button.closest(".code").querySelector("code").textContent, button);
    if (button.classList.contains("copy")) copyText(turn.text, button);
    if (button.classList.contains("again")) this.regenerate(turn);
    if (button.classList.contains("edit")) this.edit(turn);
  }

  regenerate(turn) {
    this.stop();
    this.cutAt(turn);
    this.answer();
  }

  /** A text box in place of a turn. A changed question is asked anew, a changed answer stands. */
  edit(turn) {
    const box = element("textarea");
    box.value = turn.text;
    box.setAttribute("aria-label", "Edit the message");
    const save = element("button", "main", turn.role === "user" ? "Send" : "Save");
    const cancel = element("button", "", "Cancel");
    const close = () => {
      this.show(turn);
      turn.article.querySelector(".under").hidden = false;
      turn.article.querySelector(".edit").focus();
    };
    const finish = () => {
      turn.text = box.value;
      close();
      if (turn.role !== "user") return;
      this.stop();
      const next = this.turns[this.turns.indexOf(turn) + 1];
      if (next) this.cutAt(next);
      this.answer();
    };
    save.addEventListener("click", finish);
    cancel.addEventListener("click", close);
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") event.stopPropagation(), close();
      if (isSendKey(event)) event.preventDefault(), finish();
    });
    turn.article.querySelector(".text").replaceChildren(element("div", "editor", box, element("div", "", cancel, save)));
    turn.article.querySelector(".under").hidden = true;
    box.focus();
  }
}

/** Tokens per second, from the first one on. Until the server has counted them, a piece of text is
 * taken for a token. */
class Pace {
  constructor() {
    this.begun = performance.now();
    this.first = this.last = null;
    this.pieces = 0;
    this.total = null;
  }

  note() {
    this.last = performance.now();
    this.first ??= this.last;
    this.pieces++;
  }

  words() {
    if (this.first === null) return "";
    const count = this.total ?? this.pieces;
    // What came all at once says nothing about the time between tokens: then the wait counts, too.
    const apart = this.last - this.first > 50;
    const perSecond = apart ? (count - 1) / (this.last - this.first) : count / (this.last - this.begun);
    const speed = count > 1 ? `${(1000 * perSecond).toFixed(1)} tokens/s · ` : "";
    const wait = ((this.first - this.begun) / 1000).toFixed(2);
    return `${speed}${count} token${count === 1 ? "" : "s"} · first after ${wait} s`;
  }
}

/** Enter alone, and not the one that ends the composition of a character. */
function isSendKey(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing;
}

async function copyText(text, button) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed"; // a page that came unencrypted from another machine
  }
  setTimeout(() => (button.textContent = before), 1200);
}
