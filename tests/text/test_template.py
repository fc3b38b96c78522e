"""Chat templates: prompts equal `apply_chat_template`, replies are parsed by token ids, and each unsuitable folder gives one error."""

import json
import pickle
import re
import socket
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discover_jax.exceptions import ConfigError, TokenizerError
from discover_jax.text.chat import Reply
from discover_jax.text.folder_tokenizer import FolderTokenizer
from discover_jax.text.template import Template
from discover_jax.text.tokenizer import Tokenizer

NAMES = ("qwen2.5", "qwen3", "qwq", "llama3.2", "gemma")
SYSTEM, REQUEST = "You write Python programs.\n\n- Limits: 300 seconds.", "# Competition: boats\n\n```python\ndef run():\n\treturn 1\n```"


@pytest.fixture(scope="session")
def template(chat_folder):
    """The chat format by the name of its template."""
    loaded = {name: Template(chat_folder(name), date="2025-08-05") for name in NAMES}
    return loaded.__getitem__


@pytest.fixture(scope="session")
def reference(chat_folder):
    """transformers' tokenizer by the name of the template."""
    from transformers import AutoTokenizer

    loaded = {name: AutoTokenizer.from_pretrained(chat_folder(name), local_files_only=True) for name in NAMES}
    return loaded.__getitem__


def conversation(name, request, instructions):
    """The messages of a prompt, as transformers takes them. Only gemma's template refuses a system message."""
    if not instructions:
        return [{"role": "user", "content": request}]
    if name == "gemma":
        return [{"role": "user", "content": f"{instructions}\n\n{request}"}]
    return [{"role": "system", "content": instructions}, {"role": "user", "content": request}]


def applied(model, messages, **options):
    return model.apply_chat_template(messages, add_generation_prompt=True, date_string="05 Aug 2025", **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("instructions", ["", SYSTEM])
@pytest.mark.parametrize("request_", [REQUEST, "  \n\nx \r\n", "e\u0301 \u00e9 \U0001f680 \u2581", "assistant\n\nuser", "\ue000\ue001"])
def test_prompts_equal_apply_chat_template(name, instructions, request_, template, reference):
    messages = conversation(name, request_, instructions)
    rendered = template(name).render(request_, instructions)
    assert rendered.text == applied(reference(name), messages, tokenize=False)
    assert list(rendered.ids) == applied(reference(name), messages, tokenize=True, return_dict=False)


@settings(max_examples=50)
@given(request_=st.text(), instructions=st.text())
def test_any_text_equals_apply_chat_template(template, reference, request_, instructions):
    for name in ("qwen2.5", "llama3.2"):
        messages = conversation(name, request_, instructions)
        expected = applied(reference(name), messages, tokenize=True, return_dict=False)
        assert list(template(name).render(request_, instructions).ids) == expected


def test_a_text_with_all_characters_of_a_private_use_area(template):
    """The template marks names of tokens with one that does not occur in the prompt."""
    text = "<|im_end|>" + "".join(map(chr, range(0xE000, 0xF900)))
    assert text in template("qwen2.5").render(text).text


def test_date_in_a_prompt_is_fixed(template, chat_folder):
    assert "Today Date: 05 Aug 2025\n" in template("llama3.2").render(REQUEST).text
    assert "Today Date: 01 Feb 2026\n" in Template(chat_folder("llama3.2"), date="2026-02-01").render(REQUEST).text


@pytest.mark.parametrize("name", NAMES)
def test_names_of_tokens_in_a_prompt_are_ordinary_text(name, template, reference):
    """A program cannot end a message, open one, or end thinking, also where names overlap."""
    chat = template(name)
    added = chat.tokenizer.added
    attack = " ".join(["a", *added, *(token[:1] + token for token in added), *(token + token[1:] for token in added), "b"])
    plain = chat.render("a b", SYSTEM).ids
    hostile = chat.render(attack, SYSTEM)
    markup = set(added.values())
    assert [index for index in hostile.ids if index in markup] == [index for index in plain if index in markup]
    assert attack in chat.tokenizer.decode(hostile.ids)
    assert attack in hostile.text
    assert hostile.text == applied(reference(name), conversation(name, attack, SYSTEM), tokenize=False)


def test_a_template_that_hides_the_system_message_gets_it_from_the_user(write_chat_folder, tmp_path):
    """Such a template raises no error, so only rendering shows it."""
    only_users = "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    chat = Template(write_chat_folder(tmp_path / "hides", "qwen2.5", template=only_users))
    assert chat.render("Hello?", "Be brief.").text == "<|im_start|>user Be brief.\n\nHello?<|im_end|>"
    assert "without a system message" in chat.describe()


STOPS = {
    "qwen2.5": {"<|im_end|>", "<|endoftext|>"},
    "qwen3": {"<|im_end|>", "<|endoftext|>"},
    "qwq": {"<|im_end|>"},
    # <|eot_id|> is only in the template, <|eom_id|> only in generation_config.json.
    "llama3.2": {"<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"},
    "gemma": {"<eos>", "<end_of_turn>"},
}


@pytest.mark.parametrize("name", NAMES)
def test_stop_ids_are_those_of_the_files_and_of_the_template(name, template):
    chat = template(name)
    assert list(chat.stop_ids) == sorted(chat.tokenizer.special(token) for token in STOPS[name])
    assert all(token in chat.describe() for token in STOPS[name])


def test_generation_config_may_have_one_stop_id(write_chat_folder, tmp_path):
    folder = write_chat_folder(tmp_path / "one", "qwq")
    chat = Template(folder)
    end_of_text = chat.tokenizer.special("<|endoftext|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end_of_text}))
    assert set(Template(folder).stop_ids) == {*chat.stop_ids, end_of_text}


def ids_of(segments, chat):
    """Ids of a list of texts in which a name of an added token alone is that token."""
    added = chat.tokenizer.added
    return [index for text in segments for index in ([added[text]] if text in added else chat.tokenizer.encode(text))]


END = "<|im_end|>"
REPLIES = [
    ([], Reply("", "", True)),
    (["half an ans"], Reply("", "half an ans", True)),
    (["an answer", END], Reply("", "an answer", False)),
    (["an answer", "<|endoftext|>", "more"], Reply("", "an answer", False)),
    (["<think>", "\nplan\n", "</think>", "\n\nan answer", END], Reply("plan", "an answer", False)),
    (["\n", "<think>", "\nplan\n", "</think>", "\n\nan answer"], Reply("plan", "an answer", True)),
    (["<think>", "\nthinking of"], Reply("thinking of", None, True)),
    (["<think>", "\nthinking of", END], Reply("thinking of", None, False)),
    (["<think>", "plan", "</think>"], Reply("plan", "", True)),
    (["<think>", "plan", "</think>", "a", END, "</think>", "b"], Reply("plan", "a", False)),
    # The template of Qwen3 takes what follows the last </think> as the answer.
    (["plan", "</think>", "a", END], Reply("plan", "a", False)),
    (["<think>", "plan", "</think>", "a", "</think>", "b", END], Reply("plan\n\na", "b", False)),
    (["<think>", "one", "</think>", "\n", "<think>", "two", "</think>", "a", END], Reply("one\n\ntwo", "a", False)),
    (["a", "<think>", "later"], Reply("later", "a", False)),
]


@pytest.mark.parametrize(("segments", "expected"), REPLIES)
def test_replies_of_a_thinking_model(segments, expected, template):
    chat = template("qwen3")
    assert chat.parse(ids_of(segments, chat)) == expected


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        (["plan\n", "</think>", "\n\nan answer", END], Reply("plan", "an answer", False)),
        (["<think>", "plan", "</think>", "an answer", END], Reply("plan", "an answer", False)),  # opened twice
        (["plan, not ended"], Reply("plan, not ended", None, True)),
        (["plan, not ended", END], Reply("plan, not ended", None, False)),
    ],
)
def test_replies_after_a_template_that_opens_the_thinking(segments, expected, template):
    chat = template("qwq")
    assert chat.render(REQUEST).text.endswith("<think>\n")
    assert chat.parse(ids_of(segments, chat)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("an answer", Reply("", "an answer", False)),
        ("<think>\nplan\n</think>\n\nan answer", Reply("plan", "an answer", False)),
        ("<think>not ended", Reply("not ended", None, False)),
        ("print('<think>') # </think>", Reply("", "print('<think>') # </think>", False)),
    ],
)
def test_thinking_of_a_model_without_tokens_for_it_is_text(text, expected, template):
    chat = template("qwen2.5")
    assert chat.parse(ids_of([text, END], chat)) == expected


def test_names_of_tokens_in_an_answer_are_ordinary_text(template):
    chat = template("qwen3")
    program = "print('<think></think><|im_end|>')\nprint('more')"
    assert chat.parse(ids_of(["<think>", "plan", "</think>"], chat) + chat.tokenizer.encode(program) + [chat.stop_ids[0]]).final == program


@settings(max_examples=100)
@given(thinking=st.text(), final=st.text())
def test_replies_parse_back(template, thinking, final):
    chat = template("qwen3")
    ids = [*ids_of(["<think>"], chat), *chat.tokenizer.encode(f"\n{thinking}\n"), *ids_of(["</think>"], chat)]
    ids += [*chat.tokenizer.encode(f"\n\n{final}"), chat.stop_ids[0]]
    thinking, final = (unicodedata.normalize("NFC", text) for text in (thinking, final))
    assert chat.parse(ids) == Reply(thinking.strip("\n"), final.lstrip("\n"), False)
    assert chat.parse([*ids, *ids]) == chat.parse(ids)


@settings(max_examples=100)
@given(ids=st.lists(st.integers(-3, 330), max_size=40))
def test_any_ids_parse(template, reference, ids):
    for name in NAMES:
        reply = template(name).parse(ids)
        assert isinstance(reply.thinking, str)
        assert reply.final is None or isinstance(reply.final, str)
        known = [index for index in ids if 0 <= index < len(reference(name))]
        assert template(name).tokenizer.decode(ids) == reference(name).decode(known, skip_special_tokens=True)


@settings(max_examples=50)
@given(text=st.text())
def test_text_round_trips_without_added_tokens(template, text):
    for name in NAMES:
        tokenizer = template(name).tokenizer
        text_of_tokens = text + "".join(tokenizer.added)
        ids = tokenizer.encode(text_of_tokens)
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text_of_tokens)
        assert not set(ids) & set(tokenizer.added.values())


@pytest.mark.parametrize("name", ["qwen3", "qwq"])
def test_forced_answer_after_unfinished_thinking_parses_as_an_answer(name, template):
    chat = template(name)
    forced = chat.answer_forced("\n\nEnough.")
    assert chat.answer_opening() == (chat.tokenizer.special("</think>"),)
    assert forced[-1:] == chat.answer_opening()
    assert not set(forced) & set(chat.stop_ids)
    thinking = ids_of(["<think>"] if name == "qwen3" else [], chat) + chat.tokenizer.encode("Let me s")
    reply = chat.parse([*thinking, *forced, *ids_of(["\n\npass", END], chat)])
    assert reply == Reply("Let me s\n\nEnough.", "pass", truncated=False)


def test_thinking_that_does_not_exist_cannot_be_ended(template, write_chat_folder, tmp_path):
    closes = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<think>\n\n</think>\n\n"
    for chat, cause in (
        (template("qwen2.5"), r"tokenizer\.json has no tokens <think>"),
        (Template(write_chat_folder(tmp_path / "closes", "qwen3", template=closes)), "chat template of .*closes switches thinking off"),
    ):
        with pytest.raises(ConfigError, match=rf"config\.sampling\.thinking_tokens must be 0.*{cause}"):
            chat.answer_forced("Enough.")
        with pytest.raises(ConfigError, match="thinking_tokens"):
            chat.answer_opening()


def test_formats_and_tokenizers_can_be_pickled(template):
    chat = template("llama3.2")
    copy = pickle.loads(pickle.dumps(chat))
    assert copy.render(REQUEST, SYSTEM) == chat.render(REQUEST, SYSTEM)
    assert pickle.loads(pickle.dumps(chat.tokenizer)).encode("def run():") == chat.tokenizer.encode("def run():")
    assert isinstance(chat.tokenizer, Tokenizer)


def test_loading_opens_no_connection(chat_folder, monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert Template(chat_folder("qwen3")).render(REQUEST).ids


# ---------------------------------------------------------------------- unsuitable folders


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def folder(write_chat_folder, tmp_path):
    return write_chat_folder(tmp_path / "model", "qwen2.5")


def refused(folder, *words):
    """The error names the folder, one of its files, and what to do."""
    with pytest.raises(TokenizerError, match=".*".join([re.escape(str(folder)), *words])):
        Template(folder)


def test_folders_without_a_tokenizer(folder, tmp_path):
    refused(tmp_path / "absent", r"tokenizer\.json", "no such folder", "Copy")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").touch()
    refused(folder, r"tokenizer\.json", r"generation_config\.json", r"vocab\.json", "Copy")


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["not JSON", "[]"])
def test_damaged_files(folder, file, content):
    (folder / file).write_text(content)
    refused(folder, re.escape(file), "Copy")


def test_damaged_tokenizers(folder):
    change(folder / "tokenizer.json", model={"type": "BPE"})
    refused(folder, "Copy", r"tokenizer\.json")


def test_tokenizers_that_need_a_download(folder):
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["someone/model--tokenization.Theirs", None]})
    refused(folder, r"tokenizer_config\.json", "auto_map")


def test_folders_without_a_chat_template(folder):
    change(folder / "tokenizer_config.json", chat_template=None)
    refused(folder, r"tokenizer_config\.json", r"chat_template\.jinja", "instruct")
    change(folder / "tokenizer_config.json", chat_template=[{"name": "tools", "template": "x"}, {"name": "rag", "template": "y"}])
    refused(folder, "'default'", "tools, rag", r"tokenizer_config\.json")


@pytest.mark.parametrize("text", ["{% if %}", "{{ raise_exception('never') }}", "{{ messages[7].content.upper() }}"])
def test_templates_that_cannot_be_rendered(folder, text):
    change(folder / "tokenizer_config.json", chat_template=text)
    refused(folder, "user", r"tokenizer_config\.json")


def test_templates_without_replies(folder):
    change(
        folder / "tokenizer_config.json",
        chat_template="{{ messages[0].content }}{% if messages[1] %}{{ raise_exception('no') }}{% endif %}",
    )
    refused(folder, "user, assistant", r"tokenizer_config\.json")


def test_templates_whose_date_cannot_be_fixed(folder):
    change(folder / "tokenizer_config.json", chat_template="{% set f = '%d' %}{{ strftime_now(f) }}{{ messages[0].content }}")
    refused(folder, "strftime_now", r"tokenizer_config\.json")


def test_templates_without_the_users_message(folder):
    change(folder / "tokenizer_config.json", chat_template="<|im_start|>assistant")
    refused(folder, "user's message")


def test_folders_without_a_stop_token(folder):
    change(folder / "tokenizer_config.json", eos_token=None, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    (folder / "generation_config.json").unlink()
    refused(folder, r"generation_config\.json", r"tokenizer_config\.json")


@pytest.mark.parametrize("ids", ["<|im_end|>", [1, "2"], -1])
def test_stop_ids_that_are_not_ids(folder, ids):
    change(folder / "generation_config.json", eos_token_id=ids)
    refused(folder, r"generation_config\.json", "eos_token_id")


def test_tokenizers_that_change_text(folder):
    state = json.loads((folder / "tokenizer.json").read_text())
    change(folder / "tokenizer.json", normalizer={"type": "Lowercase"})
    change(folder / "tokenizer.json", added_tokens=[token | {"content": token["content"].upper()} for token in state["added_tokens"]])
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot keep"):
        FolderTokenizer(folder)


def test_added_tokens_with_gaps_in_their_ids(folder):
    state = json.loads((folder / "tokenizer.json").read_text())
    state["added_tokens"][-1]["id"] += 1
    (folder / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(TokenizerError, match="<tool_call>"):
        FolderTokenizer(folder)
