"""report.html: hostile text stays text, big runs stay small pages, and a real browser can use it."""

import collections
import json
import re

import browser
import numpy as np
import pytest
from browser import needs_browser
from hypothesis import given, settings
from hypothesis import strategies as st
from made_run import make_record, make_records, make_run, make_summary

from in2core_jax.data.records import Record
from in2core_jax.errors import printable
from in2core_jax.report import findings, html_page, templating

ATTACK = "document.title='hacked';document.documentElement.setAttribute('data-hacked','1')"
HOSTILE = (
  f"<script>{ATTACK}</script>",
  f"</script><script>{ATTACK}</script>",
  f'<!--<script>--><img src=x onerror="{ATTACK}">',
  f'<svg onload="{ATTACK}"></svg></title></style></textarea>',
  f'\'"><iframe srcdoc="<script>parent.{ATTACK}</script>"></iframe>',
  "{{ 7 * 7 }} {% raw %} ${7 * 7} &lt;b&gt; &amp;amp;",
  "right to left \u202e\u2066 txt.exe \u202b\u05d0\u05d1 never closed",
  "line\u2028and\u2029paragraph\u0000nul\u0007bell",
  "x" * 100_000,
  "a b " * 25_000,
)
CSP = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


def hostile_run(texts=HOSTILE, **changes):
  """Every text as prompt, response, id and topic, of training and evaluation examples, and in warnings and flags."""
  texts = list(texts)
  records = []
  for i, text in enumerate(texts):
    messages = ({"role": "user", "content": text}, {"role": "assistant", "content": text})
    records.append(Record(f"{i}{text}", messages, text, "{}", "made.jsonl", i + 1))
  summary = make_summary(warnings=texts)
  summary["identity"]["flags"] |= {f"flag{i}": text for i, text in enumerate(texts)}
  made = make_run(make_records(len(texts)), len(texts), summary=summary)
  columns = dict(made.columns) | {
    "example_id": np.array([record.example_id for record in records], dtype=object),
    "topic": np.array(texts, dtype=object),
    "choice": np.where(made.selected, made.columns["rank"], 0),
    "reason": np.array([f"in turn for query {printable(f'{i}{t}'[:80])}, round 1" for i, t in enumerate(texts)]),
  }
  retrain = {"table": [retrain_row(texts[0])], "verdict": texts, "recipe": {texts[1]: texts[2]}}
  retrain |= {"candidate": texts[0], "warnings": texts}
  given = {"columns": columns, "records": records, "query_records": records, "retrain": retrain} | changes
  return make_run(records, len(texts), summary=summary, layers={"layer <b>": made.influence}, **given)


def retrain_row(policy):
  names = ("perplexity", "example_perplexity")
  intervals = {f"{name}_{end}": None for name in names for end in ("low", "high")}
  counts = {"seeds": 1, "examples": 5, "response_tokens": 10, "steps": 3, "trained_tokens": 30}
  return {"policy": policy, **counts, "perplexity": 16.25, "example_perplexity": 32.5} | intervals


def embedded(page):
  (script,) = browser.parse(page).all("script", type="application/json")
  return json.loads(script.content)


# ----------------------------------------------------------------------------------------------- without a browser


@settings(deadline=None)
@given(st.recursive(st.text(st.characters()) | st.integers(), lambda inner: st.lists(inner, max_size=3)))
def test_embedded_json_is_read_back_and_holds_no_markup(value):
  text = html_page.embed_json(["<&>\u2028\u2029\ud800", value])
  assert json.loads(text) == ["<&>\u2028\u2029\ud800", value]
  assert not re.search("[<>&\u2028\u2029\ud800-\udfff]", text)
  text.encode()


def test_numbers_that_json_cannot_hold_are_refused():
  with pytest.raises(ValueError, match="JSON"):
    html_page.embed_json({"x": float("nan")})


def shape(page):
  """How often each tag occurs with its attributes' names: what a text could change only by becoming markup."""
  return collections.Counter((node.tag, tuple(sorted(node.attributes))) for node in browser.parse(page).all())


def test_hostile_text_adds_no_markup():
  page = html_page.select_page(hostile_run())
  # The same words with dots for all signs: near-duplicates, and so the sections, are the same.
  tame = html_page.select_page(hostile_run(re.sub(r"[^\w\s]", ".", text) for text in HOSTILE))
  assert shape(page) == shape(tame)
  assert len(browser.parse(page).all("script")) == 2
  assert HOSTILE[0] in embedded(page)["examples"]["texts"][0] and HOSTILE[0] not in page
  page.encode()


def test_texts_arrive_as_they_are():
  data = embedded(html_page.select_page(hostile_run()))
  assert data["examples"]["asked"] == list(range(len(HOSTILE)))
  assert data["examples"]["asked_texts"][0] == HOSTILE[0]
  assert data["examples"]["texts"] == [[text, text] for text in HOSTILE]
  assert data["examples"]["roles"] == ["ur"] * len(HOSTILE)
  assert data["queries"]["texts"][:-2] == [[text, text] for text in HOSTILE[:-2]]
  page = html_page.select_page(make_run([make_record(0, "a", "b", "lone \ud800"), make_record(1, "c", "d")]))
  page.encode()
  assert embedded(page)["topics"] == ["", "lone \ud800"]


def test_only_turns_after_the_first_user_are_responses():
  roles = ("system", "assistant", "user", "assistant", "user", "assistant")
  messages = tuple({"role": role, "content": role} for role in roles)
  run = make_run([Record("a", messages, "", "{}", "x", 1), make_record(1, "p", "r")])
  assert embedded(html_page.select_page(run))["examples"]["roles"] == ["saurur", "ur"]


def test_columns_are_those_of_the_run():
  run = make_run(make_records(40), 5)
  data = embedded(html_page.select_page(run))
  examples = data["examples"]
  assert examples["id"] == list(run.columns["example_id"]) and examples["rank"] == run.columns["rank"].tolist()
  np.testing.assert_allclose(examples["influence"], run.influence, rtol=1e-5)
  assert [bit == "1" for bit in examples["selected"]] == run.selected.tolist()
  assert [data["topics"][topic] for topic in examples["topic"]] == list(run.columns["topic"])
  for query in range(5):
    rows, scores = data["queries"]["rows"][query], run.queries[query]
    order = np.argsort(-scores, kind="stable").tolist()
    helps = [row for row in order[:10] if scores[row] > 0]
    assert rows[: len(helps)] == helps and rows[len(helps) :] == [r for r in order[::-1][:10] if scores[r] < 0]
    np.testing.assert_allclose(data["queries"]["influence"][query], scores[rows], rtol=1e-5)

  only_help = embedded(html_page.select_page(make_run(run.records, 5, queries=np.abs(run.queries))))["queries"]
  assert [len(rows) for rows in only_help["rows"]] == [10] * 5  # nobody hurts them


@pytest.fixture(scope="module")
def large_page():
  """50 thousand examples with 1.1 kB of text each, more than the page has room for, and a long one on top."""
  records = [make_record(i, f"number {i}.", f"w{i:06d} " * 140) for i in range(50_000)]
  run = make_run(records)
  records[run.order[0]] = make_record(-1, "unlike any other", "response " * 4_000)
  return run, html_page.select_page(run)


def test_fifty_thousand_examples_make_a_small_page(large_page):
  run, page = large_page
  assert len(page.encode()) < 16e6
  examples = embedded(page)["examples"]
  assert len(examples["id"]) == 50_000
  top, middle, bottom = run.order[[0, 25_000, -1]].tolist()
  assert examples["texts"][top][1] == "response " * 4_000
  assert examples["texts"][middle] == [f"number {middle}.", [f"w{middle:06d} " * 10, 1040]]
  assert examples["texts"][bottom][1] == f"w{bottom:06d} " * 140
  shown = " ".join(browser.parse(page).text("examples").split())
  assert (
    "49,800 texts are cut to 160 characters" in shown and "Longer texts of 200 strong examples are in full" in shown
  )


def test_more_examples_than_the_page_lists(monkeypatch):
  monkeypatch.setattr(html_page, "LISTED", 20)
  monkeypatch.setattr(html_page, "FULL", 3)
  run = make_run(make_records(400), num_queries=2)
  page = html_page.select_page(run)
  data = embedded(page)
  partners = {row for scores in run.queries for row in html_page._partners(scores)}
  copies = {row for group in run.top_copies for row in group.rows}
  expected = sorted({*run.order[:10].tolist(), *run.order[-10:].tolist(), *partners, *copies})
  assert data["examples"]["id"] == [run.records[row].example_id for row in expected]
  listed = [run.records[expected[place]].example_id for place in data["queries"]["rows"][1]]
  assert listed == [run.records[row].example_id for row in html_page._partners(run.queries[1])]
  assert f"lists {len(expected)} of 400 examples" in browser.parse(page).text("examples")


def test_same_run_same_bytes_and_nothing_of_the_machine():
  first, second = (html_page.select_page(make_run(make_records(30), 4)) for _ in range(2))
  assert first == second
  assert "123.456" not in first and "some-machine" not in first


def test_nothing_is_loaded_and_no_text_becomes_markup():
  page = html_page.select_page(make_run(make_records(5), 3))
  assert not re.search(r"(src|href|action)=[\"']?(?![\"'#])", page) and "@import" not in page and "url(" not in page
  script = (templating.TEMPLATES / "report.js").read_text()
  for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "Function(", "fetch", "XMLHttp"):
    assert word not in script
  assert "textContent" in script and "</" not in script


def test_sections_follow_what_was_measured():
  ids = lambda run: {node.attributes["id"] for node in browser.parse(html_page.select_page(run)).all("section")}  # noqa: E731
  always = {"warnings", "honesty", "scores", "examples", "kept", "solver"}
  assert ids(make_run(make_records(9))) == always
  twice = [make_record(0, "a b c", "d e f"), make_record(1, "a b c", "d e f"), make_record(2, "g", "h")]
  assert ids(make_run(twice)) == always | {"copies"}
  retrain = {"table": [retrain_row("random")], "verdict": ["random: better"], "recipe": {"steps": 3}}
  run = make_run(make_records(9), 3, retrain=retrain)
  assert ids(run) == always | {"coverage", "layers", "retrain"}
  shown = browser.parse(html_page.select_page(run)).text("retrain")
  assert "random: better" in shown and "16.250" in shown and "example perplexity" in shown and "nan" not in shown


def first_screen(run):
  return browser.parse(html_page.select_page(run)).all("header")[0].content


def test_the_first_screen_answers_with_three_numbers():
  said = " ".join(first_screen(make_run(make_records(40))).split())
  assert "Cannot tell: nothing in this run measures what the rule proponents is worth here." in said
  assert "examples kept 20 50.0% of 40 examples" in said and "duplicates 0 kept; 0 in the training set" in said
  row = retrain_row("mine") | {"to_random": 0.9, "to_random_low": 0.8, "to_random_high": 0.95}
  row |= {f"example_{name}": row[name] for name in ("to_random", "to_random_low", "to_random_high")}
  run = make_run(make_records(40), retrain={"table": [row], "verdict": [], "recipe": {}, "candidate": "mine"})
  assert "Use this set: retrained on it" in " ".join(first_screen(run).split())
  figure = browser.parse(html_page.select_page(run)).all("figure")[0]
  assert "This set, by token: 0.9 times random's, 95 % interval 0.8 to 0.95" in figure.content
  assert len(browser.parse(html_page.select_page(make_run(make_records(40)))).all("figure")) == 3  # none of a gain
  assert "lines are 95 % intervals" in figure.content
  bare = {"to_random": 0.9, "to_random_low": None, "to_random_high": None, "example_to_random": 1.1}
  bare |= {"example_to_random_low": None, "example_to_random_high": None}
  once = {"table": [row | bare], "verdict": [], "recipe": {}, "candidate": "mine"}
  page = browser.parse(html_page.select_page(make_run(make_records(40), retrain=once)))
  assert "without intervals" in page.all("figure")[0].content and "may be chance" in page.all("header")[0].content


def test_warnings_come_first_and_what_is_fine_is_folded():
  run = make_run(make_records(40), summary=make_summary(warnings=[f"Warning {i}." for i in range(5)]))
  section = browser.parse(html_page.select_page(run)).id("warnings")
  hidden = [details.content for details in section.all("details")]
  every = findings.warnings(run)
  assert [node.content.strip() for node in section.all(class_="mind")] == every and len(every) > 5
  assert f"{len(every) - 3} more warnings" in hidden[0] and all(text in hidden[0] for text in every[3:])
  assert not any(text in hidden[0] for text in every[:3])
  assert [node.content.strip() for node in section.all(class_="fine")] == findings.fine(run)
  assert f"{len(findings.fine(run))} checks are fine" in hidden[1]


def luminance(colour):
  parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
  red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_letters_stand_out_from_their_ground(theme):
  """WCAG 2.1, 1.4.3: at least 4.5 to 1."""
  style = (templating.TEMPLATES / "report.css").read_text()
  colours = dict(re.findall(r"--(\w+): (#\w{6});", style.split(":root {")[1 + theme].split("}")[0]))
  for ground in ("paper", "panel", "response"):
    for ink in ("ink", "soft", "link", "mind", "fine"):
      bright, dark = sorted((luminance(colours[ink]), luminance(colours[ground])), reverse=True)
      assert (bright + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)


# -------------------------------------------------------------------------------------------- in a real browser


def drive(page, script):
  """The page with a script that plays the user and notes what it saw; without the policy that forbids such scripts."""
  note = "const note = (value) => { const p = document.createElement('pre'); p.id = 'note'; p.textContent = "
  note += "JSON.stringify(value); document.body.append(p); };"
  page = CSP.sub("", page, count=1)
  return page.replace("</body>", f"<script>{note}\n{script}</script></body>")


def load(tmp_path, page, address=""):
  path = tmp_path / "report.html"
  path.write_text(page, encoding="utf-8")
  return browser.load(path, address, tmp_path)


def shown_ids(document, table="table"):
  return [
    node.content for row in document.id(table).all("tr") for node in row.all(class_="id") for node in node.all("bdi")
  ]


HOSTILE_USER = """
const words = [...document.querySelectorAll('#table tbody tr')].map((row) => {
  const button = row.querySelectorAll('.turn')[1].querySelector('button');
  const before = row.querySelectorAll('.words')[1].textContent.length;
  if (button) button.click();
  return [row.dataset.row, row.querySelectorAll('.words')[1].textContent, button ? before : null];
});
const style = getComputedStyle(document.querySelector('.words')).unicodeBidi;
note({words, style, title: document.title, hacked: document.documentElement.dataset.hacked || null,
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  scripts: document.scripts.length, foreign: document.querySelectorAll('iframe, img, svg[onload], b').length});
"""


@needs_browser
def test_hostile_text_runs_nothing_and_is_shown(tmp_path):
  """Without the content security policy, so that the escaping alone has to hold."""
  seen = json.loads(load(tmp_path, drive(html_page.select_page(hostile_run()), HOSTILE_USER)).text("note"))
  assert seen["title"] == "Selection report: proponents" and seen["hacked"] is None
  assert seen["scripts"] == 3 and seen["foreign"] == 0
  assert seen["style"] == "isolate" and seen["wide"] == 0
  assert {int(row): text for row, text, _ in seen["words"]} == dict(enumerate(HOSTILE))
  before = {int(row): length for row, _, length in seen["words"]}
  assert [row for row, length in sorted(before.items()) if length] == [8, 9] and before[8] == 602


@needs_browser
def test_the_policy_stops_foreign_scripts_and_not_ours(tmp_path):
  page = html_page.select_page(make_run(make_records(30)))
  document = load(tmp_path, page.replace("</body>", f"<script>{ATTACK}</script></body>"))
  assert document.all("title")[0].content == "Selection report: proponents"
  assert "data-hacked" not in document.all("html")[0].attributes
  assert document.text("status") == "30 examples, page 1 of 2"


def in_lengths(run, low, high):
  rows = np.flatnonzero((run.response_tokens >= low) & (run.response_tokens <= high))
  return sorted(rows, key=lambda row: (-run.response_tokens[row], row))


# What stands in the address -> what the page says, and the rows that it shows. Topic 1 is letters, after "".
ADDRESSES = {
  "": ("90 examples, page 1 of 5", lambda run: run.order[:20]),
  "page=5&sort=opponents": ("90 examples, page 5 of 5", lambda run: run.order[::-1][80:]),
  "search=NUMBER+7": ("11 of 90 examples, page 1 of 1", lambda run: [r for r in run.order if str(r)[0] == "7"]),
  "show=selected&topic=1&sort=source": (
    "{} of 90 examples, page 1 of 1",
    lambda run: [row for row in range(90) if run.selected[row] and row % 3 == 0],
  ),
  "min=10&max=12&sort=longest": ("{} of 90 examples, page 1 of 1", lambda run: in_lengths(run, 10, 12)),
  "sort=loss": ("90 examples, page 1 of 5", lambda run: np.argsort(-np.array(run.columns["loss"]))[:20]),
  "page=99&sort=nonsense&topic=44&min=-3&search=": ("90 examples, page 5 of 5", lambda run: run.order[80:]),
  "kept": ("90 examples, page 5 of 5", lambda run: run.order[80:]),  # a link to a section leaves all as it was
  "search=nowhere": ("0 of 90 examples, page 1 of 1", lambda run: []),
}
WALK = """
(async () => {
  const seen = [];
  for (const address of ADDRESSES) {
    location.hash = '#' + address;
    await new Promise((done) => setTimeout(done, 50));
    const rows = [...document.querySelectorAll('#table tbody tr')].map((row) => Number(row.dataset.row));
    seen.push([document.getElementById('status').textContent, rows]);
  }
  note(seen);
})();
"""


@needs_browser
def test_the_address_says_what_is_shown(tmp_path):
  run = make_run(make_records(90))
  script = WALK.replace("ADDRESSES", json.dumps(list(ADDRESSES)))
  seen = json.loads(load(tmp_path, drive(html_page.select_page(run), script), "page=2").text("note"))
  for (status, expected), found in zip(ADDRESSES.values(), seen, strict=True):
    rows = [int(row) for row in expected(run)]
    assert found == [status.format(len(rows)), rows]


@needs_browser
def test_an_address_can_be_sent_to_others(tmp_path):
  run = make_run(make_records(90), 4)
  document = load(tmp_path, html_page.select_page(run), "page=2&sort=opponents&query=3")
  assert document.text("status") == "90 examples, page 2 of 5"
  assert shown_ids(document) == [run.records[row].example_id for row in run.order[::-1][20:40]]
  assert document.text("query-status").startswith("Evaluation example 4 of 4")


CHOSEN = """
const rows = [...document.querySelectorAll('#table tbody tr')];
note({order: rows.map((row) => Number(row.dataset.row)),
  tags: rows.map((row) => row.querySelector('.tag').textContent),
  reasons: rows.map((row) => row.querySelector('.reason')?.textContent ?? null),
  sort: document.getElementById('sort').value});
"""


def test_a_turn_shows_what_its_query_asks():
  made = make_run(make_records(6), 2)
  reason = ["", "in turn for query example-1, round 1,234", "in turn for query example-9, round 1", "x", "", ""]
  columns = dict(made.columns) | {"choice": np.arange(6), "reason": np.array(reason, dtype=object)}
  examples = embedded(html_page.select_page(make_run(made.records, 2, columns=columns)))["examples"]
  assert examples["asked"] == [-1, 0, -1, -1, -1, -1] and examples["reason"] == reason
  assert examples["asked_texts"] == [made.query_records[1].messages[0]["content"]]
  other = embedded(html_page.select_page(make_run(made.records, columns=columns)))["examples"]
  assert "asked" not in other


@needs_browser
def test_the_list_begins_with_the_order_of_choice_and_its_reasons(tmp_path):
  records = make_records(12)
  made = make_run(records)
  choice, reason = np.zeros(12, np.int64), np.full(12, "", dtype=object)
  choice[[7, 2, 9]], reason[[7, 2, 9]] = [1, 2, 3], ["drawn at random", "<b>in turn</b>", "rank 3 of 12 by influence"]
  columns = dict(made.columns) | {"choice": choice, "reason": reason, "selected": choice > 0}
  run = make_run(records, columns=columns)
  seen = json.loads(load(tmp_path, drive(html_page.select_page(run), CHOSEN)).text("note"))
  assert seen["order"] == run.first.tolist() and seen["order"][:3] == [7, 2, 9] and seen["sort"] == "choice"
  assert seen["tags"] == ["choice 1", "choice 2", "choice 3", *["left out"] * 9]
  assert seen["reasons"] == ["drawn at random", "<b>in turn</b>", "rank 3 of 12 by influence", *[None] * 9]


USER = """
const steps = {};
const $ = (id) => document.getElementById(id);
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const look = () => [$('status').textContent, location.hash, [...document.querySelectorAll('#table tbody tr')].length];
const key = (name) =>
  document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: name, bubbles: true, cancelable: true}));
const named = (node) => node.textContent.trim() || node.ariaLabel || [...node.labels].some((l) => l.textContent.trim());
const nameless = () => [...document.querySelectorAll('button, input, select')].filter((node) => !named(node));
(async () => {
  $('next').click(); steps.next = look();
  $('last').click(); steps.last = look();
  $('search').value = 'number 1'; $('search').dispatchEvent(new Event('input')); await wait(400); steps.search = look();
  $('show').value = 'selected'; $('show').dispatchEvent(new Event('change')); steps.show = look();
  $('filters').querySelector('[type=reset]').click(); await wait(50); steps.reset = look();
  $('query').value = '2'; $('query').dispatchEvent(new Event('change')); steps.picked = $('query-status').textContent;
  $('query-next').click(); steps.stepped = [$('query-status').textContent, location.hash];
  document.querySelector('#map [tabindex="0"]').focus(); key('ArrowRight'); key('End'); key('ArrowLeft');
  steps.focus = document.activeElement.dataset.query;
  document.activeElement.click(); steps.pressed = $('query-status').textContent;
  steps.helps = [...document.querySelectorAll('#helps tbody tr')].map((row) => row.dataset.row);
  steps.hurts = [...document.querySelectorAll('#hurts tbody tr')].map((row) => row.dataset.row);
  steps.ends = ['#helps', '#hurts'].map((id) => document.querySelector(id + ' tbody td').textContent);
  steps.stops = document.querySelectorAll('#map [tabindex="0"]').length;
  document.querySelector('#groups summary').click(); await wait(50);
  steps.copies = [...document.querySelectorAll('#groups tbody tr')].map((row) => row.dataset.row);
  steps.nameless = nameless().length;
  steps.captions = [...document.querySelectorAll('table')].filter((table) => !table.caption).length;
  steps.first = document.querySelector('a, button, input, select').className;
  document.querySelector('.skip').click(); await wait(50);
  steps.skipped = [document.activeElement.id, $('status').textContent];
  location.hash = '#page=3'; await wait(50); steps.address = look();
  note(steps);
})();
"""


@needs_browser
def test_a_user_filters_pages_and_picks_an_evaluation_example(tmp_path):
  records = make_records(90)
  made = make_run(records, 6)
  first, last = made.order[0], made.order[40]
  records[last] = make_record(last, records[first].messages[0]["content"], records[first].messages[1]["content"] + " x")
  run = make_run(records, 6)
  seen = json.loads(load(tmp_path, drive(html_page.select_page(run), USER)).text("note"))
  assert seen["next"] == ["90 examples, page 2 of 5", "#page=2", 20]
  assert seen["last"] == ["90 examples, page 5 of 5", "#page=5", 10]
  assert seen["search"] == ["11 of 90 examples, page 1 of 1", "#search=number+1", 11]
  kept = sum(run.selected[row] for row in range(90) if str(row)[0] == "1")
  assert seen["show"] == [f"{kept} of 90 examples, page 1 of 1", "#search=number+1&show=selected", kept]
  assert seen["reset"] == ["90 examples, page 1 of 5", "", 20]
  assert seen["picked"].startswith("Evaluation example 3 of 6: mean influence received")
  assert seen["stepped"][0].startswith("Evaluation example 4 of 6") and seen["stepped"][1] == "#query=3"
  assert seen["focus"] == "2"  # cells by topic: 0 3, 1 4, 2 5
  assert seen["pressed"].startswith("Evaluation example 3 of 6") and seen["stops"] == 1
  scores = run.queries[2]
  order = np.argsort(-scores, kind="stable").tolist()
  assert [int(row) for row in seen["helps"]] == order[:10] and [int(row) for row in seen["hurts"]] == order[::-1][:10]
  assert [float(end) for end in seen["ends"]] == pytest.approx([scores.max(), scores.min()], rel=1e-3)
  assert [int(row) for row in seen["copies"]] == [first, last]
  assert seen["nameless"] == 0 and seen["captions"] == 0
  assert seen["first"] == "skip" and seen["skipped"] == ["main", "90 examples, page 1 of 5"]
  assert seen["address"] == ["90 examples, page 3 of 5", "#page=3", 20]


@needs_browser
@pytest.mark.real
def test_fifty_thousand_examples_in_a_browser(tmp_path, large_page):
  run, page = large_page
  document = load(tmp_path, page, "page=2500")
  assert document.text("status") == "50,000 examples, page 2,500 of 2,500"
  assert shown_ids(document) == [run.records[row].example_id for row in run.order[-20:]]
  assert len(document.all()) < 2_000  # only the page that is looked at is in the document
  document = load(tmp_path, page, "search=number+777.")
  assert document.text("status") == "1 of 50,000 examples, page 1 of 1"
  assert shown_ids(document) == ["example-777"]


NARROW = """
const frame = document.createElement('iframe');
frame.style.cssText = 'width:360px;height:800px;border:0';
frame.srcdoc = document.getElementById('page').textContent;
frame.onload = () => {
  const inside = frame.contentDocument.documentElement;
  const ground = frame.contentWindow.getComputedStyle(frame.contentDocument.body).backgroundColor;
  const texts = [...inside.querySelectorAll('td.text')].map((cell) => cell.offsetWidth);
  const cut = [...inside.querySelectorAll('.wide')].filter((place) => place.scrollWidth > place.clientWidth);
  const bare = cut.filter((place) => !frame.contentWindow.getComputedStyle(place).backgroundImage.includes('gradient'));
  note([inside.clientWidth, inside.scrollWidth, Math.max(...texts), ground, cut.length, bare.length]);
};
document.body.append(frame);
"""


@needs_browser
@pytest.mark.parametrize(("flags", "ground"), [((), "rgb(255, 255, 255)"), (("--force-dark-mode",), "rgb(21, 24, 28)")])
def test_a_phone_has_nothing_to_scroll_sideways_in_light_and_dark(tmp_path, flags, ground):
  page = CSP.sub("", html_page.select_page(hostile_run()), count=1)
  holder = (
    f'<!doctype html><body><textarea id="page">{page.replace("&", "&amp;").replace("<", "&lt;")}</textarea></body>'
  )
  path = tmp_path / "holder.html"
  path.write_text(drive(holder, NARROW), encoding="utf-8")
  width, needed, text, colour, cut, bare = json.loads(browser.load(path, "", tmp_path, *flags).text("note"))
  assert width in range(340, 361) and needed == width and colour == ground
  assert 0 < text < width  # nor does a text inside its table
  assert cut == bare == 0  # and no table goes on beyond its side
