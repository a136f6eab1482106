"""Tables, plots and reports; hostile text is rendered by a real Markdown renderer."""

import csv
import io
import math
import re

import matplotlib.image
import numpy as np
import pytest
from markdown_it import MarkdownIt

from in2core_jax.errors import UserError
from in2core_jax.report import table_text
from in2core_jax.report.markdown import retrain_report_markdown, score_histogram_text, select_report_markdown
from in2core_jax.report.plots import curve_plot, figure_bytes, perplexity_plot, residual_plot, score_histogram_plot

HOSTILE = [
  "<script>alert(1)</script>",
  "<img src=x onerror=alert(1)>",
  "[click](javascript:alert(1)) ![pic](http://x.y/z.png)",
  "see https://evil.example/a or www.evil.example or <https://evil.example>",
  "# heading",
  "- item",
  "1. item",
  "| a | b |\n|---|---|\n| c | d |",
  "**bold** _em_ `code` ~~gone~~ ***x*** __y__",
  "```\nfence",
  "&lt;script&gt; &amp; &#60;",
  "> quote",
  "\\<script>\\`x\\`",
  "[ref]: http://evil.example",
  "--- \n===\n",
  "    indented code",
]


def render(markdown):
  return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown)


def shown(html):
  text = re.sub(r"<[^>]*>", "", html).strip()
  for entity, char in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
    text = text.replace(entity, char)
  return text


# ------------------------------------------------------------------------------------------------- escaping


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_as_it_is(text):
  html = render(table_text.escape_markdown(text))
  assert re.findall(r"<[^>]*>", html) == ["<p>", "</p>"]  # a paragraph, and nothing else
  assert shown(html) == table_text.plain_line(text)
  cell = render(table_text.markdown_table([{"a": text, "b": 1}]))
  assert len(re.findall("<td", cell)) == 2 and len(re.findall("<tr>", cell)) == 2
  assert set(re.findall(r"<(\w+)", cell)) == {"table", "thead", "tbody", "tr", "th", "td"}
  assert table_text.plain_line(text) in shown(cell)


def test_urls_do_not_become_links_by_themselves():
  for text in ("http://a.b", "HTTPS://a.b", "www.a.b"):
    escaped = table_text.escape_markdown(text)
    assert not re.search(r"(?<!\\)://", escaped) and "www.a" not in escaped
    assert shown(render(escaped)) == text


def test_plain_line():
  assert table_text.plain_line("  a\r\n\r\n b\tc\u2028d  ") == "a ⏎ b c ⏎ d"
  assert table_text.plain_line("x\u202egnp.exe\u200b\x00\ud800") == "x\ufffdgnp.exe\ufffd\ufffd\ufffd"
  assert table_text.plain_line("Grüße, 你好, 🙂") == "Grüße, 你好, 🙂"
  cut = table_text.plain_line("word " * 20_000, 50)  # 100 kB on one line
  assert len(cut) <= 50 and cut.endswith("…") and cut.startswith("word word")
  table_text.plain_line("\ud800").encode()  # a lone surrogate would fail to be written


# --------------------------------------------------------------------------------------------------- tables


def test_markdown_table():
  rows = [{"policy": "top_half", "n": 1400, "ppl": 3.14159, "ok": True}, {"policy": "a|b", "ppl": math.nan}]
  assert table_text.markdown_table(rows) == (
    "| policy | n | ppl | ok |\n|---|---:|---:|---|\n| top_half | 1400 | 3.142 | yes |\n| a\\|b |  | - |  |\n"
  )
  assert table_text.markdown_table(rows, ["ppl", "policy"], digits=2).splitlines()[2] == "| 3.1 | top_half |"
  assert table_text.markdown_table([], ["a", "b"]) == "| a | b |\n|---|---|\n"
  with pytest.raises(UserError, match="at least one row"):
    table_text.markdown_table([])


def test_format_value():
  values = [None, True, np.int32(1234567), 1234567.0, np.float32(0.5), 1e-9, -0.25, "x"]
  assert [table_text.format_value(v) for v in values] == [
    "",
    "yes",
    "1234567",
    "1.235e+06",
    "0.5",
    "1e-09",
    "-0.25",
    "x",
  ]


def test_latex_table():
  rows = [{"policy": r"a_b & 50% #1 $x$ {y} ~^\ <z>", "ppl": 3.14159}]
  table = table_text.latex_table(rows, caption="Best_half")
  assert (
    r"a\_b \& 50\% \#1 \$x\$ \{y\} \textasciitilde{}\textasciicircum{}\textbackslash{} \textless{}z\textgreater{}"
    in table
  )
  assert r"\begin{tabular}{lr}" in table and r"\caption{Best\_half}" in table and " & 3.142 \\\\\n" in table
  assert [table.count(r"\begin"), table.count(r"\end")] == [2, 2]


def test_csv_table():
  rows = [{"a": 'x,"y"\nz', "b": np.float64(1 / 3)}, {"a": "=HYPERLINK(1)", "b": -1, "c": None}]
  table = list(csv.reader(io.StringIO(table_text.csv_table(rows))))
  assert table == [["a", "b", "c"], ['x,"y"\nz', repr(1 / 3), ""], ["'=HYPERLINK(1)", "-1", ""]]


# ---------------------------------------------------------------------------------------------------- plots


def table_rows():
  values = [
    ("full", 1, 3.32, math.nan),
    ("random", 3, 4.06, 0.15),
    ("proponents", 3, 7.86, 0.4),
    ("matching", 3, 3.9, 0.1),
  ]
  rows = []
  for policy, seeds, mean, half in values:
    row = {"policy": policy, "seeds": seeds, "examples": 700, "response_tokens": 9000, "steps": 100}
    row |= {"trained_tokens": 18000}
    for name in ("perplexity", "example_perplexity"):
      spread = 0.0 if math.isnan(half) else half / 2
      row |= {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}
      row |= {f"{name}_min": mean - spread, f"{name}_max": mean + spread}
    rows.append(row)
  return rows


def figures():
  rng = np.random.default_rng(0)
  scores = np.append(rng.standard_t(3, 1000) * 0.01 + 0.004, [5.0, -9.0])  # two extreme values
  steps = np.arange(1, 41)
  curve = np.exp(-steps / 8)[:, None] * rng.uniform(0.5, 1.5, (1, 6)) + 0.01
  sweep = {n: ([5, 10, 25, 50, 100], [9 - i, 7, 5, 4, 3.3]) for i, n in enumerate(("proponents", "random", "matching"))}
  return {
    "histogram": score_histogram_plot(scores, scores > np.median(scores)),
    "residual": residual_plot(curve),
    "perplexity": perplexity_plot(table_rows()),
    "sweep": curve_plot(sweep, "fraction of the training set (%)", "test perplexity", log="x"),
  }


def test_plots_are_drawn_and_repeatable():
  for figure in figures().values():
    image = matplotlib.image.imread(io.BytesIO(figure_bytes(figure)), format="png")
    assert image.shape[1] == 960 and 0.05 < np.mean(image[..., :3].min(axis=2) < 0.99) < 0.8  # neither blank nor full
    again = figures()["residual"]
  for kind in ("png", "svg"):
    assert figure_bytes(again, kind) == figure_bytes(figures()["residual"], kind)
  assert figure_bytes(again, "svg").startswith(b"<?xml")
  with pytest.raises(UserError, match="pdf is unknown"):
    figure_bytes(again, "pdf")


def test_score_histogram_plot_counts_every_example():
  axes = figures()["histogram"].axes[0]
  heights = sum(patch.get_height() for patch in axes.patches)
  assert heights == 1002  # extremes too
  assert [t.get_text() for t in axes.get_legend().get_texts()] == ["selected (501)", "left out (501)"]
  constant = score_histogram_plot(np.zeros(10), np.arange(10) < 5)
  assert sum(p.get_height() for p in constant.axes[0].patches) == 10


def test_perplexity_plot_has_best_on_top_and_random_as_a_band():
  axes = perplexity_plot(table_rows()).axes[0]
  assert [t.get_text() for t in axes.get_yticklabels()] == ["proponents", "random", "matching", "full"]
  assert axes.get_legend().get_texts()[0].get_text() == "range of 3 random sets"
  with pytest.raises(UserError, match="no retrained models"):
    perplexity_plot([])


# -------------------------------------------------------------------------------------------------- reports


def select_columns(size=60):
  influence = np.linspace(1, -1, size)
  return {
    "example_id": [f"id{i}" for i in range(size)],
    "influence": influence,
    "rank": np.arange(1, size + 1),
    "selected": np.arange(size) < size // 2,
    "loss": np.ones(size),
    "num_tokens": np.full(size, 20),
    "num_response_tokens": np.full(size, 8),
    "topic": ["kept" if i < size // 2 else "dropped" for i in range(size)],
  }


def test_select_report():
  columns = select_columns()
  texts = [HOSTILE[i % len(HOSTILE)] + f" text{i}" for i in range(60)]
  columns["topic"][59] = "<b>bad|topic"
  page = select_report_markdown(
    columns,
    texts,
    {"Solver": {"solver": "lissa", "residual": 0.01234567}},
    ["Topic '<i>x</i>' is dropped"],
    {"s": "s.svg"},
  )
  html = render(page)
  assert set(re.findall(r"<(\w+)", html)) <= set(
    re.findall(r"\w+", "h1 h2 p ul li table thead tbody tr th td pre code img")
  )
  assert html.count("<img") == 1 and '<img src="s.svg" alt="s"' in html
  top, bottom = page.split("## Strongest opponents")
  assert all(f"text{i} " in top for i in range(10)) and "text10 " not in top
  shown_ids = re.findall(r"\| (id\d+) \|", bottom)
  assert shown_ids == [f"id{i}" for i in range(59, 49, -1)]
  assert "30 of 60 examples are selected (50.0%), with 50.0% of the response tokens." in page
  assert "| dropped | 29 | 0 | 0 | 0 | 48.3 | 0 |" in page and "| kept | 30 | 30 | 100 | 100 | 50 | 100 |" in page
  assert "| residual | 0.01235 |" in page and "&lt;i&gt;x" in page
  assert page.count("\n```") == 2 and "## Warnings\n\nNone." not in page


def test_a_select_report_begins_with_the_answer_and_shows_the_first_choices_with_their_reasons():
  columns = select_columns()
  columns |= {"choice": np.where(columns["selected"], 31 - columns["rank"], 0)}  # the reverse of the ranking
  columns["reason"] = [f"in turn for query <b>q{i}</b>" if kept else "" for i, kept in enumerate(columns["selected"])]
  page = select_report_markdown(
    columns, ["x"] * 60, {}, answer=["Use this set", "a_b is better.", "By <i>example</i> too."]
  )
  assert page.startswith(
    "# Selection report\n\n**Use this set**: a\\_b is better. By &lt;i&gt;example&lt;/i&gt; too.\n"
  )
  table = page.split("## First choices\n\n")[1].split("\n\n")[0]
  assert table.splitlines()[0].startswith("| choice | why | rank |")
  assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [f"| {n}" for n in range(1, 11)]
  assert "in turn for query &lt;b&gt;q29&lt;/b&gt;" in table.splitlines()[2]
  few = select_columns(3) | {"choice": np.array([0, 1, 0]), "reason": ["", "drawn at random", ""]}
  first = select_report_markdown(few, ["x"] * 3, {}).split("## First choices\n\n")[1].split("\n\n")[0]
  assert len(first.splitlines()) == 3 and "drawn at random" in first


def test_select_report_with_many_topics():
  columns = select_columns(60) | {"topic": [f"t{i}" for i in range(60)]}
  page = select_report_markdown(columns, ["x"] * 60, {})
  assert len(re.findall(r"^\| t\d+ \|", page, re.MULTILINE)) == 50 and "10 more topics keep more." in page


def test_select_report_of_few_examples_and_none_left_out():
  columns = select_columns(3) | {"selected": np.ones(3, bool)}
  page = select_report_markdown(columns, ["a", "b", "c"], {})
  assert "3 of 3 examples" in page and "## Warnings\n\nNone." in page
  assert page.split("## Strongest opponents")[0].count("| id") == 3


def test_select_report_refuses():
  columns = select_columns(3)
  with pytest.raises(UserError, match="differ in length"):
    select_report_markdown(columns, ["a"], {})
  del columns["rank"]
  with pytest.raises(UserError, match="columns rank are missing"):
    select_report_markdown(columns, ["a", "b", "c"], {})


def test_score_histogram_text():
  scores = np.repeat([0.0, 1.0, 2.0], [10, 20, 10])
  lines = score_histogram_text(scores, scores > 0.5, bins=3, width=20).splitlines()
  assert [line.split("|")[1].strip() for line in lines] == ["." * 10, "#" * 20, "#" * 10]
  assert [line.split("|")[2].strip() for line in lines] == ["10 (0 selected)", "20 (20 selected)", "10 (10 selected)"]


def test_retrain_report():
  page = retrain_report_markdown(
    {"": (table_rows(), "First.\nmatching_quota: lower.")}, {"steps": 100}, {"p": "p.svg"}, notes=["Mind_this."]
  )
  assert "- First.\n- matching\\_quota: lower." in page
  assert "| full | 1 | 700 | 9000 | 100 | 18000 | 3.320 | 3.320 |" in page
  assert "4.060 (3.910 to 4.210)" in page and "| steps | 100 |" in page and "![p](p.svg)" in page
  assert page.count("Mind\\_this.") == 1 and "## Warnings" not in page
  warned = retrain_report_markdown({"": (table_rows(), "First.")}, warnings=["Too <few> tests."])
  assert warned.startswith(
    "# Retrain and compare\n\n## Warnings\n\n- Too &lt;few&gt; tests.\n\n## Comparison\n\n- First."
  )
