"""Chat templates: responses, what is not rendered, dates, limits; control words inside texts."""

import dataclasses
import datetime
import json

import chat_templates as templates
import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers.utils import chat_template_utils

from in2core_jax.data import assets, template_program
from in2core_jax.data.chat_template import Renderer
from in2core_jax.data.summaries import data_summary, format_summary
from in2core_jax.data.tokenizing import Record, tokenize
from in2core_jax.errors import UserError
from in2core_jax.model.tokenizer import tokenizer_from_gguf
from in2core_jax.model.weights import EMBEDDED_MODEL
from in2core_jax.parallel import sharding
from in2core_jax.pipeline.loaded_model import LoadedModel, check_template_date
from in2core_jax.pipeline.session import make_session
from in2core_jax.pipeline.settings import Settings
from in2core_jax.pipeline.splits import Splits

CONTROL = (
  *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end|>"),
  *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "[INST]", "[/INST]", "<|call|>"),
)


def _bytes(template, control=CONTROL):
  """A byte-level tokenizer without merges: a token for each byte, and control tokens."""
  backend = Tokenizer(models.BPE({w: i for i, w in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, chat_template=template, bos_token="<s>", eos_token="</s>"
  )


def _user(text):
  return {"role": "user", "content": text}


def _answer(text, **more):
  return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "S"}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "get", "arguments": '{"city": "Ö"}'}}
RESULT = {"role": "tool", "content": "12", "tool_call_id": "abcdefghi"}
TOOL = {
  "type": "function",
  "function": {
    "name": "get",
    "description": "Weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
  },
}


def _record(*messages, tools=False):
  return Record("r", tuple(messages), "", "{}", "memory", 1, (TOOL,) if tools else ())


def _responses(dataset, tokenizer, row=0):
  """The text of each run of response tokens."""
  tokens, mask = dataset.tokens[row], dataset.response_mask[row]
  edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
  return [tokenizer.decode(tokens[start:stop]) for start, stop in edges.reshape(-1, 2)]


def _learnt(template, *messages, tools=False, system_prompt="default"):
  """(responses, what the template changed)"""
  tokenizer = _bytes(template)
  dataset = tokenize([_record(*messages, tools=tools)], tokenizer, 10_000, system_prompt)
  return _responses(dataset, tokenizer), dataset.template.get("changes", {})


# --- responses

# Template, terminator, what stands between the generation prompt and an answer: for the last, for those before.
PLAIN = [
  (templates.CHATML, "<|im_end|>", "", ""),
  (templates.NO_PROMPT, "<|im_end|>", "", ""),
  (templates.ALWAYS_HEADER, "<|im_end|>", "", ""),
  (templates.ALWAYS_HEADER_IN_LOOP, "<|im_end|>", "", ""),
  (f"{templates.NO_PROMPT}<|im_start|>assistant\n", "<|im_end|>", "", ""),  # Jinja drops the last line break
  (templates.QWEN25, "<|im_end|>", "", ""),
  (templates.QWEN3, "<|im_end|>", "<think>\n\n</think>\n\n", ""),
  (templates.R1_DISTILL, "</s>", "", ""),
  (templates.LLAMA31, "<|eot_id|>", "", ""),
  (templates.LLAMA32, "<|eot_id|>", "", ""),
  (templates.MISTRAL03, "</s>", " ", " "),
  (templates.MISTRAL_SMALL, "</s>", "", ""),
  (templates.GEMMA2, "<end_of_turn>", "", ""),
  (templates.ZEPHYR, "</s>", "", ""),
  (templates.LLAMA2, " </s>", " ", " "),
  (templates.GLM4, "", "", ""),
  (templates.PAIRS, "</s>", " ", " "),
  (templates.GENERATION, "<|im_end|>", "", ""),
  (templates.SMOLLM3, "<|im_end|>\n", "<|im_start|>assistant\n", "<|im_start|>assistant\n"),
]


@pytest.mark.parametrize(("template", "end", "last", "earlier"), PLAIN)
def test_responses_are_the_answers_with_their_terminator(template, end, last, earlier):
  assert _learnt(template, _user("Q"), _answer("A.")) == ([f"{last}A.{end}"], {})
  several = _user("Q"), _answer("A."), _user("R"), _answer("B.")
  assert _learnt(template, *several) == ([f"{earlier}A.{end}", f"{last}B.{end}"], {})
  out = _user("Q"), _answer("A.", train=False), _user("R"), _answer("B.")
  assert _learnt(template, *out) == ([f"{last}B.{end}"], {})
  for text in (
    "<|im_start|>assistant\nno",
    "x<|im_end|>\n<|im_start|>assistant\n",
    "assistant\n",
    "A.",
    "<think>",
    "[",
  ):
    asked = _learnt(template, _user(f"say {text}"), _answer("A."), _user("R"), _answer(f"say {text}!"))[0]
    assert asked == [f"{earlier}A.{end}", f"{last}say {text}!{end}"]
  if template not in (templates.GEMMA2, templates.MISTRAL03, templates.PAIRS):  # refuse or move a system message
    assert _learnt(template, SYSTEM, _user("Q"), _answer("A.")) == ([f"{last}A.{end}"], {})
    assert _learnt(template, _user("Q"), _answer("A."), system_prompt="Hm.") == ([f"{last}A.{end}"], {})


NEWER = [
  (templates.COMMAND_R, "<|END_OF_TURN_TOKEN|>", "", ""),
  (templates.OLMO2, "</s>", "", ""),
  (templates.VICUNA, "</s>", " ", " "),
  (templates.GLM45, "", "\n<think></think>\n", "\n<think></think>\n"),
  (templates.QWEN3_THINKING, "<|im_end|>", "\n</think>\n\n", ""),
  (templates.DEEPSEEK_V31, "</s>", "", ""),
  (templates.GRANITE3, "<|end_of_text|>", "", ""),
  (templates.ERNIE45, "<|end_of_sentence|>", "", ""),
  (templates.NEMOTRON, "\n<SPECIAL_12>", "</think>", "</think>"),
  (templates.APERTUS, "<|assistant_end|>", "", ""),
  (templates.OPENCHAT, "<|end_of_turn|>", " ", " "),
]


@pytest.mark.parametrize(("template", "end", "last", "earlier"), NEWER)
def test_responses_of_newer_families(template, end, last, earlier):
  several = _user("say assistant: A."), _answer("A."), _user("R"), _answer("say <|im_start|>assistant\nA.!")
  asked = [f"{earlier}A.{end}", f"{last}say <|im_start|>assistant\nA.!{end}"]
  for system in ((), (SYSTEM,)):
    assert _learnt(template, *system, *several) == (asked, {})
  assert _learnt(template, several[0], _answer("A.", train=False), *several[2:]) == (asked[1:], {})


SPACED = [
  "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ 'assistant: ' if add_generation_prompt }}",
  "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",  # no generation prompt
  "{% for m in messages %}{{ m.role }}:\t{{ m.content }}\n{% endfor %}",
]


@pytest.mark.parametrize("template", SPACED)
@pytest.mark.parametrize("answer", ["Yes", "Yes, it is.", " Yes", "\nYes", "1", ""])
def test_the_first_word_is_learnt_where_its_token_begins_with_white_space_of_the_header(template, answer):
  tokenizer = tokenizer_from_gguf(assets.asset_path(EMBEDDED_MODEL))
  tokenizer.chat_template = template
  records = [_record(_user("Is it?"), _answer(answer), _user("Is it?"), _answer("No."))]
  found = [text.strip() for text in _responses(tokenize(records, tokenizer, 99), tokenizer)]
  assert found == [text for text in (answer.strip(), "No.") if text]


POSITIONS = [
  "{% for m in messages %}{{ loop.index }} {{ m.role }}: {{ m.content }}<|end|>{% endfor %}",
  "{% for pair in messages | batch(2) %}<|user|>{{ pair[0].content }}<|assistant|>{{ pair[1].content }}{% endfor %}",
]


@pytest.mark.parametrize("template", POSITIONS)
def test_no_system_prompt_changes_nothing_where_turns_are_counted_or_paired(template):
  record = _record(_user("Q"), _answer("A."), _user("R"), _answer("B."))
  plain, none = (Renderer(_bytes(template), prompt)(record) for prompt in ("default", "none"))
  assert plain == none


def test_end_of_the_conversation_and_words_of_the_last_answer():
  several = _user("Q"), _answer("A."), _user("R"), _answer("B.")
  assert _learnt(templates.PHI3, *several)[0] == ["A.<|end|>", "B.<|end|>\n</s>"]
  final = "<|channel|>final<|message|>"
  assert _learnt(templates.HARMONY, *several)[0] == [f"{final}A.<|end|>", f"{final}B.<|return|>"]


THOUGHT = "<think>\nhm\n</think>\n\n"
# Template, responses to `reasoning in the text`, its changes, responses to `reasoning beside the text`, its changes.
REASONING = [
  (templates.QWEN3, ["A.", f"{THOUGHT}B."], {"reasoning left out": 1}, "<|im_end|>"),
  (templates.R1_DISTILL, ["\n\nA.", "\n\nB."], {"reasoning left out": 2}, "</s>"),
  (templates.CHATML, [f"{THOUGHT}A.", f"{THOUGHT}B."], {}, "<|im_end|>"),
]


@pytest.mark.parametrize(("template", "answers", "changes", "end"), REASONING)
def test_reasoning_in_the_text(template, answers, changes, end):
  messages = _user("Q"), _answer(f"{THOUGHT}A."), _user("R"), _answer(f"{THOUGHT}B.")
  assert _learnt(template, *messages) == ([answer + end for answer in answers], changes)
  if answers[1].startswith(THOUGHT):
    assert _learnt(template, *messages[:2]) == ([f"{THOUGHT}A.{end}"], {})


def test_reasoning_beside_the_text():
  messages = _user("Q"), _answer("A.", reasoning_content="hm"), _user("R"), _answer("B.", reasoning_content="hm")
  learnt = ["A.<|im_end|>", f"{THOUGHT}B.<|im_end|>"]
  assert _learnt(templates.QWEN3, *messages) == (learnt, {"reasoning left out": 1})
  analysis, final = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant", "<|channel|>final<|message|>"
  learnt = [f"{final}A.<|end|>", f"{analysis}{final}B.<|return|>"]
  assert _learnt(templates.HARMONY, *messages) == (learnt, {"reasoning left out": 1})
  with pytest.raises(UserError, match=r"'r' .memory:1.: the chat template does not render reasoning"):
    _learnt(templates.CHATML, *messages)


def test_reasoning_whose_marks_are_written_otherwise_is_told():
  template = templates.CHATML.replace("m['content']", "m['content'].replace('think>', 'thought>')")
  learnt = ["<thought>\nhm\n</thought>\n\nA.<|im_end|>"]
  assert _learnt(template, _user("Q"), _answer(f"{THOUGHT}A.")) == (learnt, {"answer rewritten": 1})


def test_two_answers_that_become_one_are_told():
  tokenizer = _bytes(templates.R1_DISTILL)
  records = [_record(_user("Q"), _answer(f"<think>{text}</think>It is 144.")) for text in ("ten twelves", "a guess")]
  dataset = tokenize([*records, _record(_user("Q"), _answer("B."))], tokenizer, 500)
  assert [_responses(dataset, tokenizer, row)[0] for row in range(3)] == ["It is 144.</s>"] * 2 + ["B.</s>"]
  summary = data_summary({"train": dataset})
  assert summary["template"] == {"changes": {"train": {"reasoning left out": 2}}, "alike": {"train": 2}}
  told = format_summary(summary)
  assert "reasoning left out in 2 turns" in told and "2 examples that differ become equal" in told


def test_rewritten_answers_are_learnt_as_rendered_and_told():
  turns = _user("Q"), _answer(" So it IS. "), _user("R"), _answer("B.")
  for change, rendered, words in [
    ("trim", "So it IS.", "white space trimmed"),
    ("lower", " so it is. ", "answer rewritten"),
    ("replace('So', '')", "  it IS. ", "answer rewritten"),
    ("replace(' ', '')", "SoitIS.", "white space changed"),
  ]:
    template = templates.CHATML.replace("m['content']", f"(m['content'] | {change})")
    first, last = _learnt(template, *turns)[0]
    assert first == f"{rendered}<|im_end|>" and last.lower() == "b.<|im_end|>"
    assert _learnt(template, *turns)[1][words] >= 1
  for end in (templates.NO_PROMPT, templates.ALWAYS_HEADER):  # the header is none of the answer there either
    lower = end.replace("m['content']", "m['content'] | lower")
    assert _learnt(lower, *turns[2:])[0] == ["b.<|im_end|>"]
  assert _learnt(templates.FORGETFUL, *turns) == (["B."], {"answer left out": 1})
  silent = templates.CHATML.replace("m['content']", "(m['content'] if m.role != 'system' else '')")
  assert _learnt(silent, SYSTEM, *turns[2:]) == (["B.<|im_end|>"], {"system message left out": 1})
  deaf = templates.CHATML.replace("m['content']", "(m['content'] if m.role != 'user' or loop.last else '')")
  with pytest.raises(UserError, match="does not render turn 0 .user."):
    _learnt(deaf, *turns)


# --- tools

QWEN_CALL = '<tool_call>\n{"name": "get", "arguments": {"city": "Ö"}}\n</tool_call><|im_end|>'
CALLS = [
  (templates.QWEN25, QWEN_CALL, "B.<|im_end|>", f"Look.\n{QWEN_CALL}", {}),
  (
    templates.QWEN3,
    QWEN_CALL,
    "<think>\n\n</think>\n\nB.<|im_end|>",
    f"<think>\n\n</think>\n\nLook.\n{QWEN_CALL}",
    {},
  ),
  (
    templates.LLAMA31,
    '{"name": "get", "parameters": {"city": "Ö"}}<|eot_id|>',
    "B.<|eot_id|>",
    '{"name": "get", "parameters": {"city": "Ö"}}<|eot_id|>',
    {"text beside a tool call left out": 1},
  ),
  (
    templates.MISTRAL03,
    '[TOOL_CALLS] [{"name": "get", "arguments": {"city": "Ö"}, "id": "abcdefghi"}]</s>',
    " B.</s>",
    '[TOOL_CALLS] [{"name": "get", "arguments": {"city": "Ö"}, "id": "abcdefghi"}]</s>',
    {"text beside a tool call left out": 1},
  ),
  (  # takes the arguments as text
    templates.R1_DISTILL,
    '<|call|>function<|sep|>get\n{"city": "Ö"}</s>',
    "B.</s>",
    '<|call|>function<|sep|>get\n{"city": "Ö"}</s>',
    {"text beside a tool call left out": 1},
  ),
]


@pytest.mark.parametrize(("template", "call", "answer", "beside", "changes"), CALLS)
def test_tool_calls_are_part_of_the_response(template, call, answer, beside, changes):
  for made in (CALL, {**CALL, "function": {"name": "get", "arguments": {"city": "Ö"}}}):  # as text, as an object
    turns = _user("Q"), _answer("", tool_calls=[made]), RESULT, _answer("B.")
    assert _learnt(template, *turns) == ([call, answer], {})
    assert _learnt(template, _user("Q"), _answer("Look.", tool_calls=[made])) == ([beside], changes)
  named = _user("Q"), _answer("", tool_calls=[CALL]), RESULT | {"name": "get"}, _answer("B.")
  assert _learnt(template, *named) == ([call, answer], {"name of a turn left out": 1})


@pytest.mark.parametrize("template", [templates.QWEN25, templates.QWEN3, templates.LLAMA31, templates.MISTRAL03])
def test_tool_definitions_reach_the_template(template):
  tokenizer = _bytes(template)
  with_tools, without = (tokenize([_record(_user("Q"), _answer("A."), tools=on)], tokenizer, 9999) for on in (1, 0))
  assert "Weather." in tokenizer.decode(with_tools.tokens[0]) and "city" in tokenizer.decode(with_tools.tokens[0])
  assert _responses(with_tools, tokenizer) == _responses(without, tokenizer)


def test_what_the_template_cannot_render_is_refused():
  for messages, tools, reason in [
    ((_user("Q"), _answer("Look.", tool_calls=[CALL])), False, "does not render the tool calls of turn 1"),
    ((_user("Q"), _answer("A.")), True, "does not render tool definitions"),
  ]:
    with pytest.raises(UserError, match=rf"'r' .memory:1.: the chat template {reason}"):
      _learnt(templates.CHATML, *messages, tools=tools)
  with pytest.raises(
    UserError, match=r"refuses the turns \[user assistant\]: This model only supports single tool-call"
  ):
    _learnt(templates.LLAMA31, _user("Q"), _answer("", tool_calls=[CALL, CALL]))
  with pytest.raises(UserError, match="Tool call IDs should be alphanumeric"):
    _learnt(templates.MISTRAL03, _user("Q"), _answer("", tool_calls=[CALL | {"id": "c1"}]))


class Refused(list):
  """Takes what cannot be rendered."""

  def refuse(self, place, raw, reason):
    self.append((place, raw, reason))


def test_refused_records_are_left_out_and_handed_on():
  tokenizer, bad = _bytes(templates.CHATML), Refused()
  records = [_record(_user("Q"), _answer("A.")), _record(_user("Q"), _answer("A.", tool_calls=[CALL]))]
  dataset = tokenize(records, tokenizer, 500, bad=bad)
  assert dataset.records == (records[0],)
  lost = "the chat template does not render the tool calls of turn 1"
  assert bad == [("memory:1", "{}", f"{lost}; take a model whose template does (--model)")]


# --- {% generation %}

GENERATION = [
  templates.GENERATION,
  templates.SMOLLM3,
  templates.GENERATION.replace("{{ m.content + '<|im_end|>' }}{% endg", "{{ m.content }}{% endg"),  # no terminator
  # Another word in front, and two parts of one answer.
  templates.GENERATION.replace("{{ m.content + '<|im_end|>' }}{% endg", "{{ m.content }}{% endgeneration %}-")
  .replace("-eneration %}", "{% generation %}{{ '<|im_end|>' }}{% endgeneration %}")
  .replace("<|im_start|>' +", "<s>' +"),
]


@pytest.fixture
def fixed_clock(monkeypatch):
  """transformers' clock stands at our default date."""

  class Clock:
    now = staticmethod(lambda: datetime.datetime.fromisoformat(template_program.DEFAULT_DATE))

  monkeypatch.setattr(chat_template_utils, "datetime", Clock)


@pytest.mark.parametrize("template", GENERATION)
def test_generation_marks_give_the_mask_of_transformers(fixed_clock, template):
  tokenizer = _bytes(template)
  texts = ("A.", "é🙂", " <|im_sta", "a\n", "<think>x</think>y")
  for system in ((), (SYSTEM,)):
    for text in texts:
      messages = [*system, _user("Q é"), _answer(text), _user("R"), _answer(f"{text} B")]
      theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
      ours = tokenize([_record(*messages)], tokenizer, 10_000)
      np.testing.assert_array_equal(ours.tokens[0], theirs["input_ids"])
      np.testing.assert_array_equal(ours.response_mask[0], np.array(theirs["assistant_masks"], bool))
      cut = tokenize([_record(*messages)], tokenizer, len(ours.tokens[0]) - 3)
      np.testing.assert_array_equal(cut.response_mask[0], ours.response_mask[0][:-3])


def test_generation_marks_round_tool_calls_give_the_mask_of_transformers(fixed_clock):
  tokenizer, call = _bytes(templates.QWEN25_MARKED), {"name": "get", "arguments": {"city": "Ö"}}
  calls = _answer("Let me see.", tool_calls=[CALL | {"function": call}]), RESULT, _answer("B.")
  tool = {"type": "function", "function": {"name": "get", "description": "d", "parameters": {"type": "object"}}}
  for tools in (None, [tool]):
    for messages in ([_user("Q"), *calls], [SYSTEM, _user("Q"), _answer("A"), _user("R"), *calls]):
      theirs = tokenizer.apply_chat_template(messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
      record = dataclasses.replace(_record(*messages), tools=tools or ())
      ours = tokenize([record], tokenizer, 10_000)
      np.testing.assert_array_equal(ours.tokens[0], theirs["input_ids"])
      np.testing.assert_array_equal(ours.response_mask[0], np.array(theirs["assistant_masks"], bool))
      assert 30 < ours.response_mask[0].sum() < len(ours.tokens[0])


MARKS_OF_SOME = [
  # Answers but the last stand outside of the marks; all do.
  (templates.GENERATION.replace("m.role == 'assistant' %}", "m.role == 'assistant' and loop.last %}"), 1),
  (templates.GENERATION.replace("m.role == 'assistant' %}", "m.role == 'robot' %}"), 2),
]


@pytest.mark.parametrize(("template", "count"), MARKS_OF_SOME)
def test_answers_outside_of_generation_marks_are_told(template, count):
  told = "answer outside of the generation marks, and not learnt"
  messages = _user("Q"), _answer("A."), _user("R"), _answer("B.")
  if count == 1:
    assert _learnt(template, *messages) == (["B.<|im_end|>"], {told: 1})
  else:
    with pytest.raises(UserError, match=f"none of the 1 example has a response token.*{told} in 2 turns"):
      _learnt(template, *messages)


def test_calls_without_a_text_are_rendered_where_the_template_wants_null():
  call = '<|tool▁calls▁begin|><|tool▁call▁begin|>function<|tool▁sep|>get\n```json\n{"city": "Ö"}\n```<|tool▁call▁end|>'
  turns = _user("Q"), _answer("", tool_calls=[CALL]), RESULT, _answer("A.")
  for tools in (False, True):
    assert _learnt(templates.DEEPSEEK_V3, *turns, tools=tools) == ([call, "A.</s>"], {})
  with pytest.raises(UserError, match="does not render the tool calls of turn 1"):
    _learnt(templates.DEEPSEEK_V3, _user("Q"), _answer("Look.", tool_calls=[CALL]), RESULT, _answer("A."))


# --- the rendering is that of transformers

ALL = {name: text for name, text in vars(templates).items() if name.isupper() and not name.startswith("_")}


@pytest.mark.parametrize("name", ALL)
def test_text_is_that_of_transformers(fixed_clock, name):
  tokenizer = _bytes(ALL[name])
  calls = _answer("", tool_calls=[CALL]), RESULT, _answer("B.")
  for messages in ([SYSTEM, _user("Q"), _answer(f"{THOUGHT}A. ")], [_user(" Q"), _answer("A."), _user("R"), *calls]):
    renderer, record = Renderer(tokenizer, "default"), _record(*messages)
    try:
      ours = renderer(record).text
    except ValueError:
      continue
    if name == "DEEPSEEK_V3":  # `apply_chat_template` drops keys that are null, which this template asks for
      messages = [m | ({"content": None} if "tool_calls" in m else {}) for m in messages]
      words = tokenizer.special_tokens_map
      (theirs,), _ = chat_template_utils.render_jinja_template([messages], chat_template=ALL[name], **words)
      assert ours == theirs
      continue
    if name != "R1_DISTILL":  # both take the arguments of calls as text
      call = CALL | {"function": {"name": "get", "arguments": {"city": "Ö"}}}
      messages = [m | ({"tool_calls": [call]} if "tool_calls" in m else {}) for m in messages]
    assert ours == tokenizer.apply_chat_template(messages, tokenize=False)


WILD = st.lists(
  st.one_of(
    st.text(st.characters(exclude_categories=("Cs",)), max_size=6),
    st.sampled_from(
      [*CONTROL, "<think>", "</think>", "<tool_response>", "</tool_response>", "\n", " ", "\ue0001c\ue001"]
    ),
  ),
  max_size=5,
).map("".join)
TOKENIZERS: dict = {}
VERBATIM = ("CHATML", "NO_PROMPT", "ALWAYS_HEADER", "QWEN25", "MISTRAL_SMALL", "GLM4", "ZEPHYR", "GENERATION", "PAIRS")


@settings(max_examples=120, deadline=None)
@given(name=st.sampled_from(VERBATIM), turns=st.lists(st.tuples(WILD, WILD), min_size=1, max_size=3))
def test_any_answer_is_its_response(name, turns):
  tokenizer = TOKENIZERS.setdefault(name, _bytes(ALL[name]))
  # One letter in front, for a space in front of an answer can be one token with it; one behind, to be no empty answer.
  turns = [(f"q{asked}", f"a{answer}.") for asked, answer in turns]
  messages = [turn for asked, answer in turns for turn in (_user(asked), _answer(answer))]
  end, last, earlier = next(row[1:] for row in PLAIN if row[0] == ALL[name])
  dataset = tokenize([_record(*messages)], tokenizer, 10**6)
  heads = [earlier] * (len(turns) - 1) + [last]
  assert _responses(dataset, tokenizer) == [head + answer + end for head, (_, answer) in zip(heads, turns, strict=True)]
  assert "changes" not in dataset.template
  control = [tokenizer.convert_tokens_to_ids(word) for word in CONTROL]
  plain = [turn | {"content": "ab."} for turn in messages]
  count = lambda tokens: [int((tokens == token).sum()) for token in control]  # noqa: E731
  assert count(dataset.tokens[0]) == count(tokenize([_record(*plain)], tokenizer, 10**6).tokens[0])


# --- dates, chance, limits


def test_date_is_that_of_the_flag_and_told(monkeypatch):
  class Clock:
    def now(self):
      raise AssertionError("the clock was asked")

  monkeypatch.setattr(chat_template_utils, "datetime", Clock())
  record = _record(_user("Q"), _answer("A."))
  for template, printed in [
    (templates.LLAMA31, "26 Jul 2024"),
    (templates.LLAMA32, "26 Jul 2024"),
    (templates.MISTRAL_SMALL, "2024-07-26"),
    (templates.SMOLLM3, "26 July 2024"),
    (templates.CHATML.replace("{% for", "{{ current_date }}{% for", 1), "26 Jul 2024"),
  ]:
    tokenizer = _bytes(template)
    dataset = tokenize([record], tokenizer, 500)
    assert printed in tokenizer.decode(dataset.tokens[0]) and dataset.template["date"] == Settings.template_date
    later = tokenize([record], tokenizer, 500, date="2031-01-02")
    assert "2031" in tokenizer.decode(later.tokens[0]) and later.template == {"date": "2031-01-02"}
    assert "the date used is 2031-01-02 (--template_date)" in format_summary(data_summary({"train": later}))
  assert tokenize([record], _bytes(templates.CHATML), 500).template == {}
  assert Settings.template_date == template_program.DEFAULT_DATE


def test_date_is_part_of_a_run_and_of_a_checkpoint_where_the_template_prints_it():
  record, s = _record(_user("Q"), _answer("A.")), Settings(template_date="2031-01-02")
  sessions = {}
  for name, template in (("dated", templates.LLAMA32), ("plain", templates.CHATML)):
    splits = Splits({"train": tokenize([record], _bytes(template), 500, date=s.template_date)})
    model = LoadedModel("", "float32", None, None, sharding.make_mesh(""), lambda: ({}, "hash"))
    sessions[name] = make_session(s, splits, model)
  flags = {name: session.identity("x", s, ("data",), ("train",))["flags"] for name, session in sessions.items()}
  assert flags["dated"]["template_date"] == "2031-01-02" and "template_date" not in flags["plain"]
  assert "template_date" not in Settings().identity("data")  # older run folders go on
  dates = {name: session.splits.template_date for name, session in sessions.items()}
  check_template_date("c", {"template_date": "2031-01-02"}, dates["dated"])
  check_template_date("c", {}, dates["plain"])
  with pytest.raises(UserError, match=r"prints 2024-07-26, not --template_date=2031-01-02: give --template_date=2024"):
    check_template_date("c", {"template_date": "2024-07-26"}, dates["dated"])


HOSTILE = [
  ("{% for i in range(10**12) %}x{% endfor %}", "stopped"),
  ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "stopped after .* seconds"),
  ("{% macro f(n) %}{% if n < 60 %}{{ f(n + 1) }}{{ f(n + 1) }}{% endif %}{% endmacro %}{{ f(0) }}", "stopped after"),
  ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "stopped"),
  ("{{ 'a' * 10**12 }}", "stopped"),
  ("{{ 10 ** 10000000 }}", "stopped"),
  ("{{ 'a'.ljust(10**14) }}", "stopped"),
  ("{{ '%999999999999d' % 1 }}", "stopped"),
  ("{{ 'a' | center(10**12) }}", "stopped"),
  ("{{ 'a' | slice(10**9) | list | length }}", "stopped: it asks for 1,000,000,000 parts"),
  ("{{ ('a\n' * 999) | indent(10**8) }}", "stopped: it asks for"),
  ("{{ '%*d' | format(10**9, 1) }}{{ '%*d' % (10**9, 1) }}", "stopped"),
  ("{{ '{:>1000000000}'.format(1) }}", "stopped: it makes a text"),
  ("{{ '{a:>1000000000}'.format_map({'a': 1}) }}", "stopped: it makes a text"),
  ("{{ 'a'.zfill(10**9) }}", "stopped"),
  ("{{ '\t'.expandtabs(tabsize=10**9) }}", "stopped"),
  ("{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}", "stopped"),
  ("{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}", "stopped"),
  ("{{ [1, 2] | random }}", "draws at random"),
  ("{{ lipsum() }}", "undefined"),
  ("{% if", "unexpected"),
  ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "stopped"),
  ("{{ messages.pop() }}", "(?i)unsafe|not safe|undefined"),
  ("{{ 1 / 0 }}", "division by zero"),
  ("{{ none + 'a' }}", "unsupported operand"),
]


@pytest.mark.parametrize(("template", "reason"), HOSTILE)
def test_template_that_must_not_run_is_refused_in_one_line(monkeypatch, template, reason):
  monkeypatch.setattr(template_program, "_SECONDS", 0.3)
  monkeypatch.setattr(template_program, "_MEMORY", 2**27)
  with pytest.raises(UserError, match=reason) as caught:
    tokenize([_record(_user("Q"), _answer("A."))], _bytes(template + templates.CHATML), 100)
  assert "\n" not in str(caught.value)


def test_named_templates():
  record, tools = _record(_user("Q"), _answer("A.")), _record(_user("Q"), _answer("A."), tools=True)
  tokenizer = _bytes({"default": templates.CHATML, "tool_use": templates.QWEN25, "rag": "x"})
  assert _responses(tokenize([record, tools], tokenizer, 999), tokenizer, 1) == ["A.<|im_end|>"]
  texts = [tokenizer.decode(tokens) for tokens in tokenize([record, tools], tokenizer, 999).tokens]
  assert "Weather." in texts[1] and "Weather." not in texts[0]
  with pytest.raises(UserError, match=r"several chat templates .'rag', 'tool_use'. and none of the name 'default'"):
    tokenize([record], _bytes({"tool_use": templates.QWEN25, "rag": "x"}), 999)


# --- control words inside texts


def _pieces(words):
  """A vocabulary of SentencePiece's kind: control tokens, bytes, characters, words."""
  characters = [chr(code) for code in range(33, 127)] + ["\u2581", "\n", "é"]
  names = ["<unk>", "<s>", "</s>", "<e>", *(f"<0x{i:02X}>" for i in range(256)), *characters, *words]
  return {name: i for i, name in enumerate(dict.fromkeys(names))}


def _merged(**parts):
  merges = [
    ("h", "i"),
    ("\u2581", "h"),
    ("\u2581", "hi"),
    ("\u2581", "\u2581"),
    ("u", "s"),
    ("us", "e"),
    ("\u2581h", "i"),
  ]
  vocabulary = _pieces(["".join(merge) for merge in merges])
  model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
  return _backend(model, **parts)


def _backend(model, normalizer=None, pre=None, **flags):
  backend = Tokenizer(model)
  if normalizer:
    backend.normalizer = normalizer
  if pre:
    backend.pre_tokenizer = pre
  backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
  flags = {"normalized": False} | flags
  backend.add_special_tokens([AddedToken(t, special=True, **flags) for t in ("<s>", "</s>", "<e>", "<q>")])
  return backend


def _byte_level(**flags):
  merges = [("h", "i"), ("Ġ", "hi"), ("Ġ", "Ġ"), ("u", "s"), ("us", "e"), ("<", "e"), ("e", ">")]
  words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(m) for m in merges)]
  model = models.BPE({w: i for i, w in enumerate(words)}, merges)
  pre = pre_tokenizers.ByteLevel(add_prefix_space=flags.pop("prefix", False))
  return _backend(model, pre=pre, **flags)


def _unigram(**flags):
  names = [name for name in _pieces(["\u2581hi", "hi", "use", "\u2581u"]) if name not in ("<s>", "</s>", "<e>")]
  model = models.Unigram([(name, -float(i % 7) - 1) for i, name in enumerate(names)], 0, True)
  return _backend(model, normalizers.NFKC(), pre_tokenizers.Metaspace(prepend_scheme="always"), **flags)


_SPACES = normalizers.Replace(" ", "\u2581")
KINDS = {
  "byte-level": _byte_level,
  "byte-level with a space in front": lambda: _byte_level(prefix=True),
  "byte-level, control tokens that take spaces": lambda: _byte_level(lstrip=True, rstrip=True),
  "Llama, a space in front of every part": lambda: _merged(
    normalizer=normalizers.Sequence([normalizers.Prepend("\u2581"), _SPACES])
  ),
  "Llama, in front of the first part": lambda: _merged(
    pre=pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
  ),
  "Llama, always": lambda: _merged(pre=pre_tokenizers.Metaspace(prepend_scheme="always", split=False)),
  "Llama, never": lambda: _merged(pre=pre_tokenizers.Metaspace(prepend_scheme="never", split=False)),
  "Llama, control tokens in normalised text": lambda: _merged(normalizer=_SPACES, normalized=True),
  "Gemma": lambda: _merged(normalizer=_SPACES, rstrip=True),
  "Unigram": _unigram,
}
QUOTING = (
  "{% for m in messages %}{{ '<s>' if loop.first else '' }}{% if m.role == 'user' %}{{ 'use ' + m.content + ' <e>' }}"
  "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)


def _without(backend, *words):
  """The same tokenizer, which takes these words for text; ids are those of the whole one."""
  content = json.loads(backend.to_str())
  content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in words]
  return Tokenizer.from_str(json.dumps(content))


def _names(backend, ids):
  return [backend.id_to_token(int(i)) for i in ids]


@pytest.mark.parametrize("kind", KINDS)
def test_control_word_in_a_text_leaves_its_neighbours_their_tokens(kind):
  backend = KINDS[kind]()
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, chat_template=QUOTING, bos_token="<s>", eos_token="</s>", unk_token=None
  )
  plain = _without(backend, "<q>")
  for text in ("hi <q> hi", "<q>", "hi<q>hi", " <q>  hi", "<q><q> é", "hi\n<q>", "x <think> <q>", "ｈi <q>"):
    turns = _user(f"hi {text} hi"), _answer(text), _user("hi"), _answer(f"hi  {text}")
    dataset = tokenize([_record(*turns)], tokenizer, 999)
    rendered = Renderer(tokenizer, "default")(_record(*turns)).text
    # The tokenizer that has never heard of <q> is the reference, for the template does not write it.
    expected = plain.encode(rendered, add_special_tokens=False)
    assert _names(backend, dataset.tokens[0]) == _names(plain, expected.ids)
    assert "<q>" not in _names(backend, dataset.tokens[0])
    # A word that the template writes too: as with a word of the same length that is none.
    for word in ("<s>", "</s>", "<e>"):
      quoted = tokenize([_record(*(m | {"content": m["content"].replace("<q>", word)} for m in turns))], tokenizer, 999)
      names = _names(backend, quoted.tokens[0])
      assert [n for n in names if n in ("<s>", "</s>", "<e>", "<q>")] == ["<s>", "<e>", "</s>", "<e>", "</s>"]
      if len(word) == 3:
        other = [name for name in names if name not in ("s", "e", "se", "<e", "e>", "<", ">", "s>")]
        assert other == [n for n in _names(plain, expected.ids) if n not in ("q", "<", ">", "q>", "<q", "e>")]
    assert dataset.response_mask[0].sum() >= 4


def test_control_word_that_the_tokenizer_makes_of_plain_text_is_refused():
  names = [(name, -1.0) for name in _pieces([])]  # <s> is a piece like others
  backend = _backend(models.Unigram(names, 0, True), pre=pre_tokenizers.Metaspace(prepend_scheme="never"))
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, chat_template=QUOTING, bos_token="<s>", eos_token="</s>"
  )
  with pytest.raises(
    UserError, match="contains the control token '</s>' as text, which this tokenizer cannot write in"
  ):
    tokenize([_record(_user("hi"), _answer("a </s>"))], tokenizer, 99)


def test_control_words_that_are_none_beside_a_letter_are_refused_with_a_quoted_one():
  # `hi</s>`: with `single_word` the tokenizer takes </s> for letters, under its other name for ones that nobody knows.
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=_byte_level(single_word=True), chat_template=QUOTING, bos_token="<s>", eos_token="</s>"
  )
  turns = _user("hi <q> hi"), _answer("hi")
  with pytest.raises(UserError, match="contains the control token '<q>' as text, which this tokenizer cannot write"):
    tokenize([_record(*turns)], tokenizer, 999)


def test_control_words_in_tool_calls_stay_words():
  tokenizer = _bytes(templates.QWEN25)
  call = CALL | {"function": {"name": "get", "arguments": {"city": "x<|im_end|>\n<|im_start|>system\n"}}}
  dataset = tokenize([_record(_user("Q"), _answer("", tool_calls=[call]), tools=True)], tokenizer, 9999)
  plain = tokenize([_record(_user("Q"), _answer("", tool_calls=[CALL]), tools=True)], tokenizer, 9999)
  for word in ("<|im_start|>", "<|im_end|>"):
    token = tokenizer.convert_tokens_to_ids(word)
    assert (dataset.tokens[0] == token).sum() == (plain.tokens[0] == token).sum()
