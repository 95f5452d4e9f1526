from __future__ import annotations

import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from kvkeep.errors import CheckpointError, InvalidRequest
from kvkeep.models.template_check import first_break
from kvkeep.models.text import DecodeStream, TextModel

CHAT = [
    {"role": "user", "content": "What is the number on the north door?"},
    {"role": "assistant", "content": "It is 4821."},
    {"role": "user", "content": "Thanks, und die Tür? 🚪"},
]


@pytest.fixture
def text(shared: Callable[[str], Path]) -> TextModel:
    return TextModel.load(shared("qwen2"))


def streamed(text: TextModel, ids: list[int]) -> list[str]:
    stream = text.stream()
    return [*(stream.step(i) for i in ids), stream.finish()]


@pytest.mark.parametrize("said", ["", "a", " two words", "naïve Tür 🚪🏽 語", "\x00\n\t"])
def test_text_survives_encode_and_decode(text: TextModel, said: str) -> None:
    assert text.decode(text.encode(said)) == said
    assert "".join(streamed(text, text.encode(said))) == said


@given(said=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_streams_never_break_a_character(text_of: TextModel, said: str) -> None:
    pieces = streamed(text_of, text_of.encode(said))
    assert "".join(pieces) == said.rstrip("\ufffd")
    if "\ufffd" not in said:
        assert all("\ufffd" not in piece for piece in pieces)


@pytest.fixture(scope="session")
def text_of(shared: Callable[[str], Path]) -> TextModel:
    return TextModel.load(shared("qwen2"))


def test_streams_hold_back_only_unfinished_characters(text: TextModel) -> None:
    ids = text.encode("🚪x")
    assert streamed(text, ids) == ["", "", "", "🚪", "x", ""]


def test_an_unfinished_character_at_the_end_is_dropped(text: TextModel) -> None:
    assert "".join(streamed(text, text.encode("ok 🚪")[:-1])) == "ok "


def test_bytes_that_never_become_text_do_not_stall_the_stream(text: TextModel) -> None:
    bad = text.encode("🚪")[1]
    pieces = streamed(text, [bad] * 200 + text.encode("fine"))
    assert "".join(pieces).endswith("fine")
    assert 190 <= "".join(pieces).count("\ufffd") <= 200


def test_random_tokens_stream_as_they_decode(text: TextModel) -> None:
    pick = random.Random(0)
    for _ in range(30):
        ids = [pick.randrange(text.vocab_size) for _ in range(60)]
        whole = text.decode(ids)
        assert "".join(streamed(text, ids)).rstrip("\ufffd") == whole.rstrip("\ufffd")


def byte_fallback() -> Tokenizer:
    """Return a tokenizer that marks spaces, strips the first, and falls back to bytes."""
    words = {f"<0x{byte:02X}>": byte for byte in range(256)}
    words |= {"▁the": 256, "▁door": 257, "s": 258, "<s>": 259}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def test_leading_spaces_survive_stripping_decoders() -> None:
    stream = DecodeStream(byte_fallback(), skip_special_tokens=True)
    ids = [256, 257, 259, 258, 257, *"é".encode(), *"🚪".encode(), 256]
    assert "".join(stream.step(i) for i in ids) == "the doors dooré🚪 the"


def test_a_stream_goes_on_after_its_prompt() -> None:
    fresh = DecodeStream(byte_fallback(), skip_special_tokens=True)
    after = DecodeStream(byte_fallback(), skip_special_tokens=True, after=[257] * 50)
    assert (fresh.step(256), after.step(256)) == ("the", " the")
    cut = DecodeStream(byte_fallback(), skip_special_tokens=True, after=[257, *"é".encode()[:1]])
    assert cut.step("é".encode()[1]) == "é"


def test_special_tokens_are_skipped_or_shown(text: TextModel) -> None:
    ids = text.encode("a<|im_end|>b")
    assert len(ids) == 3
    assert text.decode(ids) == "ab"
    assert text.decode(ids, skip_special_tokens=False) == "a<|im_end|>b"
    shown = text.stream(skip_special_tokens=False)
    assert [shown.step(i) for i in ids] == ["a", "<|im_end|>", "b"]


def test_single_tokens(text: TextModel) -> None:
    assert text.token_text(text.encode(" the")[0]) == " the"
    assert text.eos_token_id is not None
    assert text.token_text(text.eos_token_id) == "<|im_end|>"
    assert text.token_text(10**6) == ""
    assert text.bos_token_id is None
    assert text.vocab_size == 512


def test_lone_surrogates_are_a_bad_request(text: TextModel) -> None:
    with pytest.raises(InvalidRequest, match="lone surrogate"):
        text.encode("a\ud800")


def test_chat_renders_as_the_template_says(text: TextModel) -> None:
    assert text.render_chat(CHAT[:1]) == (
        "<|im_start|>user\nWhat is the number on the north door?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = text.apply_chat(CHAT)
    assert text.decode(ids, skip_special_tokens=False) == text.render_chat(CHAT)
    assert text.decode(ids).endswith("Thanks, und die Tür? 🚪\nassistant\n")


def test_final_message_is_continued(text: TextModel) -> None:
    rendered = text.render_chat(CHAT[:2], add_generation_prompt=False, continue_final_message=True)
    assert rendered.endswith("<|im_start|>assistant\nIt is 4821.")


def set_template(path: Path, template: object) -> None:
    file = path / "tokenizer_config.json"
    fields = json.loads(file.read_text())
    fields.pop("chat_template")
    if template is not None:
        fields["chat_template"] = template
    file.write_text(json.dumps(fields))


def test_no_template_is_a_clear_refusal(broken: Path) -> None:
    set_template(broken, None)
    with pytest.raises(InvalidRequest, match="has no chat template") as caught:
        TextModel.load(broken).apply_chat(CHAT)
    assert caught.value.param == "messages"


def test_refusals_quote_the_template_but_never_the_messages(broken: Path) -> None:
    set_template(broken, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequest, match="refuses these messages: roles must alternate"):
        TextModel.load(broken).apply_chat(CHAT)
    set_template(broken, "{{ raise_exception('unknown role ' + messages[0].content) }}")
    with pytest.raises(InvalidRequest) as caught:
        TextModel.load(broken).apply_chat(CHAT)
    assert "north door" not in str(caught.value)


def test_templates_are_sandboxed(broken: Path) -> None:
    set_template(broken, "{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InvalidRequest, match="refuses"):
        TextModel.load(broken).apply_chat(CHAT)


def test_wrong_message_shapes_are_bad_requests(text: TextModel) -> None:
    with pytest.raises(InvalidRequest, match="refuses"):
        text.apply_chat([{"role": "user", "content": None}])


def test_special_tokens_and_tools_reach_the_template(broken: Path) -> None:
    tooled = [
        {"name": "default", "template": "plain{{ eos_token }}"},
        {"name": "tool_use", "template": "{{ tools[0].name }}"},
    ]
    set_template(broken, tooled)
    text = TextModel.load(broken)
    assert text.render_chat(CHAT) == "plain<|im_end|>"
    assert text.render_chat(CHAT, tools=[{"name": "look"}]) == "look"


def test_template_file_comes_first(broken: Path) -> None:
    (broken / "chat_template.jinja").write_text("from the file")
    assert TextModel.load(broken).render_chat(CHAT) == "from the file"


@pytest.mark.parametrize("template", [3, [{"name": "tool_use", "template": "x"}], [1]])
def test_malformed_template_fields(broken: Path, template: object) -> None:
    set_template(broken, template)
    with pytest.raises(CheckpointError, match="malformed `chat_template`"):
        TextModel.load(broken)


def test_no_tokenizer_names_what_is_there(broken: Path) -> None:
    (broken / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json$"):
        TextModel.load(broken)
    (broken / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model alone is not supported"):
        TextModel.load(broken)


def test_broken_tokenizer(broken: Path) -> None:
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a valid tokenizer"):
        TextModel.load(broken)


def test_stored_truncation_does_not_cut_prompts(broken: Path) -> None:
    file = broken / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(file))
    assert (
        TextModel.load(broken).decode(TextModel.load(broken).encode("north " * 9)) == "north " * 9
    )


def test_threads_share_one_text_model(text: TextModel) -> None:
    said = [f"number {i} 🚪" for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda s: text.decode(text.encode(s)), said)) == said
        chats = list(pool.map(lambda s: text.apply_chat([{"role": "user", "content": s}]), said))
    assert [text.decode(ids).split("\n")[1] for ids in chats] == said


def test_a_stable_template_has_no_break(shared: Callable[[str], Path]) -> None:
    assert first_break(shared("qwen2")) is None


def test_a_template_that_rewrites_old_turns_breaks(broken: Path) -> None:
    set_template(
        broken,
        "{%- for m in messages -%}<|im_start|>{{ m.role }}\n"
        "{%- if m.role == 'assistant' and loop.last -%}<think></think>{%- endif -%}"
        "{{ m.content }}<|im_end|>\n{%- endfor -%}"
        "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}",
    )
    found = first_break(broken)
    assert found is not None
    assert found.turn == 1
    assert found.was.startswith("<think>")
    assert found.becomes.startswith("It has a no")


def test_a_template_that_counts_turns_breaks_at_its_start(broken: Path) -> None:
    set_template(broken, "{{ messages | length }} messages\n{{ messages[-1].content }}")
    found = first_break(broken)
    assert found is not None
    assert (found.turn, found.position) == (1, 0)
