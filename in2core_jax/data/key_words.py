"""Names of keys that mean something where no shape reads them: lists for `record_keys`."""

import re

SHORT = 500  # characters: an id, a source or a list of tags; a longer text may be a document
# Names of a category as often as of a text that the question is about; the text is longer than so many characters.
PERHAPS_TEXT = frozenset(["title", "subject", "section", "state", "task", "group", "field", "area", "class", "page"])
CATEGORY = 40

# Names in lower case with underscores, whatever their spelling in the data.
NO_MEANING = frozenset(
  [
    "id",
    "ids",
    "idx",
    "index",
    "no",
    "nr",
    "number",
    "key",
    "uid",
    "uuid",
    "guid",
    "qid",
    "pid",
    "sha",
    "md5",
    "sha1",
    "sha256",
    "hash",
    "hashed_ip",
    "fingerprint",
    "system_fingerprint",
    "unnamed_0",
    "source",
    "sources",
    "dataset",
    "dataset_name",
    "dataset_source",
    "data_source",
    "origin",
    "provenance",
    "subset",
    "split",
    "config",
    "corpus",
    "url",
    "urls",
    "uri",
    "link",
    "links",
    "website",
    "domain",
    "file",
    "files",
    "file_name",
    "filename",
    "file_path",
    "filepath",
    "path",
    "line",
    "line_number",
    "page",
    "section",
    "license",
    "licence",
    "copyright",
    "author",
    "authors",
    "annotator",
    "annotators",
    "annotator_ids",
    "username",
    "user_name",
    "owner",
    "contributor",
    "created",
    "created_at",
    "updated",
    "updated_at",
    "date",
    "year",
    "time",
    "timestamp",
    "datetime",
    "lang",
    "langs",
    "language",
    "languages",
    "locale",
    "country",
    "state",
    "topic",
    "topics",
    "category",
    "categories",
    "subcategory",
    "class",
    "cluster",
    "cluster_id",
    "genre",
    "subject",
    "field",
    "area",
    "task",
    "tasks",
    "task_type",
    "task_name",
    "template_type",
    "annotation_type",
    "language_code",
    "type",
    "kind",
    "tag",
    "tags",
    "keyword",
    "keywords",
    "label_name",
    "title",
    "group",
    "difficulty",
    "complexity",
    "level",
    "grade",
    "round",
    "score",
    "scores",
    "rating",
    "ratings",
    "rank",
    "quality",
    "reward",
    "rewards",
    "confidence",
    "similarity",
    "perplexity",
    "ppl",
    "toxicity",
    "toxic",
    "redacted",
    "upvotes",
    "downvotes",
    "votes",
    "likes",
    "reviews",
    "review_count",
    "popularity",
    "views",
    "logprob",
    "logprobs",
    "entropy",
    "ifd",
    "model",
    "models",
    "model_name",
    "model_id",
    "llm",
    "engine",
    "generator",
    "generated_by",
    "teacher",
    "provider",
    "version",
    "revision",
    "temperature",
    "top_p",
    "top_k",
    "max_tokens",
    "seed",
    "sampling_params",
    "stop",
    "finish_reason",
    "stop_reason",
    "usage",
    "cost",
    "latency",
    "duration",
    "length",
    "len",
    "tokens",
    "token_count",
    "token_counter",
    "n_tokens",
    "turn",
    "turns",
    "turn_identifier",
    "turn_index",
    "num_turns",
    "size",
    "count",
    "metadata",
    "meta",
    "meta_data",
    "header",
    "headers",
    "annotations",
    "moderation",
    "openai_moderation",
    "detoxify_moderation",
    "parallel_tool_calls",
    "tool_choice",
    "cache_control",
    "end_turn",
  ]
)
ANY_SIZE = frozenset(
  ["metadata", "meta", "meta_data", "header", "headers", "moderation", "openai_moderation", "detoxify_moderation"]
)
# Under a name without meaning, what may have one: earlier rounds in `metadata`, say.
PARTS = frozenset(
  ["messages", "conversations", "conversation", "dialog", "dialogue", "history", "context", "documents"]
  + ["system", "system_prompt", "system_message", "instruction", "input", "prompt", "query", "question"]
  + ["response", "completion", "output", "answer", "text", "tools", "functions", "tool_calls", "function_call"]
  + ["reasoning", "reasoning_content", "thinking", "thought", "thoughts"]
)
OF_NUMBERS = re.compile(r"(num|n)_\w+|\w+_(count|tokens|length|len|size|score|scores|rating|rank|logprob|ppl|time)")
OF_WORDS = re.compile(
  r"\w+_(id|uuid|hash|sha|md5|url|link|date|at|lang|language|locale|model|version|source|dataset|type|index|idx)"
  r"|\w+_licen[sc]e"
  r"|(index_level|unnamed)_\d+|score_\w+"
)
COUNTED_LISTS = frozenset(["tokens", "turns"])  # numbers have no meaning, lists under these names may be the data

ANSWER = r"(response|answer|message|conversation|output|completion|text|content|reply|sample|image)s?"
PREFERENCE = re.compile(rf"(chosen|rejected)(_{ANSWER})?|{ANSWER}_(chosen|rejected)|(non_?)?preferred_{ANSWER}")

# With a boolean: whether the answer is a good one (KTO).
WANTED = frozenset(["label", "kto_tag", "kto_label", "desirable", "chosen", "accepted", "preferred"])
UNWANTED = frozenset(["rejected", "undesirable"])

# True, 1: the loss counts it.
LEARNT = frozenset(
  [
    "weight",
    "train",
    "trained",
    "training",
    "trainable",
    "train_on",
    "train_on_turn",
    "do_train",
    "should_train",
    "is_trained",
    "is_train",
    "learn",
    "learned",
    "learnt",
    "loss",
    "has_loss",
    "compute_loss",
    "calculate_loss",
    "calc_loss",
    "use_loss",
    "with_loss",
    "in_loss",
    "loss_weight",
    "loss_scale",
    "loss_mask",
    "train_mask",
    "training_mask",
    "is_target",
    "supervise",
    "supervised",
    "is_supervised",
    "is_trainable",
    "learnable",
    "to_train",
    "unmasked",
    "is_unmasked",
  ]
)
# True, 1: the loss passes it over.
NOT_LEARNT = frozenset(
  [
    "masked",
    "is_masked",
    "ignore",
    "ignored",
    "ignore_loss",
    "no_loss",
    "no_train",
    "no_training",
    "skip_loss",
    "exclude_loss",
    "exclude_from_loss",
    "exclude_from_training",
    "dont_train",
    "do_not_train",
    "untrained",
    "no_grad",
    "skip",
    "skipped",
    "skip_train",
    "skip_training",
    "exclude",
    "excluded",
    "deleted",
    "is_deleted",
  ]
)
DETAILS = re.compile(r"(train|training|loss|mask)_(detail|details|range|ranges|spans?)")
ABOUT_LOSS = frozenset(["loss", "train", "training", "trained", "mask", "masked", "masking", "weight", "weights"])
SAMPLE_WEIGHTS = frozenset(
  ["weight", "weights", "sample_weight", "example_weight", "loss_weight", "loss_scale", "row_weight"]
)
# Under a name of reasoning: whether somebody is to think, and how much. Nemotron has "on" and "off".
SWITCH = frozenset(["on", "off", "yes", "no", "true", "false", "none", "auto", "low", "medium", "high", "minimal"])
SWITCH |= {"enabled", "disabled", "0", "1"}
# Keys of a whole record that other trainers have as settings, and the value that says what we do anyway.
SETTINGS = {
  **dict.fromkeys(["train_on_input", "train_on_inputs", "train_on_prompt", "train_on_prompts", "train_on_user"], False),
  **dict.fromkeys(["mask_history", "last_turn_only", "only_last_turn", "train_on_last_turn_only", "only_last"], False),
  **dict.fromkeys(
    ["mask_input", "mask_inputs", "mask_prompt", "mask_prompts", "mask_user", "assistant_only_loss"], True
  ),
  **dict.fromkeys(["completion_only_loss", "train_on_response", "train_on_responses", "train_on_responses_only"], True),
}
MASKED_ROLES = frozenset(["user", "users", "human", "instruction", "prompt", "input"])  # NeMo: whose turns are masked
