// Shows what /events sends.  An outcome is shown for as long as it is fresh by this page's own clock: when nothing comes, or comes
// late, the page says NO DATA by itself.
"use strict";
(() => {
  const SILENCE = 2500; // ms without a word after which the inspection is not there
  const AGAIN = 8000; // ms without a word after which the connection is made anew
  const LAG = 1500; // ms that a picture may stay when the next result has come
  const TREND = 240;
  const OUTCOMES = ["OK", "DEFECT", "ABSTAIN", "ERROR"];
  const SVG = "http://www.w3.org/2000/svg";

  const $ = (id) => document.getElementById(id);
  const text = (id, value) => {
    const element = typeof id === "string" ? $(id) : id;
    if (element.textContent !== value) element.textContent = value;
  };
  const number = (value) => (value === null || value === undefined ? "–" : String(Number(value.toPrecision(4))));
  const clock = (iso) => new Date(iso).toLocaleTimeString("en-GB");
  const milliseconds = (value) => `${value.toFixed(value < 10 ? 1 : 0)} ms`;

  let state = null; // the newest
  let points = [];
  let heardAt = -Infinity; // performance.now() of the last word
  let late = 0; // ms that it was under way longer than the fastest
  let fastest = Infinity;
  let events = null;
  let refused = false;

  // The connection.

  const connect = () => {
    if (events !== null) events.close();
    points = [];
    fastest = Infinity;
    events = new EventSource("/events");
    events.addEventListener("state", (event) => {
      const came = performance.now();
      const { points: fresh, state: next } = JSON.parse(event.data);
      const way = came - next.at_ms;
      fastest = Math.min(fastest, way);
      late = way - fastest;
      heardAt = came;
      if (state !== null && next.run !== state.run) points = [];
      points = points.concat(fresh).slice(-TREND);
      state = next;
      refused = false;
      if (state.ended) events.close(); // and opened again and again: the line may be started anew
      show();
    });
    events.addEventListener("open", () => {
      points = []; // a new connection begins with all of them
    });
  };

  let triedAt = 0;
  const reconnect = () => {
    const now = performance.now();
    if (now - triedAt < AGAIN / 4) return;
    const closed = events !== null && events.readyState === EventSource.CLOSED;
    if (!closed && now - Math.max(heardAt, triedAt) < AGAIN) return;
    triedAt = now;
    connect();
    // EventSource does not say why it was refused.
    fetch("/watch.js", { method: "HEAD" }).then((answer) => (refused = answer.status === 401), () => (refused = false));
  };

  // What to show, and why.

  const verdict = () => {
    const silent = performance.now() - heardAt;
    if (state !== null && state.ended) return ["ENDED", "The stream has ended."];
    if (silent > SILENCE) {
      if (refused) return ["NO DATA", "The token is not valid any more: load the page again."];
      return ["NO DATA", state === null ? "Connecting to the inspection." : "No connection to the inspection."];
    }
    if (state.result === null) {
      return state.idle ? ["WAITING", "No part has come yet."] : ["NO DATA", "No result yet."];
    }
    const age = state.age_ms + late + silent;
    const limit = state.idle ? state.hold_ms : state.deadline_ms;
    if (age <= Math.max(limit, state.deadline_ms)) {
      return [state.result.outcome, state.result.message || ""];
    }
    const since = `${state.result.outcome} was ${age < 9.5e4 ? `${Math.round(age / 1e3)} s` : `${Math.round(age / 6e4)} min`} ago`;
    if (state.idle) return ["WAITING", `No part has come; ${since}.`];
    if (state.source !== null && !state.source.connected) return ["NO DATA", `The source does not answer; ${since}.`];
    return ["NO DATA", `The inspection gives no result; ${since}.`];
  };

  let shown = "";
  let spokenAt = -Infinity;
  let spoken = "";
  const show = () => {
    const [outcome, why] = verdict();
    const fresh = OUTCOMES.includes(outcome);
    if (shown !== outcome) {
      shown = outcome;
      $("outcome").dataset.outcome = outcome;
      $("shape").setAttribute("href", `#shape-${outcome.replace(" ", "-")}`);
      text("word", outcome);
      $("now").dataset.outcome = outcome; // behind an open reject, the line goes on
      text("now", `Now: ${outcome}`);
      document.title = `${outcome} · ${state === null || state.name === null ? "AdvRAD" : state.name}`;
    }
    text("why", why);
    $("why").title = why;
    // What is read aloud: changes, and not more of them than can be listened to.
    const now = performance.now();
    if (spoken !== outcome && now - spokenAt > 1500) {
      spoken = outcome;
      spokenAt = now;
      text("announce", `${outcome}${why ? `: ${why}` : ""}`);
    }
    const result = state === null || !fresh ? null : state.result;
    text("score", result === null ? "–" : number(result.score));
    text("threshold", result === null ? "–" : number(result.threshold));
    text("time", result === null ? "–" : clock(result.captured_at));
    text("part", result === null ? "–" : result.item || `no. ${result.sequence}`);
    $("part").title = result === null ? "" : $("part").textContent;
    picture("frame", result, "The newest frame");
    picture("map", result, "Its heat map");
    lamps();
    if (state !== null && state !== drawn) {
      drawn = state;
      counts();
      chart();
      gallery();
    }
  };
  let drawn = null;

  // One picture is under way at a time: a slow connection gets fewer, not later ones.
  const underway = {};
  const changedAt = {};
  const picture = (view, result, alt) => {
    const image = $(view);
    if (result === null || !result.views.includes(view)) {
      image.hidden = true;
      image.dataset.sequence = "";
      return;
    }
    const sequence = String(result.sequence);
    if (image.dataset.sequence === sequence) changedAt[view] = performance.now();
    else if (performance.now() - changedAt[view] > LAG) image.hidden = true;
    if (underway[view] || image.dataset.sequence === sequence) return;
    underway[view] = true;
    const next = new Image();
    next.src = `/pictures/${sequence}/${view}.jpg`;
    next.decode().then(
      () => {
        underway[view] = false;
        if (state === null || state.result === null || !OUTCOMES.includes(shown)) return;
        image.src = next.src;
        image.alt = `${alt}: ${result.outcome}`;
        image.dataset.sequence = sequence;
        image.hidden = false;
        changedAt[view] = performance.now();
      },
      () => (underway[view] = false),
    );
  };

  const lamp = (name, level, words, title = "") => {
    const element = $(`lamp-${name}`);
    element.hidden = false;
    element.dataset.level = level;
    element.title = title;
    text(element.querySelector("b"), words);
  };
  const lamps = () => {
    const there = performance.now() - heardAt <= SILENCE;
    const ended = state !== null && state.ended;
    if (state !== null && state.name !== null) text("source", state.name);
    lamp("page", ended ? "off" : there ? "good" : "bad", ended ? "ended" : there ? "live" : "no connection");
    const source = !there || ended || state === null ? null : state.source;
    if (source === null) {
      lamp("source", "off", ended ? "ended" : "unknown");
      lamp("storage", "off", ended ? "ended" : "unknown");
    } else {
      const title = `opened ${source.opened} times, ${source.faults} faults, ${source.hanging} reads hang`;
      lamp("source", source.connected ? "good" : "bad", source.connected ? "connected" : "not connected", title);
      const waiting = source.sinks.reduce((sum, sink) => sum + sink.waiting, 0);
      const lost = source.sinks.reduce((sum, sink) => sum + sink.lost, 0);
      const where = source.sinks.map((sink) => `${sink.name}: ${sink.waiting} wait, ${sink.lost} lost`).join("\n");
      if (lost > 0) lamp("storage", "bad", `${lost} results lost`, where);
      else if (waiting > 0) lamp("storage", "warn", `${waiting} results wait`, where);
      else lamp("storage", "good", "up to date", where);
    }
  };

  const counts = () => {
    const total = OUTCOMES.reduce((sum, outcome) => sum + state.outcomes[outcome], 0);
    for (const outcome of OUTCOMES) text(`count-${outcome}`, state.outcomes[outcome].toLocaleString());
    const bad = total - state.outcomes.OK;
    text("share", total === 0 ? "–" : `${((100 * bad) / total).toFixed(1)} %`);
    text("rate", state.per_second < 10 ? state.per_second.toFixed(1) : state.per_second.toFixed(0));
    text("dropped", state.dropped.toLocaleString());
    text("latency", state.result === null ? "–" : milliseconds(state.result.latency_ms));
  };

  // The score trend.

  const draw = (parent, tag, attributes, content = "") => {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.textContent = content;
    parent.append(element);
    return element;
  };
  const chart = () => {
    const svg = $("chart");
    const { width, height } = svg.getBoundingClientRect();
    if (width < 50) return;
    const [left, right, top, bottom] = [52, width - 10, 10, height - 22];
    const parts = document.createDocumentFragment();
    const scores = points.filter((point) => point[1] !== null).map((point) => point[1]);
    const limits = points.map((point) => point[3]);
    const limit = limits.length ? limits[limits.length - 1] : null;
    if (limit !== null) {
      const low = Math.min(0, limit, ...scores);
      // Far outliers stand at the upper edge: the part near the threshold has to stay readable.
      const high = Math.max(low + 1e-9, limit + 0.3 * Math.abs(limit), Math.min(Math.max(...scores, limit), limit + 2 * Math.abs(limit - low)));
      const y = (value) => bottom - ((Math.min(Math.max(value, low), high) - low) / (high - low)) * (bottom - top);
      const x = (index) => right - ((points.length - 1 - index) / (TREND - 1)) * (right - left);
      draw(parts, "rect", { class: "zone", x: left, width: right - left, y: top, height: Math.max(0, y(limit) - top) });
      for (const value of [low, high]) {
        draw(parts, "path", { class: "grid", d: `M${left} ${y(value)}H${right}` });
        if (Math.abs(y(value) - y(limit)) > 14) draw(parts, "text", { class: "end", x: left - 8, y: y(value) + 4 }, number(value));
      }
      draw(parts, "text", { class: "end", x: left - 8, y: y(limit) + 4 }, number(limit));
      let curve = "";
      let pen = "M";
      points.forEach(([, score], i) => {
        if (score === null) pen = "M";
        else {
          curve += `${pen}${x(i).toFixed(1)} ${y(score).toFixed(1)}`;
          pen = "L";
        }
      });
      draw(parts, "path", { class: "curve", d: curve });
      let steps = "";
      limits.forEach((value, i) => {
        if (i === 0) steps = `M${points.length < TREND ? left : x(0).toFixed(1)} ${y(value).toFixed(1)}`;
        else if (value !== limits[i - 1]) steps += `H${x(i).toFixed(1)}V${y(value).toFixed(1)}`;
      });
      draw(parts, "path", { class: "limit", d: `${steps}H${right}` });
      points.forEach(([, score, code], i) => {
        if (code === 0) return;
        const where = score === null ? bottom : y(score);
        const mark = draw(parts, "use", { href: `#shape-${OUTCOMES[code]}`, x: x(i) - 6, y: Math.min(Math.max(where - 6, 0), bottom - 12), width: 12, height: 12 });
        mark.dataset.outcome = OUTCOMES[code];
      });
      draw(parts, "text", { x: left, y: height - 5 }, `${TREND} results ago`);
      draw(parts, "text", { class: "end", x: right, y: height - 5 }, "newest");
    }
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.replaceChildren(parts);
    const above = points.filter((point) => point[2] === 1).length;
    svg.setAttribute("aria-label", limit === null ? "No scores yet" : `Scores of the last ${points.length} results, threshold ${number(limit)}, ${above} above it`);
  };

  // The last rejects.

  const name = (reject) => reject.item || `no. ${reject.sequence}`;
  const gallery = () => {
    const list = $("gallery");
    $("no-rejects").hidden = state.rejects.length > 0;
    const wanted = new Set(state.rejects.map((reject) => `${state.run}/${reject.sequence}`));
    for (const item of [...list.children]) if (!wanted.has(item.dataset.key)) item.remove();
    const there = new Set([...list.children].map((item) => item.dataset.key));
    for (const reject of [...state.rejects].reverse()) {
      const key = `${state.run}/${reject.sequence}`;
      if (!there.has(key)) list.prepend(card(reject, key));
    }
    if ($("closer").open) buttons();
  };
  const card = (reject, key) => {
    const item = document.createElement("li");
    item.dataset.key = key;
    item.dataset.outcome = reject.outcome;
    const button = document.createElement("button");
    button.type = "button";
    button.addEventListener("click", () => open(reject));
    const view = reject.views.includes("map") ? "map" : reject.views[0];
    const image = document.createElement(view ? "img" : "div");
    if (view) {
      image.src = `/pictures/${reject.sequence}/${view}.jpg`;
      image.alt = "";
    } else {
      image.className = "blank";
      image.textContent = "no picture";
    }
    const facts = document.createElement("div");
    facts.className = "facts";
    const icon = draw(facts, "svg", { "aria-hidden": "true" });
    draw(icon, "use", { href: `#shape-${reject.outcome}` });
    const word = document.createElement("b");
    word.textContent = reject.outcome;
    const when = document.createElement("span");
    when.textContent = `${clock(reject.captured_at)}${reject.score === null ? "" : ` · score ${number(reject.score)}`}`;
    const part = document.createElement("span");
    part.textContent = name(reject);
    facts.append(word, when, part);
    button.append(image, facts);
    item.append(button);
    return item;
  };

  let opened = null;
  const open = (reject) => {
    opened = reject;
    $("closer-title").dataset.outcome = reject.outcome;
    $("closer-shape").setAttribute("href", `#shape-${reject.outcome}`);
    text("closer-name", `${reject.outcome} · ${name(reject)}`);
    const facts = [`${new Date(reject.captured_at).toLocaleDateString("en-CA")} ${clock(reject.captured_at)}`];
    if (reject.score !== null) facts.push(`score ${number(reject.score)}`, `threshold ${number(reject.threshold)}`, `p-value ${number(reject.p_value)}`);
    facts.push(reject.backend);
    if (reject.message) facts.push(reject.message);
    text("closer-facts", facts.join(" · "));
    for (const view of ["frame", "map"]) {
      const image = $(`closer-${view}`);
      image.closest("figure").hidden = !reject.views.includes(view);
      image.alt = `${view === "map" ? "Heat map" : "Frame"} of ${name(reject)}: ${reject.outcome}`;
      if (reject.views.includes(view)) image.src = `/pictures/${reject.sequence}/${view}.jpg`;
    }
    buttons();
    if (!$("closer").open) $("closer").showModal();
  };
  const beside = (step) => {
    const at = state.rejects.findIndex((reject) => reject.sequence === opened.sequence);
    return at < 0 ? state.rejects[step < 0 ? -1 : 0] : state.rejects[at + step];
  };
  const buttons = () => {
    $("newer").disabled = beside(-1) === undefined;
    $("older").disabled = beside(1) === undefined;
  };
  const turn = (step) => {
    const next = beside(step);
    if (next !== undefined) open(next);
  };
  $("newer").addEventListener("click", () => turn(-1));
  $("older").addEventListener("click", () => turn(1));
  $("close").addEventListener("click", () => $("closer").close());
  $("closer").addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") turn(-1);
    if (event.key === "ArrowRight") turn(1);
  });

  new ResizeObserver(() => {
    if (state !== null) chart();
  }).observe($("chart"));
  document.addEventListener("visibilitychange", show); // timers of a hidden page rest
  setInterval(() => {
    reconnect();
    show();
  }, 250);
  triedAt = performance.now();
  connect();
})();
