"""What is easily done wrong in tokenizers and chat templates."""

from __future__ import annotations

ROOM, TESTS = "src/pellucid/tokenizers/", "tests/tokenizers/"
FILES, OLDER, TWIN, WORDS = (f"{TESTS}test_{name}.py" for name in ("tokenizer_files", "older_files", "bpe_twin", "wordpiece_twin"))
CHAT, FAMILIES, BATCHES = (f"{TESTS}test_{name}.py" for name in ("chat_templates", "template_families", "encoder_batches"))
STREAM, HOSTILE, BOUNDS = (f"{TESTS}test_{name}.py" for name in ("stream_and_show", "hostile_tokenizers", "template_bounds"))

MUTANTS = [
    # --- how text is cut and composed
    (ROOM + "patterns.py", r"""QWEN_PATTERN = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" """.strip(), r"""QWEN_PATTERN = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" """.strip(), OLDER),
    (ROOM + "patterns.py", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}", r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}", FILES),
    (ROOM + "patterns.py", r"""LLAMA3_PATTERN = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" """.strip(), r"""LLAMA3_PATTERN = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" """.strip(), FILES),
    (ROOM + "engines.py", "text = self.normal(text) if self.nfc else text", "pass", FILES),
    (ROOM + "vocabularies.py", "write(ByteLevelBPE(ranks, pairs, QWEN_PATTERN, nfc=True, whole_pieces=whole))", "write(ByteLevelBPE(ranks, pairs, QWEN_PATTERN, nfc=False, whole_pieces=whole))", OLDER),
    (ROOM + "vocabularies.py", "entry(len(ranks) + i, name)", "entry(len(ranks) + i + 1, name)", OLDER),
    (ROOM + "vocabularies.py", "range(205)", "range(204)", OLDER),
    (ROOM + "vocabularies.py", 'qwen = family == "Qwen2Tokenizer"', "qwen = True", OLDER),
    (ROOM + "vocabularies.py", '("strip_accents", None)', '("strip_accents", False)', OLDER),
    (ROOM + "vocabularies.py", '{"type": "Lowercase"}]', "]", OLDER),
    (ROOM + "vocabularies.py", '"end_of_word_suffix": "</w>"', '"end_of_word_suffix": ""', OLDER),
    (ROOM + "reading.py", "number != len(ranks)", "False", OLDER),
    # --- the readable twins
    (ROOM + "bpe.py", "key=lambda pair: (counts[pair], -pair[0], -pair[1])", "key=lambda pair: (counts[pair], pair[0], pair[1])", TWIN),
    (ROOM + "bpe.py", "key=lambda pair: merges.get(pair, float(\"inf\"))", "key=lambda pair: -merges.get(pair, float(\"-inf\"))", TWIN),
    (ROOM + "bpe.py", "            i += 2\n", "            i += 1\n", TWIN),
    (ROOM + "bpe.py", "if rank < lowest:", "if rank <= lowest:", OLDER),
    (ROOM + "wordpiece.py", "range(len(word), start, -1)", "range(start + 1, len(word) + 1)", WORDS),
    (ROOM + "wordpiece.py", "lowercase if strip_accents is None else strip_accents", "bool(strip_accents)", WORDS),
    (ROOM + "wordpiece.py", 'text = spaced(text) if chinese else text', "pass", WORDS),
    (ROOM + "wordpiece.py", "        if end is None:\n            return [unknown]", "        if end is None:\n            return [*found, unknown]", WORDS),
    (ROOM + "wordpiece.py", "if len(word) > longest:", "if len(word) >= longest:", WORDS),
    # --- whole characters
    (ROOM + "stream.py", 'codecs.getincrementaldecoder("utf-8")(errors="replace")', 'codecs.getincrementaldecoder("utf-8")(errors="ignore")', STREAM),
    (ROOM + "stream.py", "return self._utf8.decode(self._token_bytes(token))", 'return self._token_bytes(token).decode("utf-8", "replace")', STREAM),
    (ROOM + "stream.py", 'if text.endswith("\\ufffd"):', "if False:", STREAM),
    (ROOM + "stream.py", "self._decode(self._shown + self._new)) if self._new", "self._decode(self._new)) if self._new", STREAM),
    (ROOM + "engines.py", "+ b\" \" * last", "+ b\"\"", STREAM),
    # --- special tokens stay out of people's text
    (ROOM + "tokenizer.py", "return self._encode_segments(text, self._any if allow_special else self._words)", "return self._encode_segments(text, self._any)", FILES),
    (ROOM + "tokenizer.py", "if name not in self.special)", "if False)", FILES),
    (ROOM + "engines.py", "self._careful.encode_special_tokens = True", "pass", FILES),
    (ROOM + "engines.py", "if self._special.isdisjoint(ids):\n            return ids\n        broken", "return ids\n        broken", HOSTILE),
    (ROOM + "spans.py", "return _map_strings(value, lambda text: self._edges.sub(rf\"{BROKEN}\\g<0>\", text))", "return value", CHAT),
    (ROOM + "spans.py", "{_map_strings(key, change): _map_strings(item, change)", "{key: _map_strings(item, change)", CHAT),
    (ROOM + "spans.py", "_MARKS.sub(\"\", value).replace(PROBE, \"\")", "value", CHAT),
    (ROOM + "spans.py", "return self._special.sub(lambda m: m.group()[0] + BROKEN + m.group()[1:], text)", "return text", CHAT),
    (ROOM + "spans.py", "whole = rendered.broken.isdisjoint(range(*match.span()))", "whole = True", CHAT),
    (ROOM + "spans.py", "key=len, reverse=True", "key=len", FILES),
    # --- templates
    (ROOM + "chat.py", 'environment.add_filter("tojson", tojson)', "pass", CHAT),
    (ROOM + "chat.py", "def tojson(value: Any, ensure_ascii: bool = False", "def tojson(value: Any, ensure_ascii: bool = True", CHAT),
    (ROOM + "chat.py", "sort_keys: bool = False", "sort_keys: bool = True", CHAT),
    (ROOM + "chat.py", "separators=separators", "separators=None", CHAT),
    (ROOM + "chat.py", "trim_blocks=True, lstrip_blocks=True", "trim_blocks=True", CHAT),
    (ROOM + "chat.py", "trim_blocks=True, lstrip_blocks=True", "lstrip_blocks=True", FAMILIES),
    (ROOM + "chat.py", "extensions=[Generation, loopcontrols]", "extensions=[Generation]", CHAT),
    (ROOM + "chat.py", "message = {key: value for key, value in message.items() if value is not None}", "pass", FAMILIES),
    (ROOM + "chat.py", '{"thinking": reasoning, **message, "reasoning_content": reasoning}', "message", CHAT),
    (ROOM + "chat.py", "environment = Sandbox(", "environment = jinja2.Environment(", BOUNDS),
    (ROOM + "chat.py", "        with budget():\n            return", "        if True:\n            return", BOUNDS),
    (ROOM + "tokenizer.py", '{"enable_thinking": thinking, "thinking": thinking}', '{"thinking": thinking}', CHAT),
    (ROOM + "tokenizer.py", 'if tools and "tool_use" in templates:', "if False:", CHAT),
    (ROOM + "tokenizer.py", "mask += [any(a <= start < b for a, b in spans)] * len(new)", "mask += [any(a < start < b for a, b in spans)] * len(new)", CHAT),
    (ROOM + "tokenizer.py", "*self.source.eos_ids]", "]", FILES),
    # --- what stands around a text
    (ROOM + "engines.py", 'data | {"padding": None, "truncation": None, "post_processor": None}', 'data | {"post_processor": None}', OLDER),
    (ROOM + "framing.py", "Part(\"B\", (), 1), end._replace(kind=1)", "Part(\"B\", (), 0), end", BATCHES),
    (ROOM + "framing.py", "(long, short) if len(a) > len(b) else (short, long)", "(long, short) if len(a) >= len(b) else (short, long)", BATCHES),
    (ROOM + "framing.py", "long = max(short, room - short)", "long = room - short", BATCHES),
    (ROOM + "framing.py", "[filler] * (width - len(c)) + [*c] if left else", "[*c] + [filler] * (width - len(c)) if left else", BATCHES),
    (ROOM + "tokenizer.py", "shorten(a, b, length - around, left)", "shorten(a, b, length, left)", BATCHES),
]
