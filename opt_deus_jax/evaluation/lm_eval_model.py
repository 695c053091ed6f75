"""A checkpoint as a model of lm-evaluation-harness, by the name `opt_deus_jax`.

Texts become tokens as in lm_eval's own `hf` backend, so that figures are comparable. In lm_eval's
command line it is found after `import opt_deus_jax.evaluation.lm_eval_model`.
"""

import bisect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from tqdm import tqdm

from opt_deus_jax.errors import UserError
from opt_deus_jax.evaluation.continuing import continue_prompts
from opt_deus_jax.evaluation.loading import LoadedModel, load_model
from opt_deus_jax.evaluation.scoring import Scores, score_continuations

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import (
        handle_stop_sequences,
        has_bos_prefix,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UserError(
        f"evaluation needs lm_eval ({error}); run: pip install 'opt_deus_jax[eval]'"
    ) from None

# What lm_eval's `hf` backend adds where a task does not say.
_MAX_NEW_TOKENS = 256
_SETTINGS = frozenset({"until", "max_gen_toks", "do_sample", "temperature", "top_p"})


class OptDeusModel(TemplateLM):
    """Answers lm_eval's three kinds of request."""

    def __init__(
        self,
        pretrained: str | LoadedModel,
        dtype: str = "float32",
        batch_tokens: int = 2048,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """Loads the model.

        Args:
            pretrained: A Hugging Face directory, a `.gguf` file, a hub id or a loaded model.
            dtype: Type of parameters and activations.
            batch_tokens: Tokens a forward pass, over all devices.
            batch_size: lm_eval passes it to every model; only None and 1 are accepted, since
                `batch_tokens` says how much is computed at once.
            max_batch_size: Likewise.
            device: Likewise; JAX takes the devices that it finds.

        Raises:
            UserError: The model cannot be loaded, or an argument has no meaning here.
        """
        super().__init__()
        for name, value in (("batch_size", batch_size), ("max_batch_size", max_batch_size)):
            if value not in (None, 1, "1"):
                raise UserError(f"model argument {name}={value}: use batch_tokens=NUMBER instead")
        if device is not None:
            raise UserError(f"model argument device={device}: set JAX_PLATFORMS={device} instead")
        loaded = load_model(pretrained, dtype=dtype) if isinstance(pretrained, str) else pretrained
        self.model = loaded
        # Where lm_eval looks for a chat template.
        self.tokenizer: Any = loaded.tokenizer
        self.max_length = loaded.config.max_positions
        self.dtype, self.batch_tokens = dtype, batch_tokens
        self.truncated_requests = 0

    @property
    def eot_token_id(self) -> int:
        """Id that ends a document, as the tokenizer's own files name it."""
        token = self.model.tokenizer.special_tokens.get("eos_token")
        return self.model.tokenizer.eos_ids[0] if token is None else self._id_of(token)

    @property
    def prefix_token_id(self) -> int:
        """Id that stands for an empty context: the tokenizer's bos, else its eos."""
        token = self.model.tokenizer.special_tokens.get("bos_token")
        return self.eot_token_id if token is None else self._id_of(token)

    @property
    def tokenizer_name(self) -> str:
        """Stands for the chat template in lm_eval's caches."""
        return self.model.tokenizer.name.replace("/", "__")

    def _id_of(self, token: str) -> int:
        return self.model.tokenizer.encode(token)[0]

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval records about the model, after it has answered."""
        sizes = [leaf.size for leaf in jax.tree.leaves(self.model.params)]
        return {
            "model_name": self.model.tokenizer.name,
            "model_num_parameters": sum(sizes),
            "model_dtype": self.dtype,
            "batch_tokens": self.batch_tokens,
            "truncated_requests": self.truncated_requests,
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids of a text.

        Args:
            string: The text.
            add_special_tokens: Whether the tokenizer adds its bos; None: unless the text has it.
        """
        if add_special_tokens is None:
            prefix = self.model.tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
            add_special_tokens = not has_bos_prefix(string, prefix)
        return self.model.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Writes a conversation as text; without the prompt it ends in the last message."""
        text = self.model.tokenizer.apply_chat_template(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def _score(
        self, pairs: Sequence[tuple[list[int], list[int]]], what: str, disable_tqdm: bool
    ) -> Scores:
        quiet = disable_tqdm or jax.process_index() != 0
        with tqdm(total=len(pairs), desc=what, disable=quiet) as bar:
            scores = score_continuations(
                self.model.params,
                pairs,
                config=self.model.config,
                mesh=self.model.mesh,
                dtype=self.dtype,
                batch_tokens=self.batch_tokens,
                on_scored=bar.update,
            )
        self.truncated_requests += scores.truncated
        return scores

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        scores = self._score(pairs, "continuations", disable_tqdm)
        answers = list(zip(scores.log_likelihoods.tolist(), scores.is_greedy.tolist(), strict=True))
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's context.

        Args:
            requests: Each with one text.
            disable_tqdm: Whether to show no progress.

        Returns:
            Nats, of each text.
        """
        windows, owners = [], []
        for owner, (text,) in enumerate(request.args for request in requests):
            for window in get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            ):
                windows.append(make_disjoint_window(window))
                owners.append(owner)
        scores = self._score(windows, "windows", disable_tqdm)
        sums = [0.0] * len(requests)
        for owner, log_likelihood in zip(owners, scores.log_likelihoods.tolist(), strict=True):
            sums[owner] += log_likelihood
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues texts up to a stop string.

        Args:
            requests: Each with a text and lm_eval's settings of generation: `until`,
                `max_gen_toks`, `do_sample`, `temperature`, `top_p`.
            disable_tqdm: Whether to show no progress.

        Returns:
            The continuations, without the stop strings.

        Raises:
            UserError: A setting is not known, or leaves no room for the text.
        """
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[repr(request.args[1])].append(number)
        answers = [""] * len(requests)
        quiet = disable_tqdm or jax.process_index() != 0
        with tqdm(total=len(requests), desc="generations", disable=quiet) as bar:
            for numbers in groups.values():
                texts = [requests[number].args[0] for number in numbers]
                settings = requests[numbers[0]].args[1]
                for number, answer in zip(
                    numbers, self._continue(texts, settings, bar.update), strict=True
                ):
                    answers[number] = answer
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def _continue(
        self, texts: list[str], asked: Mapping[str, Any], on_done: Callable[[int], Any]
    ) -> list[str]:
        settings: dict[str, Any] = {**normalize_gen_kwargs(dict(asked), _MAX_NEW_TOKENS)}
        unknown = sorted(settings.keys() - _SETTINGS)
        if unknown:
            raise UserError(
                f"generation setting {unknown[0]}={settings[unknown[0]]!r}: not known here; a task "
                f"may set {', '.join(sorted(_SETTINGS))}"
            )
        room = self.max_length - settings["max_gen_toks"]
        if room < 1:
            raise UserError(
                f"generation setting max_gen_toks={settings['max_gen_toks']}: leaves no room in "
                f"the model's context of {self.max_length}; use less"
            )
        prompts = [self.tok_encode(text) for text in texts]
        self.truncated_requests += sum(len(prompt) > room for prompt in prompts)
        continuations = continue_prompts(
            self.model,
            [prompt[-room:] for prompt in prompts],
            max_new_tokens=settings["max_gen_toks"],
            temperature=settings.get("temperature", 0.0) if settings["do_sample"] else 0.0,
            top_p=settings.get("top_p", 1.0),
            dtype=self.dtype,
            batch_tokens=self.batch_tokens,
            on_done=on_done,
        )
        eos = self.model.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        stops = handle_stop_sequences(settings.get("until"), eos)
        return [self._text(continuation, stops) for continuation in continuations]

    def _text(self, tokens: list[int], stops: Sequence[str]) -> str:
        """Decodes up to the first stop string; that may be a special token, which has no text."""
        decode = self.model.tokenizer.decode

        def is_over(length: int) -> bool:
            written = decode(tokens[:length], skip_special_tokens=False)
            return any(stop in written for stop in stops)

        length = 1 + bisect.bisect_left(range(1, len(tokens)), True, key=is_over)
        return postprocess_generated_text(decode(tokens[:length]), list(stops), None)


register_model("opt_deus_jax")(OptDeusModel)
