"""Reads instructions with their answers, and turns them into tokens with the answers marked."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from opt_deus_jax.data.chunks import Encoded
from opt_deus_jax.data.sources import ROW_ENDINGS, Row, Source, encodable, read_rows
from opt_deus_jax.errors import UserError

ENDINGS = (".json", *ROW_ENDINGS)
_ROLES: dict[str, str] = {role: role for role in ("system", "user", "assistant")}
# The spelling of ShareGPT and of the many data sets made like it.
_SHAREGPT_ROLES: dict[str, str] = {"system": "system", "human": "user", "gpt": "assistant"}
# github.com/tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT.
_ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


class Turn(NamedTuple):
    """One turn of a conversation: who speaks (system, user or assistant), and what."""

    role: str
    content: str


class Conversation(NamedTuple):
    """An instruction with its answer, or several.

    Attributes:
        place: File and number of its row, for messages.
        id: The same for the same fields of a row; splits are made by its hash.
        turns: The turns, the last one by the assistant. For the Alpaca template the first holds
            the whole prompt.
    """

    place: str
    id: str
    turns: tuple[Turn, ...]

    def __len__(self) -> int:
        return sum(len(turn.content) for turn in self.turns)


class ChatEncoder(Protocol):
    """What of a tokenizer is needed to make records of instructions; it must survive pickling.

    `opt_deus_jax.checkpoints.tokenizer.Tokenizer` says what each member means.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def vocabulary_size(self) -> int: ...  # noqa: D102

    @property
    def eos_ids(self) -> tuple[int, ...]: ...  # noqa: D102

    @property
    def bos_id(self) -> int | None: ...  # noqa: D102

    @property
    def chat_template(self) -> str | None: ...  # noqa: D102

    @property
    def added_tokens(self) -> tuple[str, ...]: ...  # noqa: D102

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]: ...  # noqa: D102

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...  # noqa: D102

    def apply_chat_template(  # noqa: D102
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False
    ) -> str: ...


def read_conversations(source: Source, row_format: str, template: str) -> Iterator[Conversation]:
    """Streams the instructions of one file.

    Args:
        source: A file with one of `ENDINGS`.
        row_format: `alpaca`: rows of "instruction", "output" and perhaps "input". `messages`: rows
            of "messages", each with "role" (system, user, assistant) and "content", or of
            "conversations", each with "from" (system, human, gpt) and "value".
        template: `chat` makes an Alpaca row a user's turn (instruction, blank line, input) and the
            assistant's; `alpaca` writes its prompt as Stanford Alpaca does.

    Yields:
        The conversations in order, none left out.

    Raises:
        UserError: The file is corrupt, or a row is not of this format.
    """
    for row in read_rows(source):
        if row_format == "alpaca":
            yield _read_alpaca(row, template)
        else:
            yield _read_messages(row)


def encode_conversations(
    tokenizer: ChatEncoder, template: str, conversations: list[Conversation]
) -> Encoded:
    """Turns conversations into tokens.

    A prompt has the tokens that it has at inference, where nothing follows it yet. An answer ends
    with the special token that ends the turn; what the chat template writes after that belongs to
    the next prompt. For the Alpaca template the answer ends with the end-of-sequence token, and the
    prompt begins as the tokenizer begins a text.

    Args:
        tokenizer: The tokenizer.
        template: `chat` or `alpaca`.
        conversations: The conversations.

    Returns:
        Their tokens; `is_answer` marks the assistant's words and the token that ends each turn.

    Raises:
        UserError: The chat template refuses a conversation, or is none that turns can be told
            apart in.
    """
    if template == "alpaca":
        pieces = [[turn.content for turn in item.turns] for item in conversations]
    else:
        pieces = [_chat_pieces(tokenizer, item) for item in conversations]
    examples = _encode_pieces(tokenizer, pieces)
    if template == "alpaca":
        begin = tokenizer.encode("", add_special_tokens=True)[:1]
        begin = begin if begin == [tokenizer.bos_id] else []
        examples = [
            [begin + prompt, answer + [tokenizer.eos_ids[0]]] for prompt, answer in examples
        ]
    lengths = np.array([sum(map(len, parts)) for parts in examples], np.int64)
    parts = list(itertools.chain.from_iterable(examples))
    flat = itertools.chain.from_iterable(parts)
    is_answer = itertools.chain.from_iterable(
        [number % 2 == 1 for number in range(len(example))] for example in examples
    )
    return Encoded(
        np.fromiter(flat, np.uint32, int(lengths.sum())),
        lengths,
        np.repeat(np.fromiter(is_answer, bool, len(parts)), [len(part) for part in parts]),
    )


def _read_alpaca(row: Row, template: str) -> Conversation:
    if "messages" in row.fields or "conversations" in row.fields:
        raise UserError(
            f"{row.place}: holds chat messages: set --config.data.format=messages, and keep rows of"
            " other kinds in other files"
        )
    instruction, output = (_text(row, row.fields, name) for name in ("instruction", "output"))
    context = ""
    if row.fields.get("input") not in (None, ""):
        context = _text(row, row.fields, "input")
    if template == "chat":
        prompt = f"{instruction}\n\n{context}" if context else instruction
    else:
        form = _ALPACA_PROMPT_WITH_INPUT if context else _ALPACA_PROMPT
        prompt = form.format(instruction=instruction, input=context)
    turns = (Turn("user", prompt), Turn("assistant", output))
    return Conversation(row.place, json.dumps([instruction, context, output]), turns)


def _read_messages(row: Row) -> Conversation:
    is_sharegpt = "messages" not in row.fields and "conversations" in row.fields
    field = "conversations" if is_sharegpt else "messages"
    role_name, content_name = ("from", "value") if is_sharegpt else ("role", "content")
    messages = row.fields.get(field)
    if messages is None and "instruction" in row.fields:
        raise UserError(
            f"{row.place}: holds an Alpaca row: set --config.data.format=alpaca, and keep rows of"
            " other kinds in other files"
        )
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f"{row.place}: field 'messages' is not a list of messages but {messages!r:.40}: give"
            f" each row one ({', '.join(map(repr, row.fields))} are there)"
        )
    turns = []
    for number, message in enumerate(messages, start=1):
        where = f"{field}[{number - 1}]."
        if not isinstance(message, dict):
            raise UserError(f"{row.place}: message {number} is no object: use role and content")
        role = _text(row, message, role_name, where)
        known = _SHAREGPT_ROLES if is_sharegpt else _ROLES
        if role not in known:
            raise UserError(
                f"{row.place}: field {where}{role_name}={role!r}: unknown role, use one of"
                f" {', '.join(known)}"
            )
        turns.append(Turn(known[role], _text(row, message, content_name, where)))
    for number, name, right in ((0, "first", False), (-1, "last", True)):
        if (turns[number].role == "assistant") != right:
            raise UserError(
                f"{row.place}: the {name} message is by the {turns[number].role}: drop it, as a"
                " conversation begins with a question and ends with the assistant's answer"
            )
    return Conversation(row.place, json.dumps(turns), tuple(turns))


def _text(row: Row, fields: Mapping[str, Any], name: str, where: str = "") -> str:
    value = fields.get(name)
    if isinstance(value, str) and value.strip():
        return encodable(value)
    if value is None:
        found = f"there are only {', '.join(map(repr, fields)) or 'none'}"
        raise UserError(f"{row.place}: no field {where}{name}, {found}: add it or drop the row")
    problem = "is empty" if value == "" or isinstance(value, str) else f"is {value!r:.40}, no text"
    raise UserError(f"{row.place}: field {where}{name} {problem}: mend or drop the row")


def _chat_pieces(tokenizer: ChatEncoder, conversation: Conversation) -> list[str]:
    """Cuts a conversation as written by the chat template: prompt, answer, prompt, answer."""
    messages = [turn._asdict() for turn in conversation.turns]
    try:
        whole = tokenizer.apply_chat_template(messages)
        cuts = [0]
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            opened = tokenizer.apply_chat_template(messages[:number], add_generation_prompt=True)
            closed = tokenizer.apply_chat_template(messages[: number + 1])
            if not (whole.startswith(closed) and closed.startswith(opened)):
                raise UserError(
                    f"{tokenizer.name}: the chat template writes the turns before answer"
                    f" {len(cuts) // 2 + 1} otherwise once more follow, so that answers cannot be"
                    " told apart in it; use another template, or single questions"
                )
            closed = closed.rstrip()
            if not closed.endswith(tokenizer.added_tokens):
                raise UserError(
                    f"{tokenizer.name}: the chat template ends the assistant's turn without a"
                    " special token, so that a model could not learn to stop; use another template,"
                    " or for Alpaca rows --config.data.template=alpaca"
                )
            cuts += [len(opened), len(closed)]
    except UserError as error:
        raise UserError(f"{conversation.place}: {error}") from error
    return [whole[start:end] for start, end in itertools.pairwise(cuts)]


def _encode_pieces(
    tokenizer: ChatEncoder, pieces: Sequence[Sequence[str]]
) -> list[list[list[int]]]:
    """Tokens of each piece, as they are where the pieces before it are known and no more."""
    flat = iter(tokenizer.encode_batch(list(itertools.chain.from_iterable(pieces))))
    apart = [list(itertools.islice(flat, len(texts))) for texts in pieces]
    whole = tokenizer.encode_batch(["".join(texts) for texts in pieces])
    encoded = []
    for texts, parts, together in zip(pieces, apart, whole, strict=True):
        if list(itertools.chain.from_iterable(parts)) != together:
            # Tokenizers like that of Llama 2 put a space before any text, be it a continuation;
            # others join characters over the cut, and there the pieces are what inference sees.
            prefixes = tokenizer.encode_batch(list(itertools.accumulate(texts)))
            if all(together[: len(prefix)] == prefix for prefix in prefixes):
                cuts = itertools.pairwise([0, *map(len, prefixes)])
                parts = [together[start:end] for start, end in cuts]
        encoded.append(parts)
    return encoded
