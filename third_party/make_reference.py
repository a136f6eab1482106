"""Makes the reference values of tests/model/test_parity.py with PyTorch, independently of in2core_jax.

Nothing of the package is imported: the GGUF file is dequantised by `gguf`, the tokenizer is built here from the file's
vocabulary, and the numbers are those of transformers' own models in float32 (of the tiny ones in float64). Run it in
an environment of its own, never in the project's (which has no torch):

    python3.11 -m venv /tmp/reference
    /tmp/reference/bin/pip install torch==2.13.0 transformers==5.23.0 gguf==0.19.0 sentencepiece==0.2.3 protobuf==7.36.2
    cat gemma-3-270m-q4_k_m.gguf.part0? > gemma-3-270m-q4_k_m.gguf
    /tmp/reference/bin/python third_party/make_reference.py --gguf=SmolLM2-135M-Instruct.Q4_1.gguf \\
      --gemma=gemma-3-270m-q4_k_m.gguf

The committed values were made with these versions on a CPU (about a minute); what is not given is not made. Written
into third_party/reference/:

    prompts.json   rendered conversations, token ids, response mask, NLL of every token (nats), mean over the response,
                   greedy continuations
    logits.npz     for each conversation: positions [P], indices [P, K] into the vocabulary, logits [P, K]
    gemma3_prompts.json, gemma3_logits.npz   the same of Gemma 3; token ids are those of SentencePiece and of
                   transformers' GemmaTokenizer, which must agree
    tiny.json      small configurations, the shapes and the seed of their weights, token ids
    tiny.npz       their logits [B, T, V]
    families.json  the same of one model of each family in families.py, with every option that the family has; also the
                   mean loss of each text, over all its tokens
    families.npz   their logits at the last positions [B, 4, V]; some entries of the gradients of the mean loss
                   "exported": the config.json of our exporter, which transformers reads as the same model
    exports.json   folders that our exporter wrote (tests/model/exported.py OUT, in the project's environment; then
                   --exports=OUT here), as transformers read them: config.json, checksum of the tensors, token ids
    exports.npz    their logits [B, T, V]
"""

import argparse
import json
import pathlib
import tempfile
import zlib

import gguf
import numpy as np
import safetensors.numpy
import tokenizers
import torch
import transformers
from transformers.convert_slow_tokenizer import generate_merges

OUT = pathlib.Path(__file__).resolve().parent / "reference"
TOP, SAMPLED = 50, 200

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
LONG = (
  "Influence functions estimate how the loss of a model on one example would change if a training example were given "
  "a little more weight. They need the gradient of both examples and the inverse of the curvature of the training "
  "loss, which is far too large to be written down for a neural network. Practical methods therefore solve a linear "
  "system with products only, or approximate the curvature by a sum of small blocks, one for each layer. When the aim "
  "is to choose training data, the scores of all examples are sorted and the best part is kept; when the aim is to "
  "find labelling errors, the examples that hurt are shown to a person first. Both uses depend on the damping, a "
  "small number that is added to the diagonal, and on which parameters take part. A score is only an answer to a "
  "question about one example at a time: what happens when half of the data is removed is another question, and it "
  "has to be settled by training again."
)


def _turns(*texts: str) -> list[dict[str, str]]:
  return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


CONVERSATIONS = {
  "capital": _turns("What is the capital of France?", "The capital of France is Paris."),
  "name": _turns("What is your name?", "My name is SmolLM. How can I help you today?"),
  "system": [
    {"role": "system", "content": "Answer in one word."},
    *_turns("Is the sky blue?", "Yes"),
  ],
  "arithmetic": _turns(
    "What is 12 + 30?", "12 + 30 = 42.", "And 42 * 1000?", "42 * 1000 = 42000.", "Minus 2026?", "42000 - 2026 = 39974."
  ),
  "chat": _turns(
    "Hi, how are you?", "I'm fine, thank you! And you?", "Great. Tell me a joke.", "Why did the chicken cross the road?"
  ),
  "code": _turns(
    "Write a Python function that adds two numbers.",
    "Here it is:\n\n```python\ndef add(a, b):\n    return a + b\n```\n\nCall it with `add(1, 2)`.",
  ),
  "accents": _turns("Traduis « bonjour » en allemand et en japonais.", "Guten Tag – こんにちは 🙂"),
  "input": _turns(
    "Classify the sentiment of the sentence.\n\nThe film was long, but I could not stop watching.",
    "The sentiment is positive: the writer enjoyed the film although it was long.",
  ),
  "long": _turns("Explain how influence functions are used to choose training data.", LONG),
  "no system": [{"role": "system", "content": ""}, *_turns("Name three primary colours.", "Red, blue and yellow.")],
}
GREEDY = {"capital": 12, "name": 12}

_TINY = {
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "vocab_size": 61,
  "rms_norm_eps": 1e-5,
  "max_position_embeddings": 128,
}
TINY_CONFIGS = {
  "llama3": _TINY
  | {
    "model_type": "llama",
    "head_dim": 16,
    "tie_word_embeddings": False,
    "rope_theta": 500.0,
    "rope_scaling": {
      "rope_type": "llama3",
      "factor": 8.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 64,
    },
  },
  "linear": _TINY
  | {
    "model_type": "llama",
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 4.0},
  },
  "mistral": _TINY
  | {"model_type": "mistral", "head_dim": 8, "sliding_window": 7, "tie_word_embeddings": False, "rope_theta": 10000.0},
  "qwen2": _TINY | {"model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 1000000.0},
  # Local, local, global, local: the window is shorter than the text, and only global layers have scaled angles.
  "gemma3": _TINY
  | {
    "model_type": "gemma3_text",
    "num_hidden_layers": 4,
    "head_dim": 16,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 24,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_theta": 5000.0,
    "rope_local_base_freq": 100.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
  },
}
_BIASES = {"attention_bias": True, "mlp_bias": True}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 8.0, "beta_slow": 0.5}
_SIZES = _TINY | {"tie_word_embeddings": False, "rope_theta": 1000.0}
_LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.5, 2.5], "long_factor": [2.0, 4.0, 8.0]}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
# One model of each family, with everything on that the family can have; of rotary kinds one each.
FAMILY_CONFIGS = {
  "llama biases yarn": _SIZES
  | _BIASES
  | {"model_type": "llama", "rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False}},
  "llama dynamic": _SIZES | {"model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
  "qwen2 sliding yarn": _SIZES
  | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
  | {"rope_scaling": _YARN},
  "qwen3": _SIZES
  | {"model_type": "qwen3", "head_dim": 16, "attention_bias": True, "use_sliding_window": True, "sliding_window": 9}
  | {"max_window_layers": 2},
  "phi3": _SIZES | {"model_type": "phi3", "sliding_window": 9, "pad_token_id": 0},
  "phi4 mini": _SIZES
  | {"model_type": "phi3", "partial_rotary_factor": 0.75, "rope_scaling": _LONGROPE, "pad_token_id": 0}
  | {"original_max_position_embeddings": 64, "max_position_embeddings": 512, "tie_word_embeddings": True},
  "smollm3": _SIZES
  | _BIASES
  | {"model_type": "smollm3", "no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 7}
  | {"pad_token_id": 0, "tie_word_embeddings": True},
  "granite": _SIZES
  | _BIASES
  | {"model_type": "granite", "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 0.5}
  | {"attention_multiplier": 0.2},
  "olmo2": _SIZES | {"model_type": "olmo2", "attention_bias": True},
  "olmo3": _SIZES
  | {"model_type": "olmo3", "num_hidden_layers": 4, "attention_bias": True, "sliding_window": 7, "rope_scaling": _YARN},
  "gemma": _SIZES
  | {"model_type": "gemma", "head_dim": 16, "hidden_act": "gelu_pytorch_tanh", "attention_bias": True}
  | {"tie_word_embeddings": True},
  "gemma2": _SIZES
  | {"model_type": "gemma2", "head_dim": 16, "attention_bias": True, "sliding_window": 7, "query_pre_attn_scalar": 24}
  | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "tie_word_embeddings": True},
  "ministral": _SIZES | {"model_type": "ministral", "head_dim": 16, "sliding_window": 7, "layer_types": _MIXED},
  "seed_oss": _SIZES
  | {"model_type": "seed_oss", "head_dim": 16, "attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
  "helium": _SIZES | _BIASES | {"model_type": "helium", "head_dim": 8},
  "ernie 4.5": _SIZES
  | {"model_type": "ernie4_5", "head_dim": 16, "use_bias": True, "tie_word_embeddings": True, "pad_token_id": 0},
  "arcee": _SIZES | _BIASES | {"model_type": "arcee", "head_dim": 16, "hidden_act": "relu2", "rope_scaling": _YARN},
  # Mixtures of experts: gates over all experts or over the chosen ones, experts of a width of their own.
  "mixtral": _SIZES
  | {"model_type": "mixtral", "head_dim": 16, "sliding_window": 9, "num_local_experts": 4, "num_experts_per_tok": 2},
  "qwen3 moe": _SIZES
  | {"model_type": "qwen3_moe", "head_dim": 16, "attention_bias": True, "use_sliding_window": True}
  | {"sliding_window": 9, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 12}
  | {"norm_topk_prob": True},
  "qwen2 moe": _SIZES
  | {"model_type": "qwen2_moe", "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 12}
  | {"shared_expert_intermediate_size": 20, "norm_topk_prob": True},
  "olmoe": _SIZES
  | {"model_type": "olmoe", "attention_bias": True, "clip_qkv": 1.5, "num_experts": 4, "num_experts_per_tok": 3}
  | {"norm_topk_prob": True, "intermediate_size": 12},
  "olmoe softmax": _SIZES
  | {"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 12},
  "flex olmo": _SIZES
  | {"model_type": "flex_olmo", "attention_bias": True, "num_experts": 4, "num_experts_per_tok": 2}
  | {"norm_topk_prob": True, "intermediate_size": 12, "pad_token_id": 0, "eos_token_id": 2},
  "granite moe": _SIZES
  | {"model_type": "granitemoe", "attention_bias": True, "embedding_multiplier": 3.0, "residual_multiplier": 0.4}
  | {"logits_scaling": 0.5, "attention_multiplier": 0.2, "num_local_experts": 4, "num_experts_per_tok": 2}
  | {"intermediate_size": 12, "tie_word_embeddings": True},
  "granite moe shared": _SIZES
  | {"model_type": "granitemoeshared", "attention_bias": True, "embedding_multiplier": 3.0, "residual_multiplier": 0.4}
  | {"logits_scaling": 0.5, "attention_multiplier": 0.2, "num_local_experts": 4, "num_experts_per_tok": 2}
  | {"intermediate_size": 12, "shared_intermediate_size": 20},
  # Half of the heads' entries rotated; experts chosen by corrected sigmoids, of two of three groups.
  "minimax m2": _SIZES
  | {"model_type": "minimax_m2", "head_dim": 16, "partial_rotary_factor": 0.5, "num_local_experts": 6}
  | {"num_experts_per_tok": 3, "intermediate_size": 12},
  "solar open": _SIZES
  | {"model_type": "solar_open", "head_dim": 16, "attention_bias": True, "n_routed_experts": 6, "n_group": 3}
  | {"topk_group": 2, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "n_shared_experts": 2}
  | {"norm_topk_prob": True, "routed_scaling_factor": 1.7, "rope_scaling": _YARN},
  "solar open free": _SIZES
  | {"model_type": "solar_open", "head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
  | {"moe_intermediate_size": 12, "n_shared_experts": 1, "norm_topk_prob": False},
  "gpt oss": _SIZES
  | {"model_type": "gpt_oss", "head_dim": 16, "attention_bias": True, "sliding_window": 7, "num_local_experts": 4}
  | {"num_experts_per_tok": 2, "intermediate_size": 12, "swiglu_limit": 0.8, "swiglu_alpha": 1.3}
  | {"rope_scaling": _YARN | {"truncate": False}},
}
LAST, PICKED = 4, 12
TINY_SEED, TINY_BATCH, TINY_LENGTH = 7, 2, 48


def tiny_weights(shapes: dict[str, list[int]], seed: int) -> dict[str, np.ndarray]:
  """Weights by name in sorted order from one NumPy stream; the test draws the same ones (norms around 1, rest 0.2)."""
  rng = np.random.default_rng(seed)
  weights = {}
  for name in sorted(shapes):
    draw = rng.standard_normal(shapes[name])
    weights[name] = (1 + 0.1 * draw if "norm" in name else 0.2 * draw).astype(np.float32)
  return weights


def make_tokenizer(fields) -> tokenizers.Tokenizer:
  """Byte-level BPE with single digits, from the vocabulary, merges and control tokens of the GGUF file."""
  tokens = fields["tokenizer.ggml.tokens"].contents()
  merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()]
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, merges))
  pre = tokenizers.pre_tokenizers
  tokenizer.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
  kinds = fields["tokenizer.ggml.token_type"].contents()
  tokenizer.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == 3])
  return tokenizer


def encode(tokenizer, messages) -> tuple[str, list[int], list[bool]]:
  """Rendered text, token ids and response mask: the assistant's text with its <|im_end|>, not the line break after."""
  messages = messages if messages[0]["role"] == "system" else [{"role": "system", "content": SYSTEM}, *messages]
  text, ids, mask = "", [], []
  for message in messages:
    answer = message["role"] == "assistant"
    pieces = [
      (f"<|im_start|>{message['role']}\n", False),
      (message["content"] + "<|im_end|>", answer),
      ("\n", False),
    ]
    for piece, is_response in pieces:
      new = tokenizer.encode(piece, add_special_tokens=False).ids
      text, ids, mask = text + piece, ids + new, mask + [is_response] * len(new)
  assert ids == tokenizer.encode(text, add_special_tokens=False).ids, "the pieces must not merge across their borders"
  return text, ids, mask


class GemmaPieces:
  """SentencePiece itself on the vocabulary of a GGUF file; control tokens are put in by id, never read from a text."""

  def __init__(self, fields):
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as proto

    read = lambda key: fields[f"tokenizer.ggml.{key}"].contents()  # noqa: E731
    self.tokens, kinds, scores = read("tokens"), read("token_type"), read("scores")
    model = proto.ModelProto()
    for token, kind, score in zip(self.tokens, kinds, scores, strict=True):
      kind = 2 if token == "<unk>" else kind  # the file calls it a control token
      model.pieces.add(piece=token.replace(" ", "\u2581") if kind == 4 else token, score=score, type=kind)
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 2, True  # BPE
    model.trainer_spec.vocab_size = len(self.tokens)
    model.trainer_spec.unk_id, model.trainer_spec.bos_id = 3, 2
    model.trainer_spec.eos_id, model.trainer_spec.pad_id = 1, 0
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    self.sentencepiece = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())

    vocabulary = {token: i for i, token in enumerate(self.tokens)}
    normal = [row for row in zip(self.tokens, scores, kinds, strict=True) if row[2] == 1]
    merges = generate_merges({t: vocabulary[t] for t, _, _ in normal}, {t: score for t, score, _ in normal})
    self.transformers = transformers.GemmaTokenizer(vocab=vocabulary, merges=merges)
    whole = [(t, kind) for t, kind in zip(self.tokens, kinds, strict=True) if kind in (3, 4)]
    self.transformers.add_tokens([tokenizers.AddedToken(t, special=k == 3, normalized=False) for t, k in whole])

  def id(self, token: str) -> int:
    return self.tokens.index(token)

  def encode_turns(self, messages) -> tuple[str, list[int], list[bool]]:
    """Rendered text, token ids and response mask: the model's text with its <end_of_turn>."""
    text, ids, mask = "<bos>", [self.id("<bos>")], [False]
    prefix = ""
    for message in messages:
      if message["role"] == "system":
        prefix = message["content"] + "\n\n"
        continue
      answer = message["role"] == "assistant"
      header = f"{'model' if answer else 'user'}\n"
      body = prefix + message["content"].strip()
      inside, prefix = self.sentencepiece.encode(header + body), ""
      front = len(self.sentencepiece.encode(header))
      ids += [self.id("<start_of_turn>"), *inside, self.id("<end_of_turn>"), self.id("\n")]
      mask += [False] + [answer and t >= front for t in range(len(inside))] + [answer, False]
      text += f"<start_of_turn>{header}{body}<end_of_turn>\n"
    assert ids == self.transformers.encode(text, add_special_tokens=False), "SentencePiece and transformers disagree"
    return text, ids, mask


def load_gemma3(reader) -> transformers.Gemma3ForCausalLM:
  """transformers' Gemma 3 with the dequantised weights of the file, which stores 1 + weight of every norm."""
  get = lambda key: reader.fields[f"gemma3.{key}"].contents()  # noqa: E731
  config = transformers.Gemma3TextConfig(
    vocab_size=262144,
    hidden_size=get("embedding_length"),
    intermediate_size=get("feed_forward_length"),
    num_hidden_layers=get("block_count"),
    num_attention_heads=get("attention.head_count"),
    num_key_value_heads=get("attention.head_count_kv"),
    head_dim=get("attention.key_length"),
    max_position_embeddings=get("context_length"),
    rms_norm_eps=1e-6,
    sliding_window=get("attention.sliding_window"),
    query_pre_attn_scalar=256,
    rope_theta=get("rope.freq_base"),
    rope_local_base_freq=10000.0,
    attn_implementation="eager",
  )
  model = transformers.Gemma3ForCausalLM(config).float().eval()
  state = {}
  for tensor in reader.tensors:
    value = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
    name = gemma3_name(tensor.name.split("."))
    state[name] = torch.from_numpy(value - 1 if "norm" in name else value)
  missing, unexpected = model.load_state_dict(state, strict=False)
  assert not unexpected and missing == ["lm_head.weight"], (missing, unexpected)  # tied
  assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
  return model


def gemma3_name(part: list[str]) -> str:
  """blk.3.post_ffw_norm.weight -> model.layers.3.post_feedforward_layernorm.weight."""
  inside = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
  }
  if part[0] == "blk" and part[2] in inside:
    return f"model.layers.{part[1]}.{inside[part[2]]}.weight"
  return hf_name(part)


def load_llama(reader) -> transformers.LlamaForCausalLM:
  """transformers' Llama with the dequantised weights of the file."""
  get = lambda key: reader.fields[f"llama.{key}"].contents()  # noqa: E731
  heads, kv_heads, width = get("attention.head_count"), get("attention.head_count_kv"), get("embedding_length")
  config = transformers.LlamaConfig(
    vocab_size=get("vocab_size"),
    hidden_size=width,
    intermediate_size=get("feed_forward_length"),
    num_hidden_layers=get("block_count"),
    num_attention_heads=heads,
    num_key_value_heads=kv_heads,
    max_position_embeddings=get("context_length"),
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": get("rope.freq_base")},
    tie_word_embeddings=True,
    attn_implementation="eager",
  )
  model = transformers.LlamaForCausalLM(config).float().eval()
  state = {}
  for tensor in reader.tensors:
    value = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
    part = tensor.name.split(".")
    if part[-2] in ("attn_q", "attn_k"):
      value = undo_interleaving(value, heads if part[-2] == "attn_q" else kv_heads)
    state[hf_name(part)] = torch.from_numpy(value)
  missing, unexpected = model.load_state_dict(state, strict=False)
  assert not unexpected and missing == ["lm_head.weight"], (missing, unexpected)  # tied
  assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
  return model


def undo_interleaving(value: np.ndarray, heads: int) -> np.ndarray:
  """Row 2j of a head goes to j, row 2j + 1 to head_dim / 2 + j."""
  size = value.shape[0] // heads
  order = [head * size + row for head in range(heads) for row in [*range(0, size, 2), *range(1, size, 2)]]
  return value[order]


def hf_name(part: list[str]) -> str:
  """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight."""
  if part[0] != "blk":
    return {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[part[0]]
  inside = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
  }[part[2]]
  return f"model.layers.{part[1]}.{inside}.weight"


def greedy(model, ids: list[int], steps: int, stop: int) -> list[int]:
  """Greedy continuation, by running the whole sequence again for each token."""
  new = []
  for _ in range(steps):
    new.append(int(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax()))
    if new[-1] == stop:
      break
  return new


def make_smollm2(path: pathlib.Path) -> None:
  """Writes prompts.json and logits.npz."""
  reader = gguf.GGUFReader(path)
  tokenizer = make_tokenizer(reader.fields)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
  encoded = {name: (messages, *encode(tokenizer, messages)) for name, messages in CONVERSATIONS.items()}
  make_prompts("", load_llama(reader), encoded, (tokenizer.token_to_id("<|im_end|>"), decode), path)


def make_gemma3(path: pathlib.Path) -> None:
  """Writes gemma3_prompts.json and gemma3_logits.npz."""
  reader = gguf.GGUFReader(path)
  pieces = GemmaPieces(reader.fields)
  encoded = {name: (messages, *pieces.encode_turns(messages)) for name, messages in CONVERSATIONS.items()}
  decode = lambda ids: pieces.transformers.decode(ids, skip_special_tokens=True)  # noqa: E731
  make_prompts("gemma3_", load_gemma3(reader), encoded, (pieces.id("<end_of_turn>"), decode), path)


def make_prompts(prefix: str, model, encoded: dict, ending: tuple, path: pathlib.Path) -> None:
  """Writes PREFIXprompts.json and PREFIXlogits.npz.

  Args:
    prefix: of the file names.
    model: gives logits.
    encoded: name -> messages, text, token ids, response mask.
    ending: the token that ends a turn, and the function that decodes ids.
    path: the file of the model.
  """
  rng = np.random.default_rng(0)
  prompts, arrays = [], {}
  for i, (name, (messages, text, ids, mask)) in enumerate(encoded.items()):
    logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    nll = -torch.log_softmax(logits.double(), -1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].numpy()
    mean = float(nll[np.array(mask[1:])].mean())
    positions = np.array([0, mask.index(True) - 1, len(ids) // 2, len(ids) - 1], np.int32)
    picked = logits.numpy()[positions]
    best = np.argsort(-picked, axis=-1)[:, :TOP]
    sample = np.broadcast_to(np.sort(rng.choice(picked.shape[-1], SAMPLED, replace=False)), (len(positions), SAMPLED))
    indices = np.concatenate([best, sample], -1).astype(np.int32)
    arrays |= {f"positions_{i}": positions, f"indices_{i}": indices}
    arrays |= {f"logits_{i}": np.take_along_axis(picked, indices, -1).astype(np.float32)}
    entry = {
      "name": name,
      "messages": messages,
      "text": text,
      "token_ids": ids,
      "response_mask": [int(m) for m in mask],
    }
    entry |= {"nll": [round(float(x), 9) for x in nll], "response_mean_nll": mean}
    if name in GREEDY:
      start = ids[: mask.index(True)]
      new = greedy(model, start, GREEDY[name], ending[0])
      entry["greedy"] = {"prompt_ids": start, "new_ids": new, "text": ending[1](new)}
    prompts.append(entry)
    print(name, len(ids), sum(mask), round(mean, 4), entry.get("greedy", {}).get("text", ""))
  made_with = {"torch": torch.__version__, "transformers": transformers.__version__, "file": path.name}
  lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in prompts)
  body = f'{{"made_with": {json.dumps(made_with)},\n"prompts": [\n{lines}\n]}}\n'
  (OUT / f"{prefix}prompts.json").write_text(body, encoding="utf-8")
  np.savez_compressed(OUT / f"{prefix}logits.npz", **arrays)


def make_tiny() -> None:
  """Writes tiny.json and tiny.npz."""
  entries, arrays = {}, {}
  for name, values in TINY_CONFIGS.items():
    config = transformers.AutoConfig.for_model(**values)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    if values["tie_word_embeddings"]:
      shapes.pop("lm_head.weight")
    weights = tiny_weights(shapes, TINY_SEED)
    missing, unexpected = model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()}, strict=False)
    assert not unexpected and missing in ([], ["lm_head.weight"]), (missing, unexpected)
    tokens = np.random.default_rng(TINY_SEED).integers(0, values["vocab_size"], (TINY_BATCH, TINY_LENGTH))
    # In float64: in float32 the reference would be as far from the truth as what is held against it.
    arrays[name] = model(torch.from_numpy(tokens), use_cache=False).logits.numpy().astype(np.float32)
    checksum = float(sum(np.abs(weight.astype(np.float64)).sum() for weight in weights.values()))
    entries[name] = {"config": values, "seed": TINY_SEED, "shapes": shapes, "checksum": checksum}
    entries[name] |= {"token_ids": tokens.tolist()}
    print(name, arrays[name].shape, float(np.abs(arrays[name]).max()))
  lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
  (OUT / "tiny.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
  np.savez_compressed(OUT / "tiny.npz", **arrays)


def pick(gradient: np.ndarray) -> np.ndarray:
  """Some entries of a gradient and its norm, float32; the test picks the same ones."""
  flat = gradient.astype(np.float64).ravel()
  return np.append(flat[:: -(-flat.size // PICKED)], np.linalg.norm(flat)).astype(np.float32)


def read_folder(folder: pathlib.Path):
  """The model of a folder in float64, every tensor of it read."""
  model, told = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
  )
  assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (folder, told)
  return model.eval()


def stored(folder: pathlib.Path, model, state: dict | None = None) -> dict[str, np.ndarray]:
  """The model's tensors (or others of the same names) as files name and lay them out: experts one by one."""
  model.save_pretrained(folder, state_dict=state)
  return safetensors.numpy.load_file(folder / "model.safetensors")


def make_families() -> None:
  """Writes families.json and families.npz."""
  entries, arrays = {}, {}
  for name, values in FAMILY_CONFIGS.items():
    with tempfile.TemporaryDirectory() as folder:
      entries[name], found = make_family(pathlib.Path(folder), values)
    arrays |= {f"{name}/{key}": value for key, value in found.items()}
  write_entries("families.json", entries)
  np.savez_compressed(OUT / "families.npz", **arrays)


def make_family(folder: pathlib.Path, values: dict) -> tuple[dict, dict]:
  """(entry of families.json, arrays of families.npz) of one model."""
  config = transformers.AutoConfig.for_model(**json.loads(json.dumps(values)))
  model = transformers.AutoModelForCausalLM.from_config(config).double()
  shapes = {key: list(value.shape) for key, value in stored(folder, model).items()}
  safetensors.numpy.save_file(tiny_weights(shapes, TINY_SEED), folder / "model.safetensors", {"format": "pt"})
  model = read_folder(folder)
  model.get_input_embeddings().padding_idx = None  # else the gradient of its row is left out
  tokens = torch.from_numpy(
    np.random.default_rng(TINY_SEED).integers(0, values["vocab_size"], (TINY_BATCH, TINY_LENGTH))
  )
  with torch.enable_grad():
    logits = model(tokens, use_cache=False).logits
    nll = -torch.log_softmax(logits[:, :-1], -1).gather(-1, tokens[:, 1:, None])[..., 0]
    losses = nll.mean(-1)
    losses.mean().backward()
  slopes = {key: parameter.grad for key, parameter in model.named_parameters()}
  slopes |= {
    key: torch.zeros_like(value) for key, value in model.state_dict().items() if key not in slopes
  }  # constants
  gradients = stored(folder / "gradients", model, slopes)
  assert gradients.keys() == shapes.keys()
  arrays = {"logits": logits[:, -LAST:].detach().numpy().astype(np.float32)}
  arrays["gradients"] = np.concatenate([pick(gradients[key]) for key in sorted(shapes)])
  print(type(model).__name__, [round(loss, 3) for loss in losses.tolist()])
  entry = {"config": values, "seed": TINY_SEED, "shapes": shapes, "token_ids": tokens.tolist()}
  return entry | {"losses": losses.tolist()}, arrays


def check_family_exports(root: pathlib.Path) -> None:
  """Adds to families.json what our exporter writes, where transformers computes the same from it as from the source."""
  entries = json.loads((OUT / "families.json").read_text(encoding="utf-8"))
  with np.load(OUT / "families.npz") as file:
    arrays = {key: file[key] for key in file.files}
  for name, entry in entries.items():
    model = read_folder(root / name)
    logits = model(torch.tensor(entry["token_ids"]), use_cache=False).logits[:, -LAST:].numpy()
    error = float(np.abs(logits - arrays[f"{name}/logits"]).max())
    assert error < 2e-6 * np.abs(logits).max(), (name, error)
    entry["exported"] = json.loads((root / name / "config.json").read_text(encoding="utf-8"))
    print(name, type(model).__name__, error)
  write_entries("families.json", entries)


def write_entries(file: str, entries: dict) -> None:
  """One entry a line."""
  lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
  (OUT / file).write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def make_exports(root: pathlib.Path) -> None:
  """Writes exports.json and exports.npz: what transformers makes of folders of our exporter."""
  entries, arrays = {}, {}
  for folder in sorted(path.parent for path in root.glob("*/config.json")):
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (folder, told)
    config, crc = json.loads((folder / "config.json").read_text(encoding="utf-8")), 0
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    for name in sorted(tensors):
      crc = zlib.crc32(np.ascontiguousarray(tensors[name]).tobytes(), zlib.crc32(name.encode(), crc))
    tokens = np.random.default_rng(TINY_SEED).integers(0, config["vocab_size"], (TINY_BATCH, TINY_LENGTH))
    arrays[folder.name] = model.eval()(torch.from_numpy(tokens), use_cache=False).logits.numpy()
    entries[folder.name] = {
      "config": config,
      "checksum": crc,
      "max_position_embeddings": model.config.max_position_embeddings,
      "eos_token_id": model.generation_config.eos_token_id,
      "token_ids": tokens.tolist(),
    }
    print(folder.name, type(model).__name__, float(np.abs(arrays[folder.name]).max()))
  lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
  (OUT / "exports.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
  np.savez_compressed(OUT / "exports.npz", **arrays)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--gguf", type=pathlib.Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
  parser.add_argument("--gemma", type=pathlib.Path, help="gemma-3-270m-q4_k_m.gguf, its parts put together")
  parser.add_argument("--families", action="store_true", help="make the values of families.json only")
  parser.add_argument("--exports", type=pathlib.Path, help="folder of exported folders, from tests/model/exported.py")
  arguments = parser.parse_args()
  OUT.mkdir(exist_ok=True)
  torch.set_grad_enabled(False)
  if arguments.exports:
    make_exports(arguments.exports)
    check_family_exports(arguments.exports / "families")
    return
  if arguments.families:
    make_families()
    return
  make_tiny()
  make_families()
  if arguments.gguf:
    make_smollm2(arguments.gguf)
  if arguments.gemma:
    make_gemma3(arguments.gemma)


if __name__ == "__main__":
  main()
