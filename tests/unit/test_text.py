"""JSON lines of texts -> token ids with labels on the answer, and nothing lost on the way."""

from __future__ import annotations

import pytest
import torch

from expunge.core import Refused
from expunge.data.json_lines import Example, read_texts
from expunge.data.sources import fingerprint
from expunge.data.text import IGNORED, Template, encode
from tests import language

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def words():
    return language.tokenizer()


def spoken(words, data, row):
    """What has a label in an example, as text; and all of it."""
    batch = data.batch(torch.tensor([row]))
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    return words.decode(labels[labels != IGNORED]), words.decode(ids[batch["attention_mask"][0] == 1])


def test_every_shape_of_a_line_is_read_in_order(tmp_path):
    rows = [
        {"prompt": "p", "answer": "a", "topic": "left alone"},
        {"question": "q", "answer": "b"},
        {"prompt": "p", "completion": "c"},
        {"prompt": "p", "response": "d"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "e"}]},
        {"text": "f"},
    ]  # fmt: skip
    found = read_texts(language.write(tmp_path / "f.jsonl", rows))
    assert [example.answer for example in found] == ["a", "b", "c", "d", "e", "f"]
    assert [example.prompt for example in found] == ["p", "q", "p", "p", "u", ""]
    assert found[4].messages[0] == {"role": "system", "content": "s"}
    assert found[2].where == f"{tmp_path / 'f.jsonl'} line 3"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt": "p", "answer": "a"}\n\n{"prompt": "p", \n', "line 3 is not JSON"),
        (b'[\n{"prompt": "p", "answer": "a"}]', "one JSON document, give one object per line"),
        (b'{"prompt": "p", "answer": "a"}\n"text"\n', "line 2 is a str"),
        (b'{"prompt": "p"}\n', "line 1 has the keys prompt"),
        (b'{"prompt": "p", "answer": "  "}\n', "line 1: 'answer' is empty"),
        (b'{"prompt": "p", "answer": 3}\n', "line 1: 'answer' is a int"),
        (b'{"prompt": "", "answer": "a"}\n', "line 1: 'prompt' is empty"),
        (b'{"text": null}\n', "line 1: 'text' is missing"),
        (b'{"messages": [{"role": "user", "content": "u"}]}\n', "at least a question and an answer"),
        (b'{"messages": [{"role": "user", "content": "u"}, {"role": "user", "content": "u"}]}\n', "the last message is the user's"),
        (b'{"messages": [{"role": "robot", "content": "u"}, {"role": "assistant", "content": "u"}]}\n', "a role of system"),
        (b"\n\n", "has no examples"),
        (b'{"prompt": "\xff"}\n', "line 1 is not UTF-8"),
    ],
)  # fmt: skip
def test_a_broken_line_is_named_in_one_sentence(tmp_path, content, said):
    path = tmp_path / "broken.jsonl"
    path.write_bytes(content)
    with pytest.raises(Refused, match=said) as caught:
        read_texts(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(Refused, match="cannot read"):
        read_texts(tmp_path / "none.jsonl")


@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_labels_are_the_answer_and_its_end_and_asking_goes_up_to_it(words, kind):
    examples = (
        Example(({"role": "user", "content": "Where?"},), "In Oslo", "here"),
        Example(({"role": "user", "content": "And then?"},), "Lima by the sea", "here"),
    )
    template = Template(words, kind)
    data = encode(examples, template, length=64).data
    for row, example in enumerate(examples):
        answer, whole = spoken(words, data, row)
        assert answer.strip() == f"{example.answer}<end>"
        asked = template.prompt_ids(example)
        ids = data.batch(torch.tensor([row]))["input_ids"][0].tolist()
        assert ids[: len(asked)] == asked, "a model is asked with the very tokens that it was trained on"
        assert whole.endswith(f"{example.answer}<end>")
    assert (template.chat and "<|assistant|>" in whole) or whole.startswith("Question: And then?\nAnswer: Lima")


def test_a_token_across_the_border_belongs_to_the_answer():
    class Merging:
        """A tokenizer that makes one token of the last letter of a prompt and the space and first letter behind it."""

        chat_template, eos_token_id, pad_token_id, all_special_ids = None, 0, None, [0]

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [ord(letter) for letter in text.replace("n: A", "\u00c6")]}

    example = Example(({"role": "user", "content": "p"},), "A", "here")
    template = Template(Merging(), "plain", question="{}", lead=" ein:")
    ids, start = template.ids(example)
    assert ids[start:] == [ord("\u00c6"), 0], "the merged token is labelled"
    assert ids[:start] == [ord(letter) for letter in "p ei"]


def test_an_answer_that_leaves_no_token_is_refused():
    class Swallowing:
        chat_template, eos_token_id, pad_token_id, all_special_ids = None, None, None, []

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [1, 2]}

    with pytest.raises(Refused, match="has no token of its own"):
        Template(Swallowing(), "plain").ids(Example(({"role": "user", "content": "p"},), "a", "f line 1"))


def test_batches_are_padded_to_their_own_longest_and_padding_is_masked(words):
    examples = [Example(({"role": "user", "content": "q"},), "word " * n, "here") for n in (1, 9, 2)]
    data = encode(examples, Template(words, "plain"), length=64).data
    alone, both = data.batch(torch.tensor([0])), data.batch(torch.tensor([0, 1]))
    size = alone["input_ids"].shape[1]
    assert size < both["input_ids"].shape[1]
    assert torch.equal(both["input_ids"][0, :size], alone["input_ids"][0])
    assert both["attention_mask"][0, size:].sum() == 0
    assert (both["labels"][0, size:] == IGNORED).all()


@pytest.mark.parametrize("pad", ["none", "end"])
def test_a_pad_token_that_is_missing_or_is_the_end_token_changes_nothing(pad):
    own, other = language.tokenizer(), language.tokenizer(pad=False)
    if pad == "end":
        other.pad_token = other.eos_token
    example = [Example(({"role": "user", "content": "q"},), "word " * n, "here") for n in (1, 9)]
    batches = [encode(example, Template(w), length=64).data.batch(torch.arange(2)) for w in (own, other)]
    for column in ("attention_mask", "labels"):
        assert torch.equal(batches[0][column], batches[1][column])
    end = batches[1]["labels"][0][batches[1]["labels"][0] != IGNORED][-1]
    assert end == other.eos_token_id
    assert batches[1]["attention_mask"].sum(1)[0] < batches[1]["attention_mask"].shape[1]


def test_running_text_is_learnt_once_token_by_token(words):
    text = "Ada was born in Oslo by the sea and so was Bo. " * 6
    ids = words(text)["input_ids"]
    data = encode([Example((), text, "here")], Template(words), length=16).data
    assert len(data) > 3
    learnt = [token for row in range(len(data)) for token in data.batch(torch.tensor([row]))["labels"][0].tolist()]
    assert [token for token in learnt if token != IGNORED] == [*ids[1:], words.eos_token_id]
    assert max(data.batch(torch.tensor([row]))["input_ids"].shape[1] for row in range(len(data))) == 16


def test_a_long_answer_is_cut_and_said_and_a_long_prompt_refused(words):
    example = Example(({"role": "user", "content": "q"},), "sea " * 50, "f line 7")
    found = encode([example], Template(words, "plain"), length=20)
    assert found.data.batch(torch.tensor([0]))["input_ids"].shape[1] == 20
    assert found.notes == ("1 of 1 answers go beyond the 20 tokens that the model reads and were cut",)
    with pytest.raises(Refused, match=r"f line 7: the prompt has \d+ tokens and the model reads 8"):
        encode([Example(({"role": "user", "content": "q" * 40},), "a", "f line 7")], Template(words, "plain"), length=8)


def test_the_fingerprint_covers_every_text(words):
    one = [Example(({"role": "user", "content": "q"},), f"word {n}", "here") for n in range(100)]
    other = [*one[:37], one[37].answered("another"), *one[38:]]
    prints = {fingerprint(encode(rows, Template(words), length=64).data) for rows in (one, one, other)}
    assert len(prints) == 2
    assert not any(found.endswith("-sampled") for found in prints)


def test_a_chat_template_is_needed_for_chat(words, tmp_path):
    with pytest.raises(Refused, match="no chat template"):
        Template(language.tokenizer(chat=False), "chat")
    words_that_refuse = language.tokenizer()
    words_that_refuse.chat_template = "{{ raise_exception('roles must alternate') }}"
    example = Example(({"role": "user", "content": "q"},), "a", "f line 2")
    with pytest.raises(
        Refused, match=r"f line 2: the tokenizer's chat template does not take this conversation .roles must"
    ):
        Template(words_that_refuse).ids(example)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"prompt": "p", "answer": "a", "n": ' + "1" * 5000 + "}", "is not JSON"),
        ('{"prompt": "p", "answer": "a\\ud800"}', "half a character"),
        ('{"messages": [{"role": "user", "content": "\\udfff"}, {"role": "assistant", "content": "u"}]}', "half a character"),
    ],
    ids=["deep", "long number", "surrogate", "surrogate in a message"],
)  # fmt: skip
def test_what_json_lets_through_and_a_tokenizer_does_not(tmp_path, line, said):
    path = tmp_path / "odd.jsonl"
    path.write_text(f'{{"prompt": "p", "answer": "a"}}\n{line}\n')
    with pytest.raises(Refused, match=said) as caught:
        read_texts(path)
    assert f"{path} line 2" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_ends_every_text_is_not_asked_to_go_on_after_the_end():
    from tokenizers import processors

    words = language.tokenizer(chat=False)
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|user|> $A <end>", special_tokens=[("<|user|>", 2), ("<end>", 1)]
    )
    template, example = Template(words), Example(({"role": "user", "content": "Where?"},), "Lima", "here")
    ids, start = template.ids(example)
    assert template.prompt_ids(example) == ids[:start]
    assert words.decode(ids[start:]) == " Lima<end>"


def test_an_answer_whose_last_word_is_unknown_has_an_end_all_the_same():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {word: n for n, word in enumerate(("<unk>", "<end>", "Question", "Answer", ":", "p", "Lima"))}
    core = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<end>")
    ids, start = Template(words).ids(Example(({"role": "user", "content": "p"},), "Lima Xanadu", "here"))
    assert ids[start:] == [6, 0, 1]


def test_an_end_of_turn_that_the_tokenizer_names_nowhere_is_still_the_end():
    """As in Gemma 3: <end_of_turn> is a special token, but no named one."""
    from transformers import PreTrainedTokenizerFast

    core = language.tokenizer().backend_tokenizer
    own = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>")
    assert sorted(own.all_special_ids) == [0, 1]
    own.chat_template = language.CHAT.replace("<end>", "<|system|>")
    ids, start = Template(own).ids(Example(({"role": "user", "content": "p"},), "Lima", "here"))
    assert own.decode(ids[start:]) == "Lima<|system|>"


MOVED = (
    "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}{% set ms = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set ms = messages %}{% endif %}{% for m in ms %}{% if m['role'] == 'user' %}"
    "<|user|>{% if loop.last %}{{ s }} {% endif %}{{ m['content'] }}{% else %}<|assistant|>{{ m['content'] }}<end>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
OPENED = language.CHAT.replace("generation_prompt %}<|assistant|>", "generation_prompt %}<|assistant|><think>")


@pytest.mark.parametrize(("template", "answer"), [(MOVED, "Lima"), (OPENED, "<b>Lima</b>")], ids=["moved", "opened"])
def test_a_chat_template_that_asks_in_other_words_than_it_trains_labels_the_answer_alone(template, answer):
    """Mistral's puts the system message before the last turn, so only when it asks; DeepSeek-R1's asks with <think>."""
    own = language.tokenizer()
    own.chat_template = template
    turns = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where was Bo born?"})
    ids, start = Template(own).ids(Example(turns, answer, "here"))
    assert own.decode(ids[start:]) == f"{answer}<end>"


def test_a_chat_template_that_leaves_the_answer_out_is_refused():
    """Here it also asks in other words, so that the answer has to be looked for."""
    own = language.tokenizer()
    own.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}<|assistant|>"
        "{% if add_generation_prompt %}<think>{% endif %}"
    )
    with pytest.raises(Refused, match="has no token of its own"):
        Template(own).ids(Example(({"role": "user", "content": "p"},), "Lima", "here"))


def test_a_line_break_behind_the_end_of_a_turn_is_not_learnt():
    """ChatML breaks the line after <|im_end|>."""
    own = language.tokenizer()
    own.chat_template = language.CHAT.replace("<end>", "<|system|>\n")
    ids, start = Template(own).ids(Example(({"role": "user", "content": "p"},), "Lima", "here"))
    assert own.decode(ids[start:]) == "Lima<|system|>"


def test_running_text_that_ends_with_a_piece_leaves_none_of_one_token(words):
    text = Example((), "Ada was born in Oslo by the sea.", "here")
    size = len(Template(words).ids(text)[0])
    for length in range(2, size + 1):
        data = encode([text], Template(words), length=length).data
        assert min(len(ids) for ids in data.source.ids) > 1
        assert sum(len(ids) - 1 for ids in data.source.ids) == size - 1
