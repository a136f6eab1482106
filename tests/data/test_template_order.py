"""Chat templates that move, repeat, merge or change turns: refused or told, whatever the texts are."""

import chat_templates as templates
import pytest
from test_chat_template import SYSTEM, _answer, _learnt, _user

from in2core_jax.errors import UserError

TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
ROUNDS = _user("Who are you?"), _answer("I am Zed."), _user("And where?"), _answer("In a can.")


def loop(over="messages", body=TURN):
  return f"{{% for m in {over} %}}{body}{{% endfor %}}"


def of_role(*roles):
  return "".join(loop(f"messages if m.role == '{role}'") for role in roles)


MOVED = {
  "reversed": loop("messages[::-1]"),
  "reversed by a filter": loop("messages | reverse"),
  "all questions first": of_role("system", "user", "assistant"),
  "answer before its question": loop(
    body="{% if m.role == 'user' %}{{ loop.nextitem.content }}|{{ m.content }}|{% endif %}"
  ),
  "merged": "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(' ') }}|"
  + of_role("assistant"),
}
REPEATED = {
  "all twice": loop(body=TURN * 2),
  "questions twice": loop(body=TURN + "{% if m.role == 'user' %}" + TURN + "{% endif %}"),
  "answers twice": loop(body=TURN + "{% if m.role == 'assistant' %}" + TURN + "{% endif %}"),
  "first one again": loop() + "{{ messages[0].content }}",
}


@pytest.mark.parametrize("system", [(), (SYSTEM,)])
@pytest.mark.parametrize("name", [*MOVED, *REPEATED])
def test_moved_and_repeated_turns_are_refused(name, system):
  words = "in another order than the conversation has" if name in MOVED else "more than once"
  with pytest.raises(UserError, match=f"example 'r' .*{words}"):
    _learnt((MOVED | REPEATED)[name] + PROMPT, *system, *ROUNDS)


def test_an_order_that_depends_on_the_texts_is_refused():
  with pytest.raises(UserError, match=r"renders turn 2 \(user\) before an earlier one"):
    _learnt(loop("messages | sort(attribute='content')") + PROMPT, *ROUNDS[:1], _answer("Zed."), *ROUNDS[2:])


CHANGED = {
  "cut": ("m['content'][:9]", 2),
  "lower case": ("(m['content'] | lower)", 2),
  "other words": ("(m['content'] | replace('Who', 'What'))", 1),
}


@pytest.mark.parametrize("name", CHANGED)
def test_questions_that_are_rewritten_are_told(name):
  change, count = CHANGED[name]
  body = TURN.replace("m['content']", f"({change} if m.role == 'user' else m['content'])")
  responses, changes = _learnt(loop(body=body) + PROMPT, *ROUNDS)
  assert responses == ["I am Zed.<|im_end|>", "In a can.<|im_end|>"]
  assert changes == {"text of a user turn changed or left out": count}


def test_a_header_that_is_not_the_generation_prompts_is_told():
  swapped = TURN.replace("m['role']", "('user' if m.role == 'assistant' else 'assistant')")
  _, changes = _learnt(loop(body=swapped) + PROMPT, *ROUNDS)
  assert changes == {"learnt with words in front that are not those of the generation prompt": 2}


@pytest.mark.parametrize("name", ["CHATML", "LLAMA2", "MISTRAL03", "MISTRAL_SMALL", "ZEPHYR", "QWEN3", "R1_DISTILL"])
def test_templates_of_model_families_move_nothing(name):
  _, changes = _learnt(getattr(templates, name), SYSTEM, *ROUNDS)
  assert not {words for words in changes if "turn" in words or "words" in words}
