"""Chat templates in the manner of widely used model families: which keys they know, what they do to the texts."""

CHATML = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The header is written by the loop alone: add_generation_prompt is ignored.
NO_PROMPT = CHATML.split("{% if add")[0]
# The header of an answer stands behind every conversation, asked for or not.
ALWAYS_HEADER = NO_PROMPT + "{{ '<|im_start|>assistant\n' }}"
ALWAYS_HEADER_IN_LOOP = NO_PROMPT.replace(
  "{% endfor %}", "{% if loop.last %}{{ '<|im_start|>assistant\n' }}{% endif %}{% endfor %}"
)

_CALLS_QWEN = (
  "{%- for call in message.tool_calls %}"
  "{%- if (loop.first and message.content) or not loop.first %}{{- '\n' }}{%- endif %}"
  "{%- if call.function %}{%- set call = call.function %}{%- endif %}"
  '{{- \'<tool_call>\n{"name": "\' + call.name + \'", "arguments": \' }}'
  "{%- if call.arguments is string %}{{- call.arguments }}{%- else %}{{- call.arguments | tojson }}{%- endif %}"
  "{{- '}\n</tool_call>' }}{%- endfor %}"
)
_TOOLS_QWEN = (
  "{%- if tools %}{{- '<|im_start|>system\n' }}"
  "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}"
  "{{- '# Tools\n<tools>' }}{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}"
  "{{- '\n</tools><|im_end|>\n' }}"
  "{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
)
_RESULTS_QWEN = (
  "{%- elif message.role == 'tool' %}"
  "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
  "{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}"
  "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}"
  "{%- endif %}{%- endfor %}"
  "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
QWEN25 = (
  _TOOLS_QWEN + "{%- else %}{{- '<|im_start|>system\nYou are Q.<|im_end|>\n' }}{%- endif %}"
  "{%- for message in messages %}"
  "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) or "
  "(message.role == 'assistant' and not message.tool_calls) %}"
  "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
  "{%- elif message.role == 'assistant' %}{{- '<|im_start|>assistant' }}"
  "{%- if message.content %}{{- '\n' + message.content }}{%- endif %}"
  + _CALLS_QWEN.replace(
    "{%- if (loop.first and message.content) or not loop.first %}{{- '\n' }}{%- endif %}", "{{- '\n' }}"
  )
  + "{{- '<|im_end|>\n' }}"
  + _RESULTS_QWEN
)
# With marks around what is learnt: calls and answers.
QWEN25_MARKED = (
  QWEN25.replace("(message.role == 'assistant' and not message.tool_calls)", "false")
  .replace("{{- '<|im_start|>assistant' }}", "{{- '<|im_start|>assistant' }}{% generation %}")
  .replace(
    "{{- '<|im_end|>\n' }}{%- elif message.role == 'tool' %}",
    "{{- '<|im_end|>\n' }}{% endgeneration %}{%- elif message.role == 'tool' %}",
  )
)
# Reasoning is kept behind the last question alone; the last answer gets a think block even when it has no reasoning.
QWEN3 = (
  (
    _TOOLS_QWEN + "{%- endif %}"
    "{%- set ns = namespace(multi=true, last=messages|length - 1) %}"
    "{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
    "{%- if ns.multi and message.role == 'user' and message.content is string and not "
    "(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}"
    "{%- set ns.multi = false %}{%- set ns.last = index %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}"
    "{%- set content = message.content if message.content is string else '' %}"
    "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}"
    "{%- elif message.role == 'assistant' %}{%- set reasoning = '' %}"
    "{%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}"
    "{%- elif '</think>' in content %}"
    "{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or reasoning) %}"
    "{{- '<|im_start|>assistant\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}" + _CALLS_QWEN + "{{- '<|im_end|>\n' }}"
  )
  + _RESULTS_QWEN.removesuffix("{%- endif %}")
  + (
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
  )
)
R1_DISTILL = (
  "{% set ns = namespace(tool=false, first=true, system='') %}"
  "{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.system = message['content'] %}"
  "{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system }}"
  "{%- for message in messages %}{%- if message['role'] == 'user' %}"
  "{%- set ns.tool = false -%}{{ '<|User|>' + message['content'] }}{%- endif %}"
  "{%- if message['role'] == 'assistant' and message['tool_calls'] %}{{ '<|Assistant|>' }}"
  "{%- for tool in message['tool_calls'] %}"
  "{{ '<|call|>' + tool['type'] + '<|sep|>' + tool['function']['name'] + '\n' + tool['function']['arguments'] }}"
  "{%- endfor %}{{ eos_token }}{%- elif message['role'] == 'assistant' %}"
  "{%- set content = message['content'] %}"
  "{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
  "{%- if ns.tool %}{{ '<|outputs_end|>' + content + eos_token }}{% set ns.tool = false %}"
  "{%- else %}{{ '<|Assistant|>' + content + eos_token }}{%- endif %}{%- endif %}"
  "{%- if message['role'] == 'tool' %}{% set ns.tool = true %}{{ '<|output|>' + message['content'] }}{%- endif %}"
  "{%- endfor %}{% if ns.tool %}{{ '<|outputs_end|>' }}{% endif %}"
  "{% if add_generation_prompt and not ns.tool %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
_LLAMA3_BODY = (
  "{%- if tools is not none and tools %}{%- set tools_in_user = true %}{%- endif %}"
  "{%- if messages[0]['role'] == 'system' %}"
  "{%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}"
  "{%- else %}{%- set system_message = '' %}{%- endif %}"
  "{{- bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' }}"
  "{{- system_message + '<|eot_id|>' }}"
  "{%- if tools_in_user is defined %}{%- set first_user_message = messages[0]['content'] | trim %}"
  "{%- set messages = messages[1:] %}{{- '<|start_header_id|>user<|end_header_id|>\n\nUse these functions.\n\n' }}"
  "{%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\n\n' }}{%- endfor %}"
  "{{- first_user_message + '<|eot_id|>' }}{%- endif %}"
  "{%- for message in messages %}"
  "{%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}"
  "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
  "{%- elif 'tool_calls' in message %}"
  "{%- if not message.tool_calls | length == 1 %}"
  "{{- raise_exception('This model only supports single tool-calls at once!') }}{%- endif %}"
  "{%- set tool_call = message.tool_calls[0].function %}"
  "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' + '{\"name\": \"' + tool_call.name + '\", ' }}"
  "{{- '\"parameters\": ' }}{{- tool_call.arguments | tojson }}{{- '}<|eot_id|>' }}"
  "{%- else %}{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}"
  "{%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}"
  "{%- else %}{{- message.content }}{%- endif %}{{- '<|eot_id|>' }}{%- endif %}{%- endfor %}"
  "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
LLAMA31 = "{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}" + _LLAMA3_BODY
LLAMA32 = (
  "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
  "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
  "{%- endif %}" + _LLAMA3_BODY
)
_MISTRAL_CALLS = (
  "{%- elif message.tool_calls is defined and message.tool_calls is not none %}{{- '[TOOL_CALLS] [' }}"
  "{%- for tool_call in message.tool_calls %}{%- set out = tool_call.function | tojson %}{{- out[:-1] }}"
  "{%- if not tool_call.id is defined or tool_call.id | length != 9 %}"
  "{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{%- endif %}"
  "{{- ', \"id\": \"' + tool_call.id + '\"}' }}"
  "{%- if not loop.last %}{{- ', ' }}{%- else %}{{- ']' + eos_token }}{%- endif %}{%- endfor %}"
)
_MISTRAL_REST = (
  "{%- elif message['role'] == 'tool' %}"
  "{{- '[TOOL_RESULTS] {\"content\": ' + message.content | string }}"
  "{{- ', \"call_id\": \"' + message.tool_call_id + '\"}' }}"
  "{{- '[/TOOL_RESULTS]' }}{%- else %}{{- raise_exception('Only user and assistant roles are supported') }}"
  "{%- endif %}{%- endfor %}"
)
MISTRAL03 = (
  "{%- if messages[0]['role'] == 'system' %}"
  "{%- set system_message = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}"
  "{%- else %}{%- set loop_messages = messages %}{%- endif %}"
  "{%- set user_messages = loop_messages | selectattr('role', 'equalto', 'user') | list %}"
  "{{- bos_token }}{%- for message in loop_messages %}{%- if message['role'] == 'user' %}"
  "{%- if tools is not none and message == user_messages[-1] %}{{- '[AVAILABLE_TOOLS] ' }}"
  "{{- tools | tojson }}{{- '[/AVAILABLE_TOOLS]' }}{%- endif %}"
  "{%- if loop.last and system_message is defined %}"
  "{{- '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' }}"
  "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
  + _MISTRAL_CALLS
  + "{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] | trim + eos_token }}"
  + _MISTRAL_REST
)
MISTRAL_SMALL = (
  "{%- set today = strftime_now('%Y-%m-%d') %}{{- bos_token }}"
  "{%- if messages[0]['role'] == 'system' %}"
  "{%- set system_message = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}"
  "{%- else %}{%- set system_message = 'The current date is ' + today + '.' %}{%- set loop_messages = messages %}"
  "{%- endif %}{{- '[SYSTEM_PROMPT]' + system_message + '[/SYSTEM_PROMPT]' }}"
  "{%- for message in loop_messages %}{%- if message['role'] == 'user' %}"
  "{{- '[INST]' + message['content'] + '[/INST]' }}"
  + _MISTRAL_CALLS
  + "{%- elif message['role'] == 'assistant' %}{{- message['content'] + eos_token }}"
  + _MISTRAL_REST
)
GEMMA2 = (
  "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
  "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
  "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
  "{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
  "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
SMOLLM3 = (
  "{%- set today = strftime_now('%d %B %Y') -%}{%- set mode = '/think' -%}"
  "{%- if messages[0].role == 'system' and '/no_think' in messages[0].content %}{% set mode = '/no_think' %}{% endif %}"
  "{{- '<|im_start|>system\nToday Date: ' ~ today ~ '\nReasoning Mode: ' ~ mode ~ '\n\n' -}}"
  "{%- if messages[0].role == 'system' %}{{- messages[0].content.replace('/no_think', '').rstrip() -}}{% endif %}"
  "{{- '<|im_end|>\n' -}}"
  "{%- for message in messages -%}{%- set content = message.content if message.content is string else '' -%}"
  "{%- if message.role == 'user' -%}{{- '<|im_start|>user\n' + content + '<|im_end|>\n' -}}"
  "{%- elif message.role == 'assistant' -%}{% generation %}"
  "{%- if mode == '/think' -%}{{- '<|im_start|>assistant\n' + content.lstrip('\n') + '<|im_end|>\n' -}}"
  "{%- else -%}{{- '<|im_start|>assistant\n<think>\n\n</think>\n' + content.lstrip('\n') + '<|im_end|>\n' -}}"
  "{%- endif -%}{% endgeneration %}"
  "{%- elif message.role == 'tool' -%}{{- '<|im_start|>user\n' + content + '<|im_end|>\n' -}}{%- endif -%}"
  "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}"
  "{%- if mode == '/no_think' -%}{{- '<think>\n\n</think>\n' -}}{%- endif -%}{%- endif -%}"
)
PHI3 = (
  "{% for message in messages %}{% if message['role'] == 'system' %}"
  "{{ '<|system|>\n' + message['content'] + '<|end|>\n' }}{% elif message['role'] == 'user' %}"
  "{{ '<|user|>\n' + message['content'] + '<|end|>\n' }}{% elif message['role'] == 'assistant' %}"
  "{{ '<|assistant|>\n' + message['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
  "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
  "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
  "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
  "{{ '<|assistant|>\n' + message['content'] + eos_token }}\n{% endif %}\n"
  "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
LLAMA2 = (
  "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
  "{% set system_message = messages[0]['content'] %}"
  "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
  "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
  "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
  "{% if loop.index0 == 0 and system_message != false %}"
  "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
  "{% else %}{% set content = message['content'] %}{% endif %}"
  "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}"
  "{% elif message['role'] == 'assistant' %}{{ ' ' + content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# No terminator: the next header ends an answer.
GLM4 = (
  "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
  "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Ends the last answer in another word than those before it, and its header names a channel.
HARMONY = (
  "{% for m in messages %}{% if m.role == 'assistant' %}"
  "{% if m.thinking is defined and loop.last %}"
  "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
  "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
  "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
# Takes the turns by their numbers, two at a time.
PAIRS = (
  "{% for i in range(0, messages | length, 2) %}{% set q = messages[i] %}{% set a = messages[i + 1] %}"
  "{{ 'Q: ' + q.content + '\nA:' }}{% if a is defined %}{{ ' ' + a.content + eos_token + '\n' }}{% endif %}{% endfor %}"
)
# Shortens every answer but the last.
FORGETFUL = (
  "{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }}\n{% elif loop.last %}A:{{ m.content }}\n"
  "{% else %}A:...\n{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
GENERATION = (
  "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
  "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
  "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
