"""The tokenizer of a checkpoint, from the files that lie beside its weights."""

import dataclasses
import datetime
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers

from opt_deus_jax.checkpoints.manifest import FILE_NAME, decode_manifest
from opt_deus_jax.errors import UserError

_SPECIAL_TOKENS = tuple(
    f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer that can be sent to other processes.

    It holds the file's bytes, from which each process builds the working object once.

    Attributes:
        name: The checkpoint that it came with.
        tokenizer_json: Content of tokenizer.json.
        vocabulary_size: Highest id, added tokens included, plus one.
        eos_ids: Ids that end a text; the first ends a document. Of instruction-tuned models another
            may end a turn.
        bos_id: Id that begins one, None where the model has none.
        special_tokens: Text of the special tokens by role ("eos_token"), as chat templates see it.
        chat_template: Jinja source, None where the checkpoint has no chat template.
    """

    name: str
    tokenizer_json: bytes = dataclasses.field(repr=False)
    vocabulary_size: int
    eos_ids: tuple[int, ...]
    bos_id: int | None
    special_tokens: Mapping[str, str]
    chat_template: str | None = dataclasses.field(repr=False)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text; special tokens written out in the text become their ids."""
        return _backend(self.tokenizer_json).encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = False
    ) -> list[list[int]]:
        """Token ids of several texts, which `tokenizers` works on in parallel."""
        encodings = _backend(self.tokenizer_json).encode_batch_fast(
            list(texts), add_special_tokens=add_special_tokens
        )
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return _backend(self.tokenizer_json).decode(
            list(ids), skip_special_tokens=skip_special_tokens
        )

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """Texts that become one id wherever they are written, as `<|im_end|>` does."""
        added = _backend(self.tokenizer_json).get_added_tokens_decoder().values()
        return tuple(token.content for token in added)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False
    ) -> str:
        """Writes a conversation as the text that the model was tuned on.

        Args:
            messages: Turns with "role" and "content".
            add_generation_prompt: Whether to open the assistant's next turn.

        Raises:
            UserError: There is no chat template, it cannot be parsed, or it rejects the messages.
        """
        if self.chat_template is None:
            raise UserError(
                f"{self.name}: no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json); take an instruction-tuned base or add the file"
            )
        try:
            return _compiled(self.chat_template).render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        # TypeError is how a template meets content of a kind that it does not expect.
        except (jinja2.TemplateError, TypeError) as error:
            raise UserError(
                f"{self.name}: the chat template refuses the conversation: {error}; mend the "
                "messages or the template"
            ) from error


def load_tokenizer(
    side_files: Mapping[str, bytes], hf_config: Mapping[str, Any], name: str
) -> Tokenizer:
    """Loads the tokenizer of a checkpoint.

    What ends a text are all `eos_token_id` of generation_config.json, else of config.json, and the
    `eos_token` of tokenizer_config.json. A document begins with the first that is found likewise.

    Args:
        side_files: The checkpoint's other files, by name.
        hf_config: Content of its config.json.
        name: What the user called it, for messages.

    Raises:
        UserError: There is no readable tokenizer.json, its vocabulary does not fit the model, it is
            not that of the base of a grown model, or nothing says which token ends a document.
    """
    if "tokenizer.json" not in side_files:
        found = ", ".join(sorted(side_files)) or "no files at all"
        raise UserError(
            f"{name}: no tokenizer.json beside the weights (found: {found}); save the model's fast "
            "tokenizer there (transformers: tokenizer.save_pretrained)"
        )
    tokenizer_json = bytes(side_files["tokenizer.json"])
    _check_belongs(tokenizer_json, side_files, name)
    try:
        backend = _backend(tokenizer_json)
    # tokenizers raises bare Exception for content that it cannot read.
    except Exception as error:
        raise UserError(
            f"{name}: tokenizer.json cannot be read ({error}); download it again or save the "
            "tokenizer anew"
        ) from error
    config = _json_file(side_files, "tokenizer_config.json", name)
    generation = _json_file(side_files, "generation_config.json", name)
    special_tokens = _special_tokens(
        {**_json_file(side_files, "special_tokens_map.json", name), **config}
    )
    vocabulary_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    _check_fits(vocabulary_size, hf_config, name)
    bos_ids, eos_ids = (
        _token_ids(role, (generation, hf_config), special_tokens, backend)
        for role in ("bos_token", "eos_token")
    )
    if not eos_ids or not 0 <= eos_ids[0] < hf_config["vocab_size"]:
        raise UserError(
            f"{name}: no token ends a document (eos is {list(eos_ids)}); give eos_token_id in "
            "generation_config.json or config.json, or eos_token in tokenizer_config.json"
        )
    return Tokenizer(
        name=name,
        tokenizer_json=tokenizer_json,
        vocabulary_size=vocabulary_size,
        eos_ids=eos_ids,
        bos_id=bos_ids[0] if bos_ids else None,
        special_tokens=special_tokens,
        chat_template=_chat_template(side_files, config),
    )


def _check_belongs(tokenizer_json: bytes, side_files: Mapping[str, bytes], name: str) -> None:
    """Another tokenizer with a vocabulary of the same size would go unnoticed otherwise."""
    if FILE_NAME not in side_files:
        return
    manifest = decode_manifest(bytes(side_files[FILE_NAME]), f"{name}/{FILE_NAME}")
    recorded = manifest.base.get("tokenizer_sha256")
    if recorded and recorded != hashlib.sha256(tokenizer_json).hexdigest():
        raise UserError(
            f"{name}: tokenizer.json is not the one that the model was grown with ({FILE_NAME} has "
            "another sha256); put that of the base back"
        )


@functools.lru_cache(maxsize=4)
def _backend(tokenizer_json: bytes) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(tokenizer_json.decode())
    # Some releases leave these on in the file, which would cut training text without a word.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _json_file(side_files: Mapping[str, bytes], file: str, name: str) -> dict[str, Any]:
    if file not in side_files:
        return {}
    try:
        content = json.loads(side_files[file])
    except ValueError as error:
        raise UserError(f"{name}: {file} is not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{name}: {file} does not hold a JSON object; download it again")
    return content


def _check_fits(vocabulary_size: int, hf_config: Mapping[str, Any], name: str) -> None:
    model_size = hf_config.get("vocab_size")
    if not isinstance(model_size, int):
        raise UserError(f"{name}: config.json has no vocab_size; add it")
    if vocabulary_size > model_size:
        raise UserError(
            f"{name}: a tokenizer whose vocabulary does not fit the model: ids up to "
            f"{vocabulary_size - 1} need vocab_size {vocabulary_size}, config.json says "
            f"{model_size}; take the tokenizer that belongs to this model"
        )


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by role, each written as a string or as a serialised AddedToken."""
    tokens = {}
    for role in _SPECIAL_TOKENS:
        value = config.get(role)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[role] = text
    return tokens


def _token_ids(
    role: str,
    configs: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, str],
    backend: tokenizers.Tokenizer,
) -> tuple[int, ...]:
    """Those of the first of the configs that has any, then the tokenizer's own."""
    values = (config.get(f"{role}_id") for config in configs)
    ids = next((value for value in values if value not in (None, [])), [])
    ids = ids if isinstance(ids, list) else [ids]
    own = backend.token_to_id(special_tokens[role]) if role in special_tokens else None
    return tuple(dict.fromkeys(map(int, ids if own is None else [*ids, own])))


def _chat_template(side_files: Mapping[str, bytes], config: Mapping[str, Any]) -> str | None:
    if "chat_template.jinja" in side_files:
        return side_files["chat_template.jinja"].decode()
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


class _GenerationTag(jinja2.ext.Extension):
    """Lets `{% generation %}` pass, which marks the assistant's words and prints nothing."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Leaves the body in place of the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=4)
def _compiled(template: str) -> jinja2.Template:
    """Compiles a template in the surroundings that transformers gives it.

    The sandbox matters: templates come with downloaded checkpoints.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own tojson escapes HTML, which the models never saw.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
