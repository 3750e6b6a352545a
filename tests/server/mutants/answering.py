"""What is easily done wrong in an answer: its parts, their deltas, what is counted, where it stops."""

from __future__ import annotations

CLIENT, MORE, PARSER, FORMATS, STREAMED, SEEN, HOSTILE = (f"tests/server/test_{name}.py" for name in (
    "openai_client", "more_openai", "answer_parser", "call_formats", "streamed_calls", "seen_from_outside", "hostile_clients"))
ANSWERS, READER, PARSE, TAPE, RESPONSES, VECTORS, METRICS, ABOUT, PROTOCOL, CONVERSATION, JSON_CALLS, TEXT_CALLS = (f"src/pellucid/server/{name}.py" for name in (
    "answers", "reader", "parser", "tape", "responses", "vectors", "metrics", "about", "protocol", "conversation", "json_calls", "text_calls"))
WHOLE, PIECES, CASES = f"{CLIENT} -k chat_is_what or thought_answer or requests_run", f"{MORE} -k streams_of_several", f"{FORMATS} -k a_reader_would or cut_at_every"
VLLM, DEFAULTS, TEMPLATES = (f"tests/server/test_{name}.py" for name in ("vllm_fields", "defaults", "template_fields"))
BROKEN = "tests/server/test_broken_samples.py"

MUTANTS = [
    # --- what is counted
    (ANSWERS, '"total_tokens": prompt + completion,\n            "prompt_tokens_details"', '"total_tokens": prompt,\n            "prompt_tokens_details"', WHOLE),
    (ANSWERS, '{"cached_tokens": job.cached_tokens}', '{"cached_tokens": 0}', WHOLE),
    (ANSWERS, '{"reasoning_tokens": thought}', '{"reasoning_tokens": 0}', WHOLE),
    (ANSWERS, 'if options.continuous_usage_stats else None, ".chunk")', 'if options.include_usage else None, ".chunk")', f"{HOSTILE} -k usage_with"),
    (ANSWERS, "return logprob if math.isfinite(logprob) else -9999.0", "return logprob", f"{HOSTILE} -k impossible"),
    # --- how it ends, and in which pieces
    (ANSWERS, 'if calls and reason == "stop"', "if calls", f"{CLIENT} -k cut_off_behind"),
    (ANSWERS, 'return {"index": self.begun - 1, "function"', 'return {"index": 0, "function"', STREAMED),
    (ANSWERS, "            logprobs = tokens = None  # told once\n", "            tokens = None\n", PIECES),
    (ANSWERS, "            logprobs = tokens = None  # told once\n", "            logprobs = None\n", VLLM),
    (ANSWERS, 'if len(found["tokens"]) > silent else 0', "", DEFAULTS),
    (READER, "self.tokens[given:]", "self.tokens[given + 1 :]", VLLM),
    (READER, "token if token in self.asked_ends else None", "token", VLLM),
    (READER, "or self._open == (piece.part != \"lost\")", "or self._open", VLLM),
    (PROTOCOL, "most = min(room, self.usual_limit(defaults) or room)", "most = room", DEFAULTS),
    (PROTOCOL, "for v in (getattr(self, name), getattr(defaults, name))", "for v in (getattr(defaults, name), getattr(self, name))", DEFAULTS),
    ("src/pellucid/engine/past_calls.py", "PROBE in asked(tokenizer, PROBE, tools)", "True", TEMPLATES),
    ("src/pellucid/engine/past_calls.py", "or not asked(tokenizer, json.loads(PROBE), tools)", "", TEMPLATES),
    ("src/pellucid/engine/llm.py", "self.tokenizer.encode(prompt) if behind else", "self.prompt_ids(prompt) if behind else", DEFAULTS),
    (ANSWERS, 'offsets[number] += sum(map(len, logprobs["tokens"]))', "offsets[number] += 0", PIECES),
    (ANSWERS, "offsets[number] = len(echo[number // drawn])", "offsets[number] = 0", PIECES),
    (ANSWERS, "key=lambda i: best_first(job.choices[i].request)", "key=lambda i: i", f"{MORE} -k best_of_several"),
    (ANSWERS, "if lost == len(job.choices):", "if lost:", BROKEN),
    (ANSWERS, 'return told | failure(job, number).body if reason == "error" else told', "return told", BROKEN),
    ("src/pellucid/engine/job.py", 'return request.finish_reason == "error", -per_token(request)', "return False, -per_token(request)", BROKEN),
    (ANSWERS, 'joined(pieces, "content") or (None if calls else "")', 'joined(pieces, "content")', f"{CLIENT} -k tool_call_and"),
    (READER, "range(self._told, self.said)", "range(0, self.said)", PIECES),
    (READER, 'if last == "stop" and token in self.ends:', "if False:", f"{MORE} -k bias_penalties"),
    (READER, "self.parser.deaf = self.said < self.least", "self.parser.deaf = False", f"{MORE} -k bias_penalties"),
    (READER, "            if self.parser.stopped:\n                self.finish_reason", "            if self.parser.stopped and not last:\n                self.finish_reason", f"{HOSTILE} -k cut_off_ends"),
    # --- parts of the text
    (PARSE, "else len(text) - unfinished(text, self.stops)", "else len(text)", PARSER),
    (PARSE, 'self._trim, self._gap = rest, "content", found[-1].kind == "tool_call", ""', 'self._trim, self._gap = rest, "content", False, ""', PARSER),
    (PARSE, "if think.startswith(text[: len(think)]) and len(text) < len(think):", "if False:", PARSER),
    (PARSE, "end = at if at >= 0 else len(self._text) - (unfinished(self._text, tags) if tags else 0)", "end = at if at >= 0 else len(self._text)", PARSER),
    (PARSE, 'channel[:1] == ["analysis"]', 'channel[:1] == ["final"]', CASES),
    (PARSE, "while at >= 0 and not self.form.whole(self._text[:at]):", "while False:", CASES),
    (PARSE, "        self._bare = \"\"  # only at the beginning\n", "", CASES),
    (TAPE, "if len(open_) > DEEPEST:", "if len(open_) >= DEEPEST:", f"{FORMATS} -k certain_depth"),
    (TAPE, "cut = found.end() == self.limit and not self.ended", "cut = False", FORMATS),
    (JSON_CALLS, "if key in seen or (key in keys and seen & set(keys))", "if (key in keys and seen & set(keys))", f"{FORMATS} {PARSER}"),
    (JSON_CALLS, '{"name", "arguments"}, "{}")', 'None, "{}")', f"{FORMATS} {PARSER}"),
    (TEXT_CALLS, 'text = text.removeprefix("\\n")', "pass", CASES),
    (TEXT_CALLS, 'self._held = "\\n" if self.trim and text.endswith("\\n") else ""', 'self._held = ""', CASES),
    # --- other endpoints
    (RESPONSES, "        number += 1\n", "", f"{MORE} -k a_response_and"),
    (RESPONSES, 'return self.body("incomplete" if cut else "completed"', 'return self.body("completed"', f"{MORE} -k and_cut_ones"),
    (RESPONSES, "self._calls[-1] if piece.part == \"more\" else self._calls.pop(0)", "self._calls[-1]", STREAMED),
    (VECTORS, "F.normalize(vectors[:, : body.dimensions], dim=-1)", "vectors[:, : body.dimensions]", f"{MORE} -k embeddings"),
    (VECTORS, "(-scores[i], i)", "(scores[i], i)", f"{MORE} -k rerank"),
    (VECTORS, 'astype("<f4")', 'astype(">f4")', f"{MORE} -k embeddings"),
    (METRICS, "1 - e.engine.cache.available() / e.engine.cache.blocks", "e.engine.cache.available() / e.engine.cache.blocks", f"{SEEN} -k test_metrics"),
    (METRICS, ".replace('\"', '\\\\\"')", "", f"{SEEN} -k escaped"),
    (ABOUT, "if (body.prompt is None) == (body.messages is None):", "if body.prompt is None and body.messages is None:", f"{MORE} -k tokens_and_back"),
    (ABOUT, "if not 0 <= i < model.vocab]", "if not 0 <= i <= model.vocab]", f"{MORE} -k tokens_and_back"),
    (PROTOCOL, "return schema if parallel else", "return schema if True else", f"{MORE} -k calls_that_must"),
    (CONVERSATION, 'role = "system" if self.role == "developer" else self.role', "role = self.role", f"{CLIENT} -k developers_role"),
]
