"""The formats against trl's own utilities, on samples of every one of them."""

import copy
import json

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_formats import CALL, REPLY, SAMPLES, TOOL, A, B, Q
from transformers import AutoTokenizer
from trl.data_utils import (
    extract_prompt,
    is_conversational,
    is_conversational_from_value,
    maybe_apply_chat_template,
    maybe_convert_to_chatml,
    maybe_extract_prompt,
    unpair_preference_dataset,
)

from pellucid.data.formats import PreferenceRecord, recognise, record_of, split_prompt, unpair
from pellucid.data.formats_text import templated
from pellucid.tokenizers import Tokenizer, patterns, train_bpe

SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Our tokenizer and transformers' of the same folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["user\nassistant\nuser\nassistant\n 2+2? 4 5"] * 4, 272, patterns.QWEN_PATTERN).save(folder)
    return Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", [n for n in SAMPLES if "sharegpt" not in n])
def test_is_conversational(name):
    row = SAMPLES[name][0]
    if name == "pair-text-prompt":  # trl looks at any one of the columns, here of two kinds
        row = {"chosen": row["chosen"]}
    # A stepwise row has no column that trl's function looks at but its prompt.
    assert recognise(SAMPLES[name][0]).conversational == is_conversational(row)


@pytest.mark.parametrize("name", ["sharegpt", "sharegpt-roles", "messages"])
def test_sharegpt_is_seen_and_converted(name):
    row = copy.deepcopy(SAMPLES[name][0])
    for message in row.get("conversations", []):
        if "from" in message:  # trl keeps the speaker's name as the role, and human and gpt are roles of no template
            message["from"] = {"human": "user", "gpt": "assistant"}[message["from"]]
    assert is_conversational_from_value(row) == (name == "sharegpt")
    assert ("ShareGPT" in recognise(row).why) == ("conversations" in row)
    record = record_of(row, recognise(row))
    assert maybe_convert_to_chatml(copy.deepcopy(row))["messages"] == record.messages == SAMPLES[name][4].messages


@pytest.mark.parametrize("name", [n for n in SAMPLES if n.startswith("pair")])
def test_extract_prompt(name):
    row = SAMPLES[name][0]
    theirs, ours = maybe_extract_prompt(copy.deepcopy(row)), record_of(row, recognise(row))
    assert (ours.prompt, ours.chosen, ours.rejected) == (theirs["prompt"], theirs["chosen"], theirs["rejected"])


@settings(max_examples=300, deadline=None)
@given(st.text("ab ", min_size=1, max_size=6), st.text("ab ", min_size=1, max_size=6), st.text("ab ", max_size=6))
def test_extract_prompt_of_any_two_texts(one, other, prompt):
    chosen, rejected = prompt + one, prompt + other
    if chosen == rejected or (chosen[0] != rejected[0] and chosen[-1] == " "):  # trl then looks at the wrong end
        return
    theirs = extract_prompt({"chosen": chosen, "rejected": rejected})
    assert split_prompt(chosen, rejected) == (theirs["prompt"], theirs["chosen"], theirs["rejected"])


@pytest.mark.parametrize("implicit", [False, True])
def test_unpair(implicit):
    rows = [{"prompt": f"{i}?", "chosen": f"{i}", "rejected": f"-{i + 1}", "margin": i} for i in range(5)]
    theirs = list(unpair_preference_dataset(datasets.Dataset.from_list(rows)))
    ours = [u for row in rows for u in unpair(record_of(row, recognise(row)))]
    plain = [{"prompt": u.prompt, "completion": u.completion, "label": u.label, **u.extra} for u in ours]
    order = lambda row: (not row["label"], row["margin"])    # trl: first all the good ones of a batch
    assert sorted(plain, key=order) == sorted(theirs, key=order) and len(plain) == 10


CONVERSATIONS = {
    "messages": {"messages": [SYSTEM, Q, A, Q, B]},
    "prompt": {"prompt": [SYSTEM, Q]},
    "prompt with an answer begun": {"prompt": [Q, {"role": "assistant", "content": "I say "}]},
    "prompt after a tool": {"prompt": [Q, CALL, REPLY]},
    "completion": {"prompt": [Q], "completion": [A]},
    "completion with tools": {"prompt": [Q], "completion": [CALL, REPLY, A]},
    "completion that thinks": {"prompt": [Q], "completion": [{"role": "assistant", "content": "<think>\n2\n</think>\n\n4"}]},
    "pair": {"prompt": [SYSTEM, Q], "chosen": [A], "rejected": [B]},
    "pair of dialogues": {"prompt": [Q, A, Q], "chosen": [B], "rejected": [CALL, REPLY, A]},
    "unpaired": {"prompt": [Q], "completion": [B], "label": False},
    "plain prompt": {"prompt": "2+2?"},
    "plain pair": {"prompt": "2+2?", "chosen": " 4", "rejected": " 5"},
    "plain unpaired": {"prompt": "2+2?", "completion": " 4", "label": True},
    "plain text": {"text": "2+2=4"},
}


@pytest.mark.parametrize("tools", [None, [TOOL]])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_chat_template(both, name, tools):
    ours, theirs = both
    row = CONVERSATIONS[name]
    record = record_of(row | ({"tools": tools} if tools else {}), recognise(row))
    assert templated(record, ours) == maybe_apply_chat_template(copy.deepcopy(row), theirs, tools)


def test_chat_template_of_an_implicit_pair(both):
    ours, theirs = both
    row = {"chosen": [Q, A], "rejected": [Q, B]}
    assert templated(record_of(row, recognise(row)), ours) == maybe_apply_chat_template(maybe_extract_prompt(copy.deepcopy(row)), theirs)


def test_a_template_that_writes_the_prompt_otherwise_when_it_is_answered(both, tmp_path):
    both[0].save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}")
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    thinks = {"role": "assistant", "content": "<think>\n2\n</think>\n\n4"}
    for row in ({"prompt": [Q], "chosen": [thinks], "rejected": [B]}, {"prompt": [Q], "chosen": [B], "rejected": [thinks]},
                {"prompt": [Q], "completion": [thinks]}, {"prompt": [Q], "completion": [B]}, {"prompt": [Q]}):
        assert templated(record_of(row, recognise(row)), ours) == maybe_apply_chat_template(copy.deepcopy(row), theirs)


def test_jsonl_of_datasets_and_its_types(tmp_path):
    """What `datasets` writes, with its own typing of columns, reads back as the same records."""
    from pellucid.data.formats_files import open_data

    rows = [SAMPLES["pair-chat"][0] | {"score": float(i)} for i in range(3)]
    datasets.Dataset.from_list(rows).to_json(tmp_path / "a.jsonl")
    assert json.loads((tmp_path / "a.jsonl").read_text().split("\n")[0])["score"] == 0
    assert list(open_data(tmp_path / "a.jsonl")) == [PreferenceRecord([Q], [A], [B], extra={"score": float(i)}) for i in range(3)]
