// The page of `ia3 serve`. What adapters are called and what they answer is anybody's, so it is put in as text alone.

const MOST_ROWS = 200; // of the list at once: others are found by typing
const MOST_CHIPS = 24;
const MOST_TOGETHER = 64; // adapters in one request
const AT_ONCE = 4; // requests under way, of the six that a browser allows a server
const FEW_LABELS = 5; // of an answer; the others unfold
const FEW_BUSY = 8;
const EVERY_MS = 5000;
const LIST_EVERY_MS = 30000; // unless the number of adapters has changed
const REST = 50; // a list that took its time is asked for again after so many times as much
const LIST_LATEST_MS = 300000; // but no later, however long a sleeping machine or a slow network made it take
const WRITING = new Set([null, "generation", "instructions", "language-modelling"]); // kinds of tasks without labels
const KEY = "ia3-key";

const at = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));
const state = {
  cards: new Map(), // what can be asked, by name
  answers: new Map(), // how many each has given lately
  rows: new Map(), // of the list, by name
  chosen: new Set(),
  asking: null, // what stops the question under way
  again: 0, // when the list is asked for next
  adapters: null, // how many there were
};

const number = new Intl.NumberFormat("en");
const counted = (count, one, many = `${one}s`) => `${number.format(count)} ${count === 1 ? one : many}`;
const listed = (names) => (names.length < 2 ? names.join() : `${names.slice(0, -1).join(", ")} and ${names.at(-1)}`);

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// The server

class Failure extends Error {
  constructor(type, said = "", param = null, seconds = null) {
    super(said);
    Object.assign(this, { type, param, seconds });
  }

  get words() {
    const seconds = this.seconds ? ` in ${counted(Number(this.seconds), "second")}` : " later";
    const known = {
      away: "The server can't be reached: see whether it runs, and ask again.",
      broken: "The connection ended before the answer did: ask again.",
      authentication_error: "This server needs a key, and has not taken yours.",
      not_found_error: "It is not served any more.",
      timeout_error: "There was no answer in time: ask again, or send a shorter text.",
      rate_limit_error: `Too much is asked of this server at once: ask again${seconds}.`,
      service_unavailable_error: "The server stops and takes no more questions.",
      server_error: "The server has failed. Its log says where.",
    };
    return known[this.type] ?? this.message;
  }

  // Whether one of several adapters may be to blame, and not the text or the server.
  get isOfOne() {
    return this.type === "not_found_error" || (this.type === "invalid_request_error" && !this.param);
  }
}

const failureOf = (error, seconds) => new Failure(error.type, error.message, error.param, seconds);

async function call(path, { body, signal } = {}) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  const sent = body && { method: "POST", body: JSON.stringify(body) };
  const response = await fetch(path, { headers, signal, cache: "no-store", ...sent }).catch((error) => {
    throw error.name === "AbortError" ? error : new Failure("away");
  });
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  const failure = failureOf(
    said.error ?? { type: "other", message: `Something between here and the server answered ${response.status}.` },
    response.headers.get("Retry-After"),
  );
  if (failure.type === "authentication_error") askForKey();
  throw failure;
}

const breakOff = (error) => {
  throw error.name === "AbortError" ? error : new Failure("broken");
};

const asJson = (response) => response.json().catch(breakOff);

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read().catch(breakOff);
    if (done) throw new Failure("broken");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const data of parts.map((part) => part.slice("data: ".length))) {
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// The key

function askForKey() {
  if (at["key-dialog"].open) return;
  at["key-said"].textContent = sessionStorage.getItem(KEY)
    ? "The server has not taken this key: try another."
    : "It is kept in this tab until you close it.";
  at["key-dialog"].showModal();
}

at["key-form"].addEventListener("submit", (event) => {
  event.preventDefault();
  const key = at.key.value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) {
    at["key-said"].textContent = "A key has letters, digits and signs without blanks: look at it again.";
    return;
  }
  sessionStorage.setItem(KEY, key);
  at.key.value = "";
  at["key-dialog"].close();
  state.again = 0;
  refresh();
});

at["forget-key"].addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  location.reload();
});

// What is served

async function refresh() {
  try {
    const activity = await asJson(await call("v1/activity"));
    showActivity(activity);
    if (Date.now() >= state.again || activity.adapters !== state.adapters) {
      const began = Date.now();
      takeCards((await asJson(await call("v1/models"))).data);
      state.adapters = activity.adapters;
      const rest = Math.max(LIST_EVERY_MS, REST * (Date.now() - began));
      state.again = Date.now() + Math.min(LIST_LATEST_MS, rest);
    }
    at.notice.hidden = true;
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    at.notice.textContent = error.words;
    at.notice.hidden = error.type === "authentication_error";
    at.state.textContent = error.type === "authentication_error" ? "Needs a key" : "Away";
    at.state.className = "state away";
  }
  at["forget-key"].hidden = !sessionStorage.getItem(KEY);
}

async function watch() {
  try {
    if (!document.hidden && !at["key-dialog"].open) await refresh();
  } finally {
    setTimeout(watch, EVERY_MS);
  }
}

document.addEventListener("visibilitychange", () => document.hidden || refresh());

function takeCards(cards) {
  const old = state.cards;
  state.cards = new Map(cards.map((card) => [card.id, card]));
  const gone = [...state.chosen].filter((name) => !state.cards.has(name));
  gone.forEach((name) => state.chosen.delete(name));
  const same = (card) => JSON.stringify(card) === JSON.stringify(old.get(card.id));
  if (old.size === cards.length && cards.every(same)) return;
  state.rows.clear();
  at.base.textContent = cards.find((card) => !card.parent)?.id ?? "";
  at.count.textContent = number.format(cards.filter((card) => card.parent).length);
  showList();
  showChosen();
  if (gone.length) hint(`Not served any more: ${listed(gone)}.`);
}

function showActivity({ ready, seconds, queued, running, resident, data }) {
  at.state.textContent = ready ? "Ready" : "Stopping";
  at.state.className = ready ? "state ready" : "state away";
  at.minutes.textContent = seconds / 60;
  at.now.textContent =
    `${counted(queued, "text waits", "texts wait")}, ${running} running, ` +
    `${counted(resident, "adapter")} on the device`;
  state.answers = new Map(data.map(({ adapter, answers }) => [adapter, answers]));
  for (const [name, row] of state.rows) showAnswers(name, row);
  at.quiet.hidden = data.length > 0;
  const most = data[0]?.answers;
  at.busy.replaceChildren(
    ...data.slice(0, FEW_BUSY).map(({ adapter, answers }) => bar(adapter, answers / most, number.format(answers))),
  );
}

// The list

const fits = (card, wanted) => [card.id, ...card.aliases].some((name) => name.toLowerCase().includes(wanted));

function found() {
  const wanted = at.search.value.trim().toLowerCase();
  return [...state.cards.values()].filter((card) => fits(card, wanted));
}

function showList() {
  const cards = found();
  const shown = cards.slice(0, MOST_ROWS);
  const focused = document.activeElement;
  const top = at.list.scrollTop;
  at.list.replaceChildren(...shown.map((card) => rowOf(card)));
  at.list.scrollTop = top;
  if (focused !== document.activeElement && focused.isConnected) focused.focus({ preventScroll: true });
  const boxes = [...at.list.querySelectorAll("input")];
  boxes.forEach((box) => (box.tabIndex = -1));
  (boxes.find((box) => box === document.activeElement) ?? boxes[0])?.setAttribute("tabindex", "0");
  at.more.hidden = cards.length > 0 && cards.length === shown.length;
  at.more.textContent = cards.length
    ? `${number.format(cards.length - shown.length)} more: type a part of their names.`
    : state.cards.size ? "Nothing has such a name or alias." : "Nothing is served yet.";
  at["choose-all"].disabled = cards.length === 0 || cards.length > MOST_ROWS;
}

function rowOf(card) {
  if (!state.rows.has(card.id)) {
    const about = [card.parent ? card.task : "base", ...card.aliases.map((alias) => `alias ${alias}`)];
    const box = make("input", { type: "checkbox", value: card.id });
    const row = make(
      "li",
      {},
      make(
        "label",
        { title: card.digest ? `Digest ${card.digest}` : "" },
        box,
        make(
          "span",
          { className: "who" },
          make("span", { className: "name", textContent: card.id }),
          make("span", { className: "about", textContent: about.filter(Boolean).join(" · ") }),
        ),
        make("span", { className: "answers" }),
      ),
    );
    state.rows.set(card.id, row);
    showAnswers(card.id, row);
  }
  const row = state.rows.get(card.id);
  row.querySelector("input").checked = state.chosen.has(card.id);
  return row;
}

function showAnswers(name, row) {
  const count = state.answers.get(name);
  const place = row.querySelector(".answers");
  place.textContent = count ? number.format(count) : "";
  place.title = count ? `${counted(count, "answer")} in the last minutes` : "";
}

function choose(names, chosen) {
  for (const name of names) {
    state.chosen[chosen ? "add" : "delete"](name);
    const box = state.rows.get(name)?.querySelector("input");
    if (box) box.checked = chosen;
  }
  showChosen();
}

function showChosen() {
  const names = [...state.chosen];
  const chips = names.slice(0, MOST_CHIPS).map((name) => {
    const chip = make("button", { type: "button", textContent: name, ariaLabel: `Remove ${name}` });
    chip.addEventListener("click", () => choose([name], false));
    return make("li", {}, chip);
  });
  if (names.length > MOST_CHIPS) {
    const rest = `and ${number.format(names.length - MOST_CHIPS)} more`;
    chips.push(make("li", { className: "muted small", textContent: rest }));
  }
  at.chosen.replaceChildren(...chips);
  at["choose-none"].disabled = names.length === 0;
  at.send.disabled = names.length === 0;
  at.send.textContent = names.length > 1 ? `Ask ${counted(names.length, "adapter")}` : "Ask";
  hint(names.length ? "or Ctrl+Enter" : "Choose one adapter or several first.", names.length > 0);
}

// What to do next; of keys only where there are some.
function hint(words, isOfKeys = false) {
  at.hint.textContent = words;
  at.hint.className = `muted small${isOfKeys ? " keys" : ""}`;
}

at.search.addEventListener("input", () => {
  at.list.scrollTop = 0;
  showList();
});
at.search.addEventListener("keydown", (event) => {
  if (event.key !== "ArrowDown") return;
  event.preventDefault();
  at.list.querySelector("input")?.focus();
});
at.list.addEventListener("change", ({ target }) => choose([target.value], target.checked));
// One stop of the tab key; the arrows go on from there.
at.list.addEventListener("keydown", (event) => {
  const boxes = [...at.list.querySelectorAll("input")];
  const place = boxes.indexOf(event.target);
  const next = { ArrowDown: place + 1, ArrowUp: place - 1, Home: 0, End: boxes.length - 1 }[event.key];
  if (next === undefined) return;
  event.preventDefault();
  (boxes[next] ?? (next < 0 ? at.search : event.target)).focus();
});
at.list.addEventListener("focusin", ({ target }) => {
  at.list.querySelectorAll('input[tabindex="0"]').forEach((box) => (box.tabIndex = -1));
  target.tabIndex = 0;
});
at["choose-all"].addEventListener("click", () => choose(found().map((card) => card.id), true));
at["choose-none"].addEventListener("click", () => choose([...state.chosen], false));

// Asking

at.ask.addEventListener("submit", (event) => {
  event.preventDefault();
  ask(at.text.value, [...state.chosen]);
});
at.text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.isComposing) at.ask.requestSubmit();
});
at.stop.addEventListener("click", () => state.asking?.abort());

async function ask(text, names) {
  if (!names.length) return;
  if (!text.trim()) {
    hint("Write a text first.");
    at.text.focus();
    return;
  }
  state.asking?.abort();
  const asking = (state.asking = new AbortController());
  const { signal } = asking;
  const rows = new Map(names.map((name) => [name, new Row(name)]));
  at.rows.replaceChildren(...[...rows.values()].map((row) => row.element));
  at["none-yet"].hidden = true;
  at.answers.hidden = at.stop.hidden = false;
  at.summary.textContent = "Asking…";
  const began = performance.now();
  const writers = names.filter((name) => WRITING.has(state.cards.get(name)?.task ?? null));
  const labellers = names.filter((name) => !writers.includes(name));
  const jobs = writers.map((name) => () => write(text, rows.get(name), signal));
  for (let start = 0; start < labellers.length; start += MOST_TOGETHER) {
    const some = labellers.slice(start, start + MOST_TOGETHER).map((name) => rows.get(name));
    jobs.unshift(() => classify(text, some, signal));
  }
  const work = async () => {
    for (let job; !signal.aborted && (job = jobs.shift()); ) await job();
  };
  await Promise.all(Array.from({ length: AT_ONCE }, work));
  if (state.asking !== asking) return; // another question came
  state.asking = null;
  at.stop.hidden = true;
  for (const row of rows.values()) if (row.waits) row.fail("Stopped.");
  at.summary.textContent = summaryOf([...rows.values()], performance.now() - began);
  if ([...rows.values()].some((row) => !row.answered)) state.again = 0; // it may be served no more
  refresh();
}

// Runs what fills rows; a failure is theirs.
async function filling(rows, work) {
  try {
    await work();
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof Failure)) throw error;
    rows.forEach((row) => row.fail(error.words));
  }
}

// Several adapters in one request; where one of them can't answer, each alone.
const classify = (text, rows, signal) =>
  filling(rows, async () => {
    try {
      const body = { models: rows.map((row) => row.name), input: text };
      const { data } = await asJson(await call("v1/classify", { body, signal }));
      rows.forEach((row, place) => row.label(data[place]));
    } catch (error) {
      if (rows.length === 1 || !error.isOfOne) throw error;
      for (const row of rows) await classify(text, [row], signal);
    }
  });

const write = (text, row, signal) =>
  filling([row], async () => {
    const body = { model: row.name, messages: [{ role: "user", content: text }], stream: true };
    for await (const event of eventsOf(await call("v1/chat/completions", { body, signal }))) {
      if (event.error) throw failureOf(event.error);
      const [choice] = event.choices;
      row.write(choice.delta.content ?? "");
      if (choice.finish_reason) row.end(choice, event.system_fingerprint);
    }
  });

function summaryOf(rows, milliseconds) {
  const answered = rows.filter((row) => row.answered);
  const labels = Map.groupBy(answered.filter((row) => row.chose !== null), (row) => row.chose);
  const votes = [...labels].sort(([, some], [, others]) => others.length - some.length);
  const shown = votes.slice(0, FEW_LABELS).map(([label, some]) => `${label} ${some.length}`);
  const tally = answered.length > 1 && votes.length ? ` — ${shown.join(", ")}${votes.length > FEW_LABELS ? ", …" : ""}` : "";
  return `${counted(answered.length, "answer")} in ${timeOf(milliseconds)}${tally}`;
}

// Answers

const timeOf = (milliseconds) =>
  milliseconds < 9.95 ? `${milliseconds.toFixed(1)} ms`
  : milliseconds < 999.5 ? `${Math.round(milliseconds)} ms`
  : `${(milliseconds / 1000).toFixed(1)} s`;

const cell = (properties = {}, ...children) => {
  const made = make("td", properties, ...children);
  made.setAttribute("role", "cell");
  return made;
};

class Row {
  constructor(name) {
    Object.assign(this, { name, waits: true, answered: false, chose: null });
    const head = make("th", { scope: "row" }, make("span", { className: "name", textContent: name }));
    head.setAttribute("role", "rowheader");
    this.said = make("span", { className: "said muted", textContent: "…" });
    this.element = make("tr", { ariaBusy: "true" }, head, cell({ colSpan: 5 }, this.said));
    this.element.setAttribute("role", "row");
  }

  label({ label, text, probabilities, queued_ms, ran_ms, digest }) {
    this.chose = label;
    this.said.className = label === null ? "said" : "said label";
    this.said.textContent = text;
    const notes = label === null ? [make("div", { className: "muted small", textContent: "none of its labels" })] : [];
    this.#finish([cell({}, this.said, ...notes), cell({}, ...(probabilities ? barsOf(probabilities) : []))], {
      queued_ms,
      ran_ms,
      digest,
    });
  }

  write(piece) {
    if (this.said.classList.contains("muted")) this.said.textContent = "";
    this.said.className = "said";
    this.said.append(piece);
  }

  end({ finish_reason, queued_ms, ran_ms }, digest) {
    const cut = finish_reason === "length";
    const notes = cut ? [make("div", { className: "muted small", textContent: "cut: as long as it may be" })] : [];
    this.#finish([cell({ colSpan: 2 }, this.said, ...notes)], { queued_ms, ran_ms, digest });
  }

  fail(words) {
    this.waits = false;
    this.element.ariaBusy = "false";
    if (this.said.className === "said muted") this.said.textContent = "";
    this.said.after(make("div", { className: "failed", textContent: words }));
  }

  #finish(cells, { queued_ms, ran_ms, digest }) {
    Object.assign(this, { waits: false, answered: true });
    this.element.ariaBusy = "false";
    this.element.lastElementChild.remove();
    const times = [["queued", queued_ms], ["ran", ran_ms]].map(([title, milliseconds]) => {
      const made = cell({ className: "number", textContent: timeOf(milliseconds) });
      made.dataset.title = title;
      return made;
    });
    const shown = digest ? make("code", { textContent: digest.slice(0, 12), title: digest }) : "the base";
    this.element.append(...cells, ...times, cell({}, shown));
  }
}

function barsOf(probabilities) {
  const sorted = Object.entries(probabilities).sort(([, one], [, other]) => other - one);
  const bars = ([label, share]) => bar(label, share, `${(share * 100).toFixed(1)} %`);
  const list = (some) => make("ul", { className: "bars" }, ...some.map(bars));
  if (sorted.length <= FEW_LABELS + 1) return [list(sorted)];
  const rest = sorted.slice(FEW_LABELS);
  const summary = make("summary", { textContent: `${number.format(rest.length)} more labels` });
  return [list(sorted.slice(0, FEW_LABELS)), make("details", {}, summary, list(rest))];
}

function bar(name, share, said) {
  const fill = make("span", { className: "fill" });
  fill.style.width = `${share * 100}%`;
  return make(
    "li",
    {},
    fill,
    make("span", { className: "name", textContent: name }),
    make("span", { className: "percent", textContent: said }),
  );
}

showChosen();
watch();
