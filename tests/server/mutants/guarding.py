"""What is easily done wrong in what keeps a server alive and its clients apart: keys, limits, statuses, the end."""

from __future__ import annotations

LIMITS, HOSTILE, SEEN, ADAPTED, CLIENT = (f"tests/server/test_{name}.py" for name in ("server_limits", "hostile_clients", "seen_from_outside", "adapters", "openai_client"))
GUARD, ERRORS, JOBS, RUN, RESPONSES, ADAPTERS, REGISTRY, ACCESS = (f"src/pellucid/server/{name}.py" for name in (
    "guard", "errors", "jobs", "run", "responses", "adapters", "registry", "access"))
BODIES, KEYS, TIMES = f"{LIMITS} -k broken_bodies or without_its_length", f"{LIMITS} -k needs_no_key", f"{SEEN} -k tokens_and_time"
ODD, KEPT, END, SALTS = (f"{HOSTILE} -k {name}" for name in ("types_of_body or just_the_size", "kept_responses", "grace or ask_nothing", "no_salt"))

VLLM, DEFAULTS, TEMPLATES = (f"tests/server/test_{name}.py" for name in ("vllm_fields", "defaults", "template_fields"))

MUTANTS = [
    # --- who may ask, and how much
    (GUARD, 'if scheme.lower() != b"bearer" or not any(fits):', "if not any(fits):", KEYS),
    (GUARD, "hmac.compare_digest(given.strip(), key)", "key.startswith(given.strip())", KEYS),
    (GUARD, 'OPEN_PATHS = {"/health", "/ping"}', 'OPEN_PATHS = {"/health", "/ping", "/v1/models"}', KEYS),
    (GUARD, "str(fits.index(True))", '"0"', f"{SEEN} -k keys_share"),
    (GUARD, 'message.get("more_body", False) and size <= self.max_body', 'message.get("more_body", False)', BODIES),
    (GUARD, "        if size > self.max_body:\n", "        if size >= self.max_body:\n", ODD),
    (GUARD, "asyncio.timeout(READING)", "asyncio.timeout(None)", ODD),
    (GUARD, 'if b"origin" in headers:', "if False:", ODD),
    (GUARD, ' or kind.endswith(b"+json")', "", ODD),
    (GUARD, 'if headers.get(b"content-encoding", b"identity").lower() != b"identity":', "if False:", ODD),
    # --- what they hear
    (ERRORS, 'headers={"Retry-After": "1"}', "headers=None", f"{LIMITS} -k too_many"),
    (ERRORS, "Refused(429,", "Refused(503,", f"{LIMITS} -k too_many"),
    (ERRORS, "            return Refused(503, error.what, code=\"shutting_down\"", "            return Refused(500, error.what, code=\"shutting_down\"", END),
    (ERRORS, "return Refused(504,", "return Refused(500,", TIMES),
    (ERRORS, '"backslashreplace"', '"replace"', f"{HOSTILE} -k halves"),
    (ERRORS, "return deepest[0] if", "return errors[0] if", f"{HOSTILE} -k what_is_wrong"),
    (ERRORS, "if not math.isfinite(", "if math.isnan(", BODIES),
    (ERRORS, "parse_constant=finite, ", "", BODIES),
    # --- limits of answers
    (JOBS, "(body.limit() or 0) > most:", "(body.limit() or 0) >= most:", TIMES),
    (JOBS, "min(max(1, min(context, model.engine.longest) - len(ids)), most or context)", "max(1, min(context, model.engine.longest) - len(ids))", TIMES),
    (JOBS, "min(context, model.engine.longest) - len(ids)", "context - len(ids)", DEFAULTS),
    (JOBS, "if name not in read or name in OUR_OWN]", "if name not in read]", TEMPLATES),
    (JOBS, "is False else parser\n", "is None else parser\n", VLLM),
    (JOBS, "if await request.is_disconnected():", "if False:", f"{LIMITS} -k hangs_up or leaves_the_queue"),
    (JOBS, "            await super().__call__(scope, receive, send)\n        finally:\n            self.job.cancel()", "            await super().__call__(scope, receive, send)\n        finally:\n            pass",
     f"{LIMITS} -k leaves_a_stream"),
    (JOBS, "return ascii(parts) if any(parts)", 'return "\\0".join(parts).strip("\\0") if any(parts)', SALTS),
    (JOBS, "            self.others -= 1", "            pass", f"{HOSTILE} -k crowds"),
    (JOBS, "asyncio.timeout(self.limits.seconds)", "asyncio.timeout(None)", f"{HOSTILE} -k vectors_have"),
    (JOBS, "if t >= model.llm.model.spec.vocab]", "if t > model.llm.model.spec.vocab]", f"{CLIENT} -k what_is_refused"),
    # --- connections and the end
    (RUN, ", socket.IPPROTO_TCP)", ")", f"{HOSTILE} -k held_back"),
    (RUN, "            self.transport.close()\n", "            pass\n", END),
    (RUN, "(self.seen is None or self.seen.response_complete)", "True", END),
    (RUN, "loop.call_later(self.grace,", "loop.call_later(self.grace + 100,", END),
    (RUN, "        server.should_exit = True\n        thread.join(GRACE + 5)", "        server.force_exit = server.should_exit = True\n        thread.join(GRACE + 5)", f"{LIMITS} -k lets_the_running"),
    # --- what is kept, and for whom
    (RESPONSES, "len(self.kept) > KEPT or", "False or", KEPT),
    (RESPONSES, "size = len(as_json(body)) + sum", "size = sum", KEPT),
    (RESPONSES, "if found is None or found.tenant != tenant:", "if found is None:", KEPT),
    (RESPONSES, "        self.find(response_id, tenant)\n", "", KEPT),
    # --- adapters, records
    (ADAPTERS, "found.is_relative_to(root.resolve()) and found.is_dir()", "found.is_dir()", f"{ADAPTED} -k loading_and"),
    (REGISTRY, "        if name in self.models:\n", "        if False:\n", f"{ADAPTED} -k loading_and"),
    (REGISTRY, 'f"{name}#{next(self._versions)}"', "name", f"{ADAPTED} -k loading_and"),
    (REGISTRY, " or model.adapter is None:", ":", f"{ADAPTED} -k loading_and"),
    (REGISTRY, "raise Refused(404,", "raise Refused(400,", f"{CLIENT} -k what_is_refused"),
    (ACCESS, "0 < len(given) <= 128", "0 < len(given) <= 1000", f"{SEEN} -k request_ids"),
]
