"""What a person should see of the data before anything is trained: counts, copies, overlap, what is not used."""

from __future__ import annotations

import collections
import itertools
from typing import Any

import numpy as np

from in2core_jax.data import media
from in2core_jax.data.hub import commits_of
from in2core_jax.data.records import content_digests, prompt_digests, shorten, sources_of, with_unread
from in2core_jax.errors import how_many, printable

_MOST_KEYS = 30  # that nobody reads, named one by one: a record whose keys are data may have thousands


def data_summary(parts: dict[str, Any]) -> dict[str, Any]:
  """Counts what a person should see before training.

  Args:
    parts: data sets (`tokenizing.TokenizedDataset`) by name, in the order train, eval, test.

  Returns:
    `parts[name]`: examples, tokens, response_tokens, truncated, empty_responses (no response token is left),
    duplicates (examples whose messages occurred before in the same part), topics {topic: examples}.
    `overlap["train/eval"]` and so on: same_messages, same_prompt: how many examples of the second part have messages,
    or a prompt, that also occur in the first.
    `template`, only where there is something to tell: `date` that the template prints, `changes[name]`: what stands in
    the records and is rendered otherwise or not at all, {words: turns}, `alike[name]`: records that differ, of which
    the template makes one text.
    `hub`, only where there are some: the commits that data sets of the Hub are of.
    `unread_keys`, only where there are some: {key that nobody reads: {"count": records, "first": place}}.
  """
  summary: dict[str, Any] = {"parts": {}, "overlap": {}}
  keys = {name: content_digests(part.records) for name, part in parts.items()}
  prompts = {name: prompt_digests(part.records) for name, part in parts.items()}
  for name, part in parts.items():
    responses = part.num_response_tokens
    summary["parts"][name] = {
      "examples": len(part),
      "tokens": int(part.num_tokens.sum(dtype=np.int64)),
      "response_tokens": int(responses.sum(dtype=np.int64)),
      "truncated": int(part.truncated.sum()),
      "empty_responses": int((responses == 0).sum()),
      "duplicates": len(part) - len(np.unique(keys[name])),
      "topics": dict(collections.Counter(part.topics).most_common()),
    }
  for first, second in itertools.combinations(parts, 2):
    summary["overlap"][f"{first}/{second}"] = {
      "same_messages": int(np.isin(keys[second], keys[first]).sum()),
      "same_prompt": int(np.isin(prompts[second], prompts[first]).sum()),
    }
  unread: dict[str, dict[str, Any]] = {}
  for record in (record for part in parts.values() for record in with_unread(part.records)):
    for key in record.unread:
      unread.setdefault(key, {"count": 0, "first": record.place})["count"] += 1
  summary |= {"unread_keys": unread} if unread else {}
  commits = commits_of(source for part in parts.values() for source in sources_of(part.records))
  summary |= {"hub": commits} if commits else {}
  dates = [part.template["date"] for part in parts.values() if "date" in part.template]
  template: dict[str, Any] = {"date": dates[0]} if dates else {}
  for key in ("changes", "alike"):
    found = {name: part.template[key] for name, part in parts.items() if key in part.template}
    template |= {key: found} if found else {}
  return summary | ({"template": template} if template else {})


def told_lines(summary: dict[str, Any]) -> list[str]:
  """What a `data_summary` has to tell of data that is not used, or not as it stands; one sentence each."""
  template, lines = summary.get("template", {}), []
  if "halved" in summary:
    lines.append(summary["halved"])
  if "skipped_records" in summary:
    skipped = summary["skipped_records"]
    reasons = "; ".join(f"{count:,} x {reason}" for reason, count in list(skipped["reasons"].items())[:3])
    lines.append(
      f"{how_many(skipped['count'], 'record[s] [is|are]')} left out by --skip_bad_records ({reasons}): "
      "skipped_records.jsonl"
    )
  unread = summary.get("unread_keys", {})
  for key, found in list(unread.items())[:_MOST_KEYS]:
    if key.endswith(media.IN_A_TEXT):
      lines.append(
        f"{key.removesuffix(media.IN_A_TEXT)!r} stands in texts of {how_many(found['count'], 'record')}, the first at "
        f"{found['first']}, and is learnt as plain text: images, audio and video cannot be read"
      )
      continue
    lines.append(
      f"the key {key[:120]!r} is not read: {how_many(found['count'], 'record[s] [has|have]')} it, the first at "
      f"{found['first']}; what it says is no part of the conversation"
    )
  if len(unread) > _MOST_KEYS:
    lines.append(
      f"and {how_many(len(unread) - _MOST_KEYS, 'more key[s] [is|are]')} not read: data_summary.json names all of them"
    )
  lines += [
    f"{commit}: named with its commit, the source has the same files at any time" for commit in summary.get("hub", ())
  ]
  if "date" in template:
    lines.append(f"the chat template prints a date: the date used is {template['date']} (--template_date)")
  for name, changes in template.get("changes", {}).items():
    counts = ", ".join(f"{words} in {count:,} turn{'s' * (count > 1)}" for words, count in changes.items())
    lines.append(f"{name}: the chat template does not render all as it stands in the records: {counts}")
  for name, count in template.get("alike", {}).items():
    lines.append(
      f"{name}: {how_many(count, 'example[s] that [differs becomes|differ become]')} equal to another one by this"
    )
  return lines


def format_summary(summary: dict[str, Any], max_topics: int = 6, told: bool = True) -> str:
  """Formats a `data_summary` as a small text table; `told`: with the sentences of `told_lines`."""
  columns = ("examples", "tokens", "response_tokens", "truncated", "empty_responses", "duplicates")
  rows = [("part", *(column.replace("_", " ") for column in columns))]
  rows += [(name, *(f"{part[column]:,}" for column in columns)) for name, part in summary["parts"].items()]
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = [
    "  ".join(
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    for row in rows
  ]
  for name, part in summary["parts"].items():
    named = [(shorten(topic, 60) or "(none)", count) for topic, count in part["topics"].items()]
    if len(named) > 1 or (named and named[0][0] != "(none)"):
      more = f", and {len(named) - max_topics} more" if len(named) > max_topics else ""
      lines.append(f"{name} topics: " + ", ".join(f"{t} {n:,}" for t, n in named[:max_topics]) + more)
  for pair, counts in summary["overlap"].items():
    lines.append(f"overlap {pair}: {counts['same_messages']:,} same messages, {counts['same_prompt']:,} same prompt")
  return "\n".join([*lines, *map(printable, told_lines(summary) if told else ())])
