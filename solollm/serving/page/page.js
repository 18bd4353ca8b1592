// The page around the conversations: the message box, the settings, one pane or two, the keys.

const byId = (id) => document.getElementById(id);
const STORED = "solollm-settings";
const NUMBERS = ["temperature", "top_p", "min_p", "repetition_penalty", "top_k", "seed", "max_tokens"];
const form = byId("settings-form");
const input = byId("input");
const panes = [];
let isSentEarly = false; // before there was a pane

/** The settings as requests carry them; an empty field is left to the server. */
function settings() {
  const { system, mode } = form.elements;
  const found = { system: system.value.trim(), mode: mode.value };
  for (const name of NUMBERS) {
    const field = form.elements[name];
    if (field.value !== "" && field.validity.valid) found[name] = Number(field.value);
  }
  return found;
}

function restoreSettings() {
  try {
    const stored = JSON.parse(localStorage.getItem(STORED)) ?? {};
    for (const [name, value] of Object.entries(stored)) if (form.elements[name]) form.elements[name].value = value;
  } catch {
    // nothing stored, or storing is forbidden: the defaults stand
  }
}

function settingsChanged() {
  for (const output of form.querySelectorAll("output")) output.value = form.elements[output.htmlFor[0]].value;
  try {
    localStorage.setItem(STORED, JSON.stringify(Object.fromEntries(new FormData(form))));
  } catch {
    // they last as long as the page, then
  }
  for (const pane of panes) if (!pane.isBusy) pane.refresh();
}

function showSettings(isShown) {
  byId("settings").hidden = !isShown;
  byId("settings-button").setAttribute("aria-expanded", String(isShown));
  (isShown ? byId("system") : byId("settings-button")).focus();
}

function tell(text) {
  byId("status").textContent = text;
}

function busyChanged() {
  const isBusy = panes.some((pane) => pane.isBusy);
  byId("stop").hidden = !isBusy;
  byId("send").hidden = isBusy;
}

/** Send what was typed; before the models are known, as soon as they are, unless it is changed. */
function send() {
  const text = input.value;
  isSentEarly = panes.length === 0 && text.trim() !== "";
  if (!text.trim() || panes.length === 0 || panes.some((pane) => pane.isBusy)) return;
  input.value = "";
  fit();
  for (const pane of panes) pane.ask(pane.isChat ? text.trim() : text);
}

function stop() {
  for (const pane of panes) pane.stop();
  input.focus();
}

/** The message box is as high as its text. */
function fit() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

function addPane(models, model) {
  const pane = new Pane(models, model, { settings, changed: busyChanged, tell });
  panes.push(pane);
  byId("panes").append(pane.node);
}

/** One pane, or two: the second starts with the next model, and from the same beginning. */
function compare(models) {
  const isTwo = panes.length === 1;
  if (isTwo) {
    const other = models.find(({ id }) => id !== panes[0].model.id) ?? panes[0].model;
    addPane(models, other.id);
  } else {
    const gone = panes.pop();
    gone.stop();
    gone.node.remove();
  }
  byId("panes").classList.toggle("two", isTwo);
  byId("compare").setAttribute("aria-pressed", String(isTwo));
  busyChanged();
}

function keyPressed(event) {
  if (event.key !== "Escape") return;
  if (panes.some((pane) => pane.isBusy)) stop();
  else if (!byId("settings").hidden) showSettings(false);
}

async function begin() {
  restoreSettings();
  settingsChanged();
  let models;
  try {
    models = await offeredModels();
  } catch (error) {
    const wrong = element("p", "wrong", error instanceof Refused ? error.message : "the server cannot be reached");
    wrong.setAttribute("role", "alert");
    byId("panes").append(wrong);
    return;
  }
  addPane(models, models[0].id);
  byId("compare").addEventListener("click", () => compare(models));
  byId("new").addEventListener("click", () => {
    for (const pane of panes) pane.clear();
    input.focus();
  });
  if (isSentEarly) send();
}

byId("composer").addEventListener("submit", (event) => (event.preventDefault(), send()));
byId("stop").addEventListener("click", stop);
byId("settings-button").addEventListener("click", () => showSettings(byId("settings").hidden));
byId("settings-close").addEventListener("click", () => showSettings(false));
form.addEventListener("input", settingsChanged);
form.addEventListener("reset", () => setTimeout(settingsChanged));
form.addEventListener("submit", (event) => event.preventDefault());
input.addEventListener("input", () => ((isSentEarly = false), fit()));
input.addEventListener("keydown", (event) => {
  if (isSendKey(event)) event.preventDefault(), send();
});
document.addEventListener("keydown", keyPressed);
begin();
