"""Other engines for `serve.py`: this file runs in THEIR environment, with numpy and without pellucid or torch.

One JSON line when ready, then for each line of work that comes in, one line with what was found. llama.cpp (through xllamacpp) and
OpenVINO GenAI read a GGUF file that is written here from the checkpoint: weights as they are for F16 (bfloat16 weights fit), rounded
by the gguf package for Q8_0 and Q4_0, the tied head with them; the vocabulary is made of placeholders, since prompts are ids.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from ctypes.util import find_library
from pathlib import Path
from typing import Any

DECODE, PREFILL, REQUESTS, TOKENS = 32, 512, 16, 128
Works = dict[str, Callable[[], Any]]
_fresh = random.Random(0)


def prompts_of(vocab: int, count: int, length: int, seed: int | None = None) -> list[list[int]]:
    """New ones at each call, or always the same of a seed. The first and last ids may have a meaning of their own."""
    chance = _fresh if seed is None else random.Random(seed)
    return [[chance.randrange(300, vocab - 300) for _ in range(length)] for _ in range(count)]


def answer_turns(prepare: Callable[[], tuple[dict[str, Any], Works]]) -> int:
    """A contestant's side."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(fields: dict[str, Any]) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    ready, works = prepare()
    answer(ready)
    for line in sys.stdin:
        answer({"found": works[line.strip()]()})
    return 0


def works_of(vocab: int, generate: Callable[[list[list[int]], int], None]) -> Works:
    """The three measures of `generate(prompts, new tokens)`."""

    def seconds(count: int, length: int, new: int) -> float:
        prompts = prompts_of(vocab, count, length)
        start = time.perf_counter()
        generate(prompts, new)
        return time.perf_counter() - start

    seconds(2, 16, 4)
    return {"decode": lambda: DECODE / (seconds(1, 32, DECODE + 4) - seconds(1, 32, 4)), "prefill": lambda: PREFILL / seconds(1, PREFILL, 1),
            "batch": lambda: REQUESTS * TOKENS / seconds(REQUESTS, TOKENS, TOKENS)}


# --- GGUF ------------------------------------------------------------------------------------------------------------------

NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def bits_of(folder: Path) -> Iterator[tuple[str, Any]]:
    """(name, array of bfloat16 as uint16) of a safetensors file, where it lies."""
    import numpy as np

    for path in sorted(folder.glob("*.safetensors")):
        data = np.memmap(path, mode="r")
        size = int.from_bytes(data[:8].tobytes(), "little")
        for name, about in json.loads(data[8 : 8 + size].tobytes()).items():
            if name != "__metadata__":
                start, stop = about["data_offsets"]
                assert about["dtype"] == "BF16", about
                yield name, data[8 + size + start : 8 + size + stop].view(np.uint16).reshape(about["shape"])


def tensors_of(folder: Path) -> Iterator[tuple[str, Any]]:
    """(name, float32 array)"""
    import numpy as np

    for name, bits in bits_of(folder):
        yield name, (bits.astype(np.uint32) << 16).view(np.float32)


def gguf_name(name: str) -> str:
    if not name.startswith("model.layers."):
        return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
    number, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{NAMES[rest.removesuffix('.weight')]}.weight"


def write_gguf(folder: Path, weights: str, out: Path) -> None:
    """The checkpoint as a GGUF file."""
    import gguf
    import numpy as np

    c = json.loads((folder / "config.json").read_text())
    w = gguf.GGUFWriter(str(out), "qwen3")
    w.add_block_count(c["num_hidden_layers"])
    w.add_context_length(c["max_position_embeddings"])
    w.add_embedding_length(c["hidden_size"])
    w.add_feed_forward_length(c["intermediate_size"])
    w.add_head_count(c["num_attention_heads"])
    w.add_head_count_kv(c["num_key_value_heads"])
    w.add_key_length(c["head_dim"])
    w.add_value_length(c["head_dim"])
    w.add_rope_freq_base(c["rope_parameters"]["rope_theta"])
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    kind = {"F16": gguf.GGMLQuantizationType.F16, "Q8_0": gguf.GGMLQuantizationType.Q8_0, "Q4_0": gguf.GGMLQuantizationType.Q4_0}[weights]
    w.add_file_type({"F16": gguf.LlamaFileType.MOSTLY_F16, "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0, "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0}[weights])
    vocab = c["vocab_size"]
    byte_texts = [chr(i + 256 if i < 33 or 127 <= i < 161 or i == 173 else i) for i in range(256)]
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("qwen2")
    w.add_token_list([*byte_texts, *(f"t{i}" for i in range(256, vocab))])
    w.add_token_types([1] * (vocab - 1) + [3])
    w.add_token_merges(["t 1"])
    w.add_eos_token_id(vocab - 1)
    w.add_bos_token_id(vocab - 1)
    w.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    for name, array in tensors_of(folder):
        if array.ndim == 2:
            w.add_tensor(gguf_name(name), gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            w.add_tensor(gguf_name(name), array.astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


STORED = {"F16": 2, "Q8_0": 34 / 32, "Q4_0": 18 / 32}
"""Bytes of a number of a matrix, with its share of the scales."""


def with_gguf(what: dict[str, Any]) -> tuple[Path, int, int]:
    """(file, bytes of its tensors, vocabulary). A file that another peer, or a run before (`--keep`), has written is taken."""
    folder = Path(what["folder"])
    out = folder.parent / f"{what['weights']}.gguf"
    if not out.exists():
        half = out.with_suffix(".part")
        write_gguf(folder, what["weights"], half)
        half.rename(out)
    size = sum(int(a.size * (STORED[what["weights"]] if a.ndim == 2 else 4)) for _, a in bits_of(folder))
    return out, size, json.loads((folder / "config.json").read_text())["vocab_size"]


# --- the engines -----------------------------------------------------------------------------------------------------------


def openvino(what: dict[str, Any]) -> tuple[dict[str, Any], Works]:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    file, size, vocab = with_gguf(what)
    start = time.perf_counter()
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_batched_tokens, scheduler.enable_prefix_caching = 1, 512, False
    scheduler.dynamic_split_fuse = True
    pipe = genai.LLMPipeline(str(file), "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=what["threads"])
    loaded = time.perf_counter() - start

    def generate(prompts: list[list[int]], new: int) -> None:
        config = genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False, apply_chat_template=False)
        ids = np.array(prompts, dtype=np.int64)
        made = pipe.generate(genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids))), config)
        assert [len(t) for t in made.tokens] == [new] * len(prompts), [len(t) for t in made.tokens]

    return {"bytes": size, "load_seconds": loaded, "version": genai.__version__}, works_of(vocab, generate)


def llama_cpp(what: dict[str, Any]) -> tuple[dict[str, Any], Works]:
    from concurrent.futures import ThreadPoolExecutor
    from importlib.metadata import version

    import xllamacpp as xlc

    file, size, vocab = with_gguf(what)
    start = time.perf_counter()
    params = xlc.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.n_batch, params.n_ubatch = REQUESTS * 576, REQUESTS, 512, 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = what["threads"]
    server = xlc.Server(params)
    loaded = time.perf_counter() - start
    pool = ThreadPoolExecutor(REQUESTS)

    def one(prompt: list[int], new: int) -> int:
        told = server.handle_completions({"prompt": prompt, "n_predict": new, "max_tokens": new, "temperature": 0.0, "ignore_eos": True,
                                          "cache_prompt": False})
        told = json.loads(told) if isinstance(told, str) else told
        return int(told["usage"]["completion_tokens"])

    def generate(prompts: list[list[int]], new: int) -> None:
        made = list(pool.map(lambda p: one(p, new), prompts))
        assert made == [new] * len(prompts), made

    return {"bytes": size, "load_seconds": loaded, "version": version("xllamacpp")}, works_of(vocab, generate)


def load_first(threads: int) -> None:
    """What vLLM's documentation wants in place before Python begins: Intel's OpenMP, which its package brings, and tcmalloc, if the system
    or the environment has it. In one process, as here, vLLM leaves it to others to give the threads their cores."""
    if "KMP_AFFINITY" not in os.environ:
        lib = Path(sys.prefix) / "lib"
        tcmalloc = find_library("tcmalloc_minimal") or next(lib.glob("libtcmalloc_minimal.so.*"), None)
        os.environ |= {"LD_PRELOAD": ":".join(str(path) for path in (tcmalloc, *lib.glob("libiomp5.so")) if path),
                       "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[0-{threads - 1}]", "KMP_BLOCKTIME": "5"}
        os.execv(sys.executable, [sys.executable, *sys.argv])


def vllm(what: dict[str, Any]) -> tuple[dict[str, Any], Works]:
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
                   "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    import vllm as engine

    start = time.perf_counter()
    llm = engine.LLM(what["folder"], skip_tokenizer_init=True, dtype="bfloat16", max_model_len=1024, max_num_seqs=REQUESTS,
                     enable_prefix_caching=False)
    loaded = time.perf_counter() - start
    vocab = json.loads((Path(what["folder"]) / "config.json").read_text())["vocab_size"]

    def generate(prompts: list[list[int]], new: int) -> None:
        params = engine.SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        made = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        assert [len(m.outputs[0].token_ids) for m in made] == [new] * len(prompts)

    size = sum(a.nbytes for _, a in bits_of(Path(what["folder"])))
    preloaded = [Path(path).name for path in os.environ.get("LD_PRELOAD", "").split(":") if path]
    return {"bytes": size, "load_seconds": loaded, "version": engine.__version__, "preloaded": preloaded}, works_of(vocab, generate)


if __name__ == "__main__":
    told = json.loads(sys.argv[sys.argv.index("--contestant") + 1])
    if told["peer"] == "vllm":
        load_first(told["threads"])
    raise SystemExit(answer_turns(lambda: {"openvino": openvino, "llama.cpp": llama_cpp, "vllm": vllm}[told["peer"]](told)))
