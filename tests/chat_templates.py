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
# --- families of 2024 and 2025
COMMAND_R = (
  "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
  "{% set system_message = messages[0]['content'] %}{% elif false == true %}{% set loop_messages = messages %}"
  "{% set system_message = 'You are Command-R.' %}{% else %}{% set loop_messages = messages %}"
  "{% set system_message = false %}{% endif %}{% if system_message != false %}"
  "{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + system_message + '<|END_OF_TURN_TOKEN|>' }}{% endif %}"
  "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
  "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
  "{% set content = message['content'] %}{% if message['role'] == 'user' %}"
  "{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% elif "
  "message['role'] == 'assistant' %}"
  "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>'  + content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endif %}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
# The line break behind an answer is missing at the end.
OLMO2 = (
  "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
  "{{ '<|system|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'user' %}"
  "{{ '<|user|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'assistant' %}{% if not loop.last %}"
  "{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}{% else %}"
  "{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endif %}{% endif %}"
  "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
VICUNA = (
  "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}{% set messages = messages[1:] %}"
  "{% else %}{{ 'A chat. ' }}{% endif %}{% for m in messages %}"
  "{% if m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}"
  "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# An empty think block stands behind the generation prompt; no terminator.
GLM45 = (
  "[gMASK]<sop>\n{%- set ns = namespace(last_user_index=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}"
  "{% set ns.last_user_index = loop.index0 -%}{%- endif %}{%- endfor %}{% for m in messages %}"
  "{%- if m.role == 'user' -%}<|user|>\n{{ m.content }}{%- elif m.role == 'assistant' -%}<|assistant|>{%- "
  "set reasoning_content = '' %}{%- set content = m.content %}{%- if m.reasoning_content is string %}"
  "{%- set reasoning_content = m.reasoning_content %}{%- else %}{%- if '</think>' in content %}"
  "{%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
  "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}{%- endif %}"
  "{%- if loop.index0 > ns.last_user_index and reasoning_content -%}"
  "{{ '\n<think>' + reasoning_content.strip() +  '</think>'}}{%- else -%}{{ '\n<think></think>' }}{%- endif -%}"
  "{%- if content.strip() -%}{{ '\n' + content.strip() }}{%- endif -%}"
  "{%- elif m.role == 'system' -%}<|system|>\n{{ m.content }}{%- endif -%}{%- endfor -%}"
  "{%- if add_generation_prompt -%}<|assistant|>{{- '\n<think></think>' if (enable_thinking is defined and "
  "not enable_thinking) else '' -}}{%- endif -%}"
)
# The generation prompt opens the thought.
QWEN3_THINKING = (
  "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}"
  "{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
  "{%- if ns.multi_step_tool and message.role == 'user' and message.content is string %}"
  "{%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}{%- endif %}{%- endfor %}"
  "{%- for message in messages %}{%- set content = message.content %}{%- if message.role in ['user','system'] %}"
  "{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}{%- elif message.role == 'assistant' %}"
  "{%- set reasoning_content = '' %}{%- if message.reasoning_content is string %}"
  "{%- set reasoning_content = message.reasoning_content %}{%- else %}{%- if '</think>' in content %}"
  "{%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
  "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}{%- endif %}"
  "{%- if loop.index0 > ns.last_query_index %}{%- if loop.last or (not loop.last and reasoning_content) %}"
  "{{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + "
  "content.lstrip('\n') }}{%- else %}{{- '<|im_start|>' + message.role + '\n' + content }}{%- endif %}{%- else %}"
  "{{- '<|im_start|>' + message.role + '\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
  "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
)
# Its header ends a thought that nobody began.
DEEPSEEK_V31 = (
  "{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
  "{% set ns = namespace(is_last_user=false, system_prompt='') %}{%- for message in messages %}"
  "{%- if message['role'] == 'system' %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}"
  "{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}{%- for message in messages %}"
  "{%- if message['role'] == 'user' %}{%- set ns.is_last_user = true -%}"
  "{{'<|User|>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' %}{%- if ns.is_last_user %}"
  "{{'<|Assistant|>'}}{%- if message['prefix'] is defined and message['prefix'] and thinking %}"
  "{{'<think>'}}{%- else %}{{'</think>'}}{%- endif %}{%- endif %}{%- set ns.is_last_user = false -%}"
  "{%- set content = message['content'] -%}{%- if '</think>' in content %}"
  "{%- set content = content.split('</think>', 1)[1] -%}{%- endif %}{{content + eos_token}}{%- endif %}"
  "{%- endfor -%}{%- if add_generation_prompt and ns.is_last_user %}{{'<|Assistant|>'}}{%- if not thinking %}"
  "{{'</think>'}}{%- else %}{{'<think>'}}{%- endif %}{% endif %}"
)
GRANITE3 = (
  "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
  "{%- set loop_messages = messages[1:] %}{%- else %}"
  "{%- set system_message = 'Knowledge Cutoff Date: April 2024.\nToday\\'s Date: ' + strftime_now('%B %d, "
  "%Y') + '.\nYou are Granite.' %}{%- set loop_messages = messages %}{%- endif %}"
  "{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\n' }}{%- if documents %}"
  "{{- 'docs' }}{%- endif %}{%- for message in loop_messages %}"
  "{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\n' "
  "}}{%- if loop.last and add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"
  "{%- endfor %}"
)
# A variable of its own is both asked for and set.
ERNIE45 = (
  "{%- if not cls_token is defined %}{%- set cls_token = '<|begin_of_sentence|>' %}{%- endif %}"
  "{%- if not sep_token is defined %}{%- set sep_token = '<|end_of_sentence|>' %}{%- endif %}"
  "{{- cls_token }}{%- for message in messages %}{%- if message['role'] == 'user' %}"
  "{{- 'User: ' + message['content'] + '\n' }}{%- elif message['role'] == 'assistant' %}"
  "{{- 'Assistant: ' + message['content'] + sep_token }}{%- elif message['role'] == 'system' %}"
  "{{- message['content'] + '\n' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}"
  "{{- 'Assistant: ' }}{%- endif %}"
)
# The generation prompt goes on otherwise than what stands in front of a finished answer.
NEMOTRON = (
  "{{ '<SPECIAL_10>System\n' }}{%- if messages[0].role == 'system' %}{{ messages[0].content }}{%- endif %}"
  "{{ '\n' }}{%- for message in messages %}{%- if message.role == 'user' %}"
  "{{ '<SPECIAL_11>User\n' + message.content.strip() + '\n' }}{%- elif message.role == 'assistant' %}"
  "{%- set content = message.content %}{%- if '</think>' in content %}"
  "{%- set content = content.split('</think>')[1].strip() %}{%- endif %}"
  "{{ '<SPECIAL_11>Assistant\n' + '<think></think>' + content.strip() + '\n<SPECIAL_12>\n' }}{%- endif %}"
  "{%- endfor %}{%- if add_generation_prompt %}{{ '<SPECIAL_11>Assistant\n<think>\n' }}{%- endif %}"
)
# An answer is ended where the next turn begins.
APERTUS = (
  "{{ bos_token }}{%- set ns = namespace(in_assistant=false) -%}{%- for message in messages -%}"
  "{%- if message.role == 'system' -%}"
  "{{ '<|system_start|>' + message.content + '<|system_end|>' }}{%- elif message.role == 'user' -%}"
  "{%- if ns.in_assistant -%}{{ '<|assistant_end|>' }}{%- set ns.in_assistant = false -%}{%- endif -%}"
  "{{ '<|user_start|>' + message.content + '<|user_end|>' }}{%- elif message.role == 'assistant' -%}"
  "{%- if not ns.in_assistant -%}{{ '<|assistant_start|>' }}{%- set ns.in_assistant = true -%}{%- endif -%}"
  "{{ message.content }}{%- endif -%}{%- endfor -%}{%- if ns.in_assistant -%}{{ '<|assistant_end|>' }}{%- endif -%}"
  "{%- if add_generation_prompt -%}{{ '<|assistant_start|>' }}{%- endif -%}"
)
OPENCHAT = (
  "{{ bos_token }}{% for message in messages %}"
  "{{ 'GPT4 Correct ' + message['role'].title() + ': ' + message['content'] + '<|end_of_turn|>'}}{% endfor %}"
  "{% if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}"
)
# Calls are rendered where the content is null, and not where it is an empty text.
DEEPSEEK_V3 = (
  "{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='', "
  "is_first_sp=true) %}{%- for message in messages %}{%- if message['role'] == 'system' %}"
  "{% set ns.system_prompt = ns.system_prompt + message['content'] %}{%- endif %}{%- endfor %}"
  "{{ bos_token }}{{ ns.system_prompt }}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
  "{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}"
  "{{'<|User|>' + message['content']}}{%- endif %}"
  "{%- if message['role'] == 'assistant' and message['content'] is none %}{%- set ns.is_tool = false -%}"
  "{%- for tool in message['tool_calls']%}{%- if not ns.is_first %}"
  "{{'<|Assistant|><|tool▁calls▁begin|><|tool▁call▁begin|>' + tool['type'] + '<|tool▁sep|>' + "
  "tool['function']['name'] + '\n```json\n' + tool['function']['arguments'] + '\n```<|tool▁call▁end|>'}}{%- "
  "set ns.is_first = true -%}{%- else %}"
  "{{'\n' + tool['function']['name']}}{{'<|tool▁calls▁end|><|end▁of▁sentence|>'}}{%- endif %}{%- endfor %}"
  "{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is not none %}{%- if ns.is_tool %}"
  "{{'<|tool▁outputs▁end|>' + message['content'] + eos_token}}{%- set ns.is_tool = false -%}{%- else %}"
  "{{'<|Assistant|>' + message['content'] + eos_token}}{%- endif %}{%- endif %}{%- if message['role'] == 'tool' %}"
  "{%- set ns.is_tool = true -%}{%- if ns.is_output_first %}"
  "{{'<|tool▁outputs▁begin|><|tool▁output▁begin|>' + message['content'] + '<|tool▁output▁end|>'}}{%- set "
  "ns.is_output_first = false %}{%- else %}"
  "{{'\n<|tool▁output▁begin|>' + message['content'] + '<|tool▁output▁end|>'}}{%- endif %}{%- endif %}{%- endfor -%}"
  "{% if ns.is_tool %}{{'<|tool▁outputs▁end|>'}}{% endif %}{% if add_generation_prompt and not ns.is_tool %}"
  "{{'<|Assistant|>'}}{% endif %}"
)
