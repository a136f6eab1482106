// Fills the lists of report.html. Texts of the data go into the page as text nodes only, so markup in them stays text.
// What is looked at stands in the address, as #page=2&search=word: it survives a reload and can be sent to others.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const examples = data.examples;
  const size = examples.id.length;
  const PAGE = 20; // examples of a page
  const SHOWN = 600; // characters of a turn before "show all"
  const GROUPS = 25; // groups of near-duplicates before "show all"
  const TOPICS = 500; // topics in the filter; the search finds the others
  const SORT = examples.choice ? "choice" : "proponents";
  const DEFAULTS = { page: "1", search: "", sort: SORT, show: "all", topic: "", min: "", max: "", query: "0" };
  const byId = (id) => document.getElementById(id);

  // ------------------------------------------------------------------------------------------------ small helpers

  function element(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name === "onclick") node.addEventListener("click", value);
      else if (value !== null) node.setAttribute(name, value);
    }
    node.append(...children); // strings become text nodes
    return node;
  }

  const whole = (value) => value.toLocaleString("en-US");
  const number = (value) => (value === null ? "-" : String(Number(value.toPrecision(4))));
  const signed = (value) => (value > 0 ? "+" : "") + number(value);
  const percent = (value) => (value === null ? "-" : (100 * value).toFixed(1) + " %");
  const isolated = (text) => "\u2068" + text + "\u2069"; // for places that take no element, such as options
  const named = (topic) => topic || "(no topic)";

  function debounced(action, milliseconds) {
    let timer = 0;
    return () => {
      clearTimeout(timer);
      timer = setTimeout(action, milliseconds);
    };
  }

  // ------------------------------------------------------------------------------------------------------- texts

  // The start of a text that does not cut a character of two code units apart.
  function start(text, length) {
    const last = text.charCodeAt(length - 1);
    return text.slice(0, last >= 0xd800 && last < 0xdc00 ? length - 1 : length);
  }

  const ROLES = { s: "system", u: "user", a: "assistant", r: "response", t: "tool", x: "rejected" };

  function turn(letter, content) {
    const [text, missing] = typeof content === "string" ? [content, 0] : content;
    const words = element("div", { class: "words", dir: "auto" });
    const node = element("div", { class: letter === "r" ? "turn response" : "turn" });
    node.append(element("span", { class: "role" }, ROLES[letter]), words);
    const note = missing ? " … " + whole(missing) + " more characters are not in this page" : "";
    if (text.length <= SHOWN) {
      words.textContent = text + note;
      return node;
    }
    words.textContent = start(text, SHOWN) + " …";
    const label = "show all " + whole(text.length) + " characters";
    const button = element("button", { type: "button", "aria-expanded": "false" }, label);
    button.addEventListener("click", () => {
      const open = button.getAttribute("aria-expanded") === "false";
      button.setAttribute("aria-expanded", String(open));
      button.textContent = open ? "show less" : label;
      words.textContent = open ? text + note : start(text, SHOWN) + " …";
    });
    node.append(button);
    return node;
  }

  function turns(source, row) {
    return source.texts[row].map((content, i) => turn(source.roles[row][i], content));
  }

  // ------------------------------------------------------------------------------------------------------ tables

  const numberCell = (label, text) => element("td", { class: "number", "data-label": label }, text);

  const isolate = (text) => element("bdi", {}, text);
  const topicCell = (topic) => element("td", { class: "topic", "data-label": "topic" }, isolate(named(topic)));

  const COLUMNS = [
    ["selected", (row) => {
      const kept = examples.selected[row] === "1";
      const taken = examples.choice && kept ? "choice " + whole(examples.choice[row]) : "selected";
      const tag = element("span", { class: kept ? "tag selected" : "tag" }, kept ? taken : "left out");
      const reason = kept && examples.reason ? [element("div", { class: "reason" }, isolate(examples.reason[row]))] : [];
      const asked = kept && examples.asked && examples.asked[row] >= 0 ? examples.asked_texts[examples.asked[row]] : "";
      if (asked) reason.push(element("div", { class: "asked" }, "“", isolate(asked), "”"));
      return element("td", { class: "state" }, tag, ...reason);
    }],
    ["influence", (row) => numberCell("influence", signed(examples.influence[row]))],
    ["rank", (row) => numberCell("rank", whole(examples.rank[row]))],
    ["topic", (row) => topicCell(data.topics[examples.topic[row]])],
    ["response tokens", (row) => numberCell("response tokens", whole(examples.responses[row]))],
    ["loss", (row) => numberCell("loss", number(examples.loss[row]))],
  ];
  if (examples.self_influence) {
    COLUMNS.push(["self-influence", (row) => numberCell("self-influence", number(examples.self_influence[row]))]);
  }

  function textCell(source, row, cut) {
    const note = cut ? " (truncated)" : "";
    const id = element("div", { class: "id" }, "id ", isolate(source.id[row]), note);
    return element("td", { class: "text" }, ...turns(source, row), id);
  }

  // Rows of training examples into a table; `extra` is a column of the list itself, as [title, value of the i-th].
  function fill(table, rows, extra) {
    const columns = COLUMNS.map(([title]) => title);
    const titles = [...(extra ? [extra[0]] : []), ...columns, "text"];
    table.tHead.replaceChildren(element("tr", {}, ...titles.map((title) => element("th", { scope: "col" }, title))));
    const lines = rows.map((row, i) => {
      const cells = extra ? [numberCell(extra[0], extra[1](i))] : [];
      cells.push(...COLUMNS.map(([, cell]) => cell(row)), textCell(examples, row, examples.truncated[row] === "1"));
      return element("tr", { "data-row": row }, ...cells);
    });
    table.tBodies[0].replaceChildren(...lines);
  }

  // ------------------------------------------------------------------------------------------ filter, order, pages

  let state = { ...DEFAULTS };
  const orders = new Map();
  let haystack = null;

  function order(name) {
    if (!orders.has(name)) {
      const rows = Array.from({ length: size }, (_, row) => row);
      const key = {
        choice: (row) => examples.choice[row] || size + examples.rank[row],
        proponents: (row) => examples.rank[row],
        opponents: (row) => -examples.rank[row],
        longest: (row) => -examples.responses[row],
        loss: (row) => -(examples.loss[row] ?? -Infinity),
        source: (row) => row,
      }[name];
      rows.sort((a, b) => key(a) - key(b) || a - b);
      orders.set(name, rows);
    }
    return orders.get(name);
  }

  function searchable(row) {
    const texts = examples.texts[row].map((content) => (typeof content === "string" ? content : content[0]));
    return [examples.id[row], data.topics[examples.topic[row]], ...texts].join("\n").toLowerCase();
  }

  function matching() {
    const wanted = state.search.toLowerCase();
    if (wanted && !haystack) haystack = Array.from({ length: size }, (_, row) => searchable(row));
    const bit = { all: "", selected: "1", left: "0" }[state.show];
    const topic = state.topic === "" ? -1 : Number(state.topic);
    const low = state.min === "" ? 0 : Number(state.min);
    const high = state.max === "" ? Infinity : Number(state.max);
    return order(state.sort).filter(
      (row) =>
        (!bit || examples.selected[row] === bit) &&
        (topic < 0 || examples.topic[row] === topic) &&
        examples.responses[row] >= low &&
        examples.responses[row] <= high &&
        (!wanted || haystack[row].includes(wanted)),
    );
  }

  let pages = 1;

  function showExamples() {
    const rows = matching();
    pages = Math.max(1, Math.ceil(rows.length / PAGE));
    const page = Math.min(Math.max(1, Math.trunc(Number(state.page)) || 1), pages);
    state.page = String(page);
    fill(byId("table"), rows.slice((page - 1) * PAGE, page * PAGE));
    const of = rows.length === size ? "" : " of " + whole(size);
    const noun = size === 1 ? " example" : " examples";
    byId("status").textContent = whole(rows.length) + of + noun + ", page " + whole(page) + " of " + whole(pages);
    byId("pages").textContent = "of " + whole(pages);
    byId("page").value = state.page;
    byId("page").max = String(pages);
    byId("first").disabled = byId("previous").disabled = page === 1;
    byId("next").disabled = byId("last").disabled = page === pages;
  }

  // ------------------------------------------------------------------------------------- the address as the state

  const CHOICES = { sort: byId("sort"), show: byId("show"), topic: byId("topic") };
  const wholeNumber = (text) => /^\d{1,9}$/.test(text);

  function valid(name, value) {
    if (name in CHOICES) return [...CHOICES[name].options].some((option) => option.value === value);
    if (name === "page" || name === "query") return wholeNumber(value);
    if (name === "min" || name === "max") return value === "" || wholeNumber(value);
    return true;
  }

  // Links to sections have no "=" and leave the state alone.
  function readAddress() {
    const text = location.hash.slice(1);
    if (text && !text.includes("=")) return;
    const given = new URLSearchParams(text);
    for (const name of Object.keys(DEFAULTS)) {
      const value = given.get(name);
      state[name] = value !== null && valid(name, value) ? value : DEFAULTS[name];
    }
    for (const name of ["search", "sort", "show", "topic", "min", "max"]) byId(name).value = state[name];
  }

  function writeAddress() {
    const changed = Object.entries(state).filter(([name, value]) => value !== DEFAULTS[name]);
    const text = new URLSearchParams(changed).toString();
    history.replaceState(null, "", text ? "#" + text : location.pathname + location.search);
  }

  function change(changes) {
    Object.assign(state, changes);
    showExamples();
    writeAddress();
  }

  function connect() {
    const filter = () => {
      const read = {};
      for (const name of ["search", "sort", "show", "topic", "min", "max"]) {
        read[name] = valid(name, byId(name).value) ? byId(name).value : DEFAULTS[name];
      }
      change({ ...read, page: "1" });
    };
    for (const name of ["sort", "show", "topic"]) byId(name).addEventListener("change", filter);
    for (const name of ["search", "min", "max"]) byId(name).addEventListener("input", debounced(filter, 150));
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
    byId("filters").addEventListener("reset", () => setTimeout(filter, 0)); // after the fields are empty
    byId("page").addEventListener("change", () => change({ page: byId("page").value }));
    for (const [id, target] of [
      ["first", () => 1],
      ["previous", () => Number(state.page) - 1],
      ["next", () => Number(state.page) + 1],
      ["last", () => pages],
    ]) {
      byId(id).addEventListener("click", () => change({ page: String(target()) }));
    }
    window.addEventListener("hashchange", () => {
      readAddress();
      showExamples();
      if (data.queries) showQuery();
    });
  }

  function fillTopics() {
    const counts = new Array(data.topics.length).fill(0);
    for (const topic of examples.topic) counts[topic] += 1;
    const largest = counts.map((count, topic) => [count, topic]).sort((a, b) => b[0] - a[0] || a[1] - b[1]);
    for (const [count, topic] of largest.slice(0, TOPICS)) {
      const label = isolated(start(named(data.topics[topic]), 60)) + " (" + whole(count) + ")";
      byId("topic").append(element("option", { value: topic }, label));
    }
  }

  // ---------------------------------------------------------------------------------------------- near-duplicates

  function groupNode(group) {
    const ranks = group.rows.slice(0, 8).map((row) => whole(examples.rank[row]));
    const more = group.rows.length > ranks.length ? ", …" : "";
    const low = number(Math.min(...group.similarity));
    const title = group.rows.length + " near-duplicates, similarity from " + low + "; ranks " + ranks.join(", ") + more;
    const details = element("details", {}, element("summary", {}, title));
    details.addEventListener("toggle", () => {
      if (!details.open || details.querySelector("table")) return;
      const caption = element("caption", {}, "Similarity of each to the nearest other of the group");
      const table = element("table", { class: "examples" }, caption, element("thead"), element("tbody"));
      fill(table, group.rows, ["similarity", (i) => number(group.similarity[i])]);
      details.append(element("div", { class: "wide" }, table));
    });
    return details;
  }

  function fillGroups() {
    const place = byId("groups");
    place.append(...data.copies.slice(0, GROUPS).map(groupNode));
    const others = data.copies.slice(GROUPS);
    if (!others.length) return;
    const label = "show " + whole(others.length) + " more groups";
    const button = element("button", { type: "button", class: "more" }, label);
    button.addEventListener("click", () => button.replaceWith(...others.map(groupNode)));
    place.append(button);
  }

  // --------------------------------------------------------------------------------------- evaluation examples

  const STEPS = 4; // of colour, each way

  function shade(value, largest) {
    const step = Math.min(STEPS, Math.ceil((STEPS * Math.abs(value)) / largest));
    return step ? (value > 0 ? "up" : "down") + step : "";
  }

  // One stop of the Tab key for the whole map; the arrow keys move in it.
  function moveInMap(event) {
    const cells = [...byId("map").querySelectorAll("button")];
    const here = cells.indexOf(document.activeElement);
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const target = event.key === "Home" ? 0 : event.key === "End" ? cells.length - 1 : here + (step || 0);
    if (here < 0 || target === here || !cells[target]) return;
    event.preventDefault();
    cells[here].tabIndex = -1;
    cells[target].tabIndex = 0;
    cells[target].focus();
  }

  function fillMap() {
    const queries = data.queries;
    // Nine in ten squares share the colours; the outermost would leave the others pale.
    const sizes = queries.mean.map(Math.abs).sort((a, b) => a - b);
    const largest = sizes[Math.floor(0.9 * (sizes.length - 1))] || sizes.at(-1) || 1;
    const topics = new Map();
    queries.topic.forEach((topic, i) => topics.set(topic, [...(topics.get(topic) || []), i]));
    for (const [topic, members] of [...topics].sort((a, b) => b[1].length - a[1].length)) {
      const cells = members.map((i) => {
        const label = isolated(queries.id[i]) + ": mean influence received " + signed(queries.mean[i]);
        const kind = "cell " + shade(queries.mean[i], largest);
        const names = { title: label, "aria-label": label, "data-query": i };
        const choose = () => chooseQuery(i);
        return element("button", { type: "button", class: kind, tabindex: "-1", ...names, onclick: choose });
      });
      const line = element("div", { class: "cells", role: "group", "aria-label": isolated(named(topic)) }, ...cells);
      byId("map").append(element("div", {}, isolate(named(topic)), " (" + whole(members.length) + ")", line));
    }
    byId("map").addEventListener("keydown", moveInMap);
    const swatch = (kind) => element("span", { class: "scale " + kind });
    const down = [4, 3, 2, 1].map((i) => swatch("down" + i));
    const up = [1, 2, 3, 4].map((i) => swatch("up" + i));
    byId("scale").append(element("span", {}, signed(-largest) + " or less ", ...down, swatch(""), ...up, " " + signed(largest) + " or more"));
  }

  function labelOf(i) {
    const content = data.queries.texts[i][Math.max(0, data.queries.roles[i].indexOf("u"))];
    const text = typeof content === "string" ? content : content[0];
    return whole(i + 1) + ": " + isolated(start(text.replace(/\s+/g, " "), 70));
  }

  function fillUncovered() {
    const queries = data.queries;
    const places = queries.id.map((_, i) => i).sort((a, b) => queries.mean[a] - queries.mean[b] || a - b);
    const lowest = places.slice(0, 10);
    const table = byId("uncovered");
    const titles = ["mean influence", "topic", "", "text"];
    table.tHead.replaceChildren(element("tr", {}, ...titles.map((title) => element("th", { scope: "col" }, title))));
    table.tBodies[0].replaceChildren(
      ...lowest.map((i) => {
        const choose = () => {
          chooseQuery(i);
          byId("query").focus();
        };
        const label = "Choose evaluation example " + whole(i + 1);
        const attributes = { type: "button", class: "more", "aria-label": label, onclick: choose };
        const button = element("button", attributes, "choose");
        const cells = [numberCell("mean influence", signed(queries.mean[i])), topicCell(queries.topic[i])];
        return element("tr", {}, ...cells, element("td", {}, button), textCell(queries, i, false));
      }),
    );
  }

  function showQuery() {
    const queries = data.queries;
    const i = Math.min(Number(state.query), queries.id.length - 1);
    state.query = String(i);
    byId("query").value = state.query;
    byId("query-previous").disabled = i === 0;
    byId("query-next").disabled = i === queries.id.length - 1;
    for (const cell of byId("map").querySelectorAll("button")) {
      const chosen = cell.dataset.query === state.query;
      cell.setAttribute("aria-pressed", String(chosen));
      cell.tabIndex = chosen ? 0 : -1;
    }
    const helping = queries.influence[i].filter((value) => value > 0).length;
    byId("query-status").textContent =
      `Evaluation example ${whole(i + 1)} of ${whole(queries.id.length)}: mean influence received ` +
      `${signed(queries.mean[i])} from all, ${signed(queries.selected_mean[i])} from the selected; ` +
      `highest ${signed(queries.highest[i])}; ` +
      `the selected bring ${percent(queries.positive_selected[i])} of all that helps it.`;
    const id = element("div", { class: "id" }, "id ", isolate(queries.id[i]));
    byId("query-text").replaceChildren(...turns(queries, i), id);
    const rows = queries.rows[i];
    const onIt = (first) => ["influence on it", (place) => signed(queries.influence[i][first + place])];
    fill(byId("helps"), rows.slice(0, helping), onIt(0));
    fill(byId("hurts"), rows.slice(helping), onIt(helping));
  }

  function chooseQuery(i) {
    state.query = String(i);
    showQuery();
    writeAddress();
  }

  function connectQueries() {
    fillMap();
    byId("query").append(...data.queries.id.map((_, i) => element("option", { value: i, dir: "auto" }, labelOf(i))));
    byId("query").addEventListener("change", () => chooseQuery(Number(byId("query").value)));
    byId("query-previous").addEventListener("click", () => chooseQuery(Number(state.query) - 1));
    byId("query-next").addEventListener("click", () => chooseQuery(Number(state.query) + 1));
    fillUncovered();
    showQuery();
  }

  // ------------------------------------------------------------------------------------------------------- start

  fillTopics();
  readAddress();
  showExamples();
  if (data.copies.length) fillGroups();
  if (data.queries) connectQueries();
  connect();
})();
