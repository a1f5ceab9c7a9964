"""A model of this project as lm-evaluation-harness wants one. Importing it needs the extra `eval`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch import Tensor
from tqdm import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

from dynmoe_ds.errors import ConfigError, DataError
from dynmoe_ds.harness.model_folder import load_model_folder
from dynmoe_ds.models import count_flops, count_parameters
from dynmoe_ds.moe import StepLedger, labelled, moe_layers
from dynmoe_ds.routing import RoutingRecords

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What the tokens of a task cost on average.

    num_tokens: all that the model computed, prompts too; neither padding nor what follows the end of a text.
    mean_k_per_layer: experts per token; mean_k is the mean over layers, None for a model without experts.
    """

    num_tokens: int
    mean_k: float | None
    mean_k_per_layer: dict[str, float]
    active_parameters: float
    forward_flops_per_token: float


@register_model("dynmoe")
class HarnessModel(HFLM):
    """The model in a folder, which notes what the tokens of every task cost.

    It says what the harness's own `hf` model would, but masks padding, which is then neither routed nor counted. A text
    that has come to its end counts no further while others of its batch go on; and probabilities are float32.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: str | Path | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
    ) -> None:
        """
        path: the folder of a run, of `dynmoe export`, of `dm.save_model`, or of any causal language model of Hugging
        Face. tokenizer: its folder, where `path` has none. device: None takes the accelerator if there is one.
        max_length, add_bos_token: as for HFLM; None follows the model and its tokenizer.

        Raises: ConfigError for batch sizes other than a number; as `load_model_folder`.
        """
        if not str(batch_size).isdecimal() or int(batch_size) < 1 or max_batch_size is not None:
            given = batch_size if max_batch_size is None else f"{batch_size} with max_batch_size {max_batch_size}"
            raise ConfigError(f"batch_size is {given} but must be one number, 1 or more. It is not searched for.")
        model, own = load_model_folder(Path(path), None if tokenizer is None else Path(tokenizer), device)
        with _without_warnings(HFLM.__module__):  # that a model comes ready made, and what else one should not do then
            super().__init__(
                pretrained=model,
                backend="causal",
                tokenizer=own,
                batch_size=int(batch_size),
                max_length=max_length,
                add_bos_token=add_bos_token,
            )
        self._layers = list(moe_layers(model))
        self._parameters = count_parameters(model, ep_size=1)
        self._records: dict[str, dict[str, RoutingRecords]] = {}  # by task and layer
        self._lengths: dict[str, list[int]] = {}  # tokens of every text that was computed, by task
        self._task = ""  # whose requests are being answered

    def cost(self, tasks: Sequence[str]) -> Cost:
        """What the tokens of these tasks together have cost until now."""
        lengths = [length for task in tasks for length in self._lengths.get(task, [])]
        records: dict[str, RoutingRecords] = {}
        for task in tasks:
            records = _added(records, self._records.get(task, {}))
        per_layer = {layer: record.mean_k for layer, record in records.items()}
        mean_k = dict.fromkeys(self._layers, 0.0) | per_layer  # layers of a vision tower see nothing of a text
        # An average token stands in a longer text than the average one: long texts have more tokens.
        around = round(sum(length**2 for length in lengths) / max(sum(lengths), 1))
        return Cost(
            num_tokens=sum(lengths),
            mean_k=sum(per_layer.values()) / len(per_layer) if per_layer else None,
            mean_k_per_layer=per_layer,
            active_parameters=self._parameters.active_per_token(mean_k),
            forward_flops_per_token=count_flops(self.model, max(around, 1)).forward(mean_k),
        )

    @property
    def max_gen_toks(self) -> int:
        """Tokens to write where a task does not say it: the harness's number, or half of what a small model takes."""
        return min(super().max_gen_toks, self.max_length // 2)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        answer = super().loglikelihood
        return self._by_task(requests, lambda some: answer(some, disable_tqdm=disable_tqdm))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        answer = super().loglikelihood_rolling
        return self._by_task(requests, lambda some: answer(some, disable_tqdm=disable_tqdm))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Raises: ConfigError for a task that lets the model write more than it takes, or search with beams."""
        for request in requests:
            options = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            if options["max_gen_toks"] >= self.max_length:
                raise ConfigError(
                    f"The task {request.task_name} lets a model write {options['max_gen_toks']} tokens, but this one "
                    f"takes {self.max_length}, prompt included. Leave it out, or write one with a smaller max_gen_toks."
                )
            if (num_beams := options.get("num_beams", 1)) > 1:
                raise ConfigError(
                    f"The task {request.task_name} searches with {num_beams} beams, whose tokens are not counted "
                    "apart. Leave it out, or write one with num_beams: 1."
                )
        answer = super().generate_until
        return self._by_task(requests, lambda some: answer(some, disable_tqdm=disable_tqdm))

    def get_model_info(self) -> dict[str, Any]:
        """As HFLM's, and what every task cost: the harness writes it to the `config` of its results."""
        return super().get_model_info() | {"cost_per_task": {task: asdict(self.cost([task])) for task in self._lengths}}

    def _by_task(self, requests: list[Any], answer: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """The answers to all requests, in their order; what those of a task cost is added to it."""
        answers: list[Any] = [None] * len(requests)
        places: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault(str(request.task_name), []).append(place)
        for task, of_task in places.items():
            self._task = task
            self._lengths.setdefault(task, [])
            with StepLedger(evaluation=True) as ledger:
                found = answer([requests[place] for place in of_task])
            self._records[task] = _added(self._records.get(task, {}), ledger.records())
            for place, one in zip(of_task, found, strict=True):
                answers[place] = one
        return answers

    @torch.no_grad()
    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Of each (name, context, continuation): log-probability, and whether greedy decoding would write it.

        HFLM's pads with token 0 and without a mask. As there, requests whose tokens but for the last are the same, such
        as answers of one token to a question, are computed once. Raises: DataError for a continuation that is too long.
        """
        asked: dict[tuple[int, ...], list[int]] = {}
        num_cut = 0
        for index, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise DataError(
                    f"The task {self._task} has an answer of {len(continuation)} tokens, but the model takes "
                    f"{self.max_length}. Leave the task out."
                )
            num_cut += len(context) + len(continuation) > self.max_length + 1
            asked.setdefault(tuple((context + continuation)[-(self.max_length + 1) : -1]), []).append(index)
        if num_cut:
            _log.warning(
                "%d of %d texts of the task %s are longer than the model's %d tokens: their beginnings are cut off",
                num_cut, len(requests), self._task, self.max_length,
            )  # fmt: skip
        rows = sorted(asked, key=len, reverse=True)
        self._lengths[self._task] += map(len, rows)
        answers: list[Any] = [None] * len(requests)
        size = override_bs or self.batch_size
        for first in tqdm(range(0, len(rows), size), desc=self._task, disable=disable_tqdm or override_bs is not None):
            batch = rows[first : first + size]
            lengths = torch.tensor([len(row) for row in batch], device=self.device)
            ids = torch.zeros(len(batch), len(batch[0]), dtype=torch.int64)
            for at, row in enumerate(batch):
                ids[at, : len(row)] = torch.tensor(row)
            mask = torch.arange(len(batch[0]), device=self.device) < lengths[:, None]
            logits = self.model(input_ids=ids.to(self.device), attention_mask=mask.long()).logits
            for at, row in enumerate(batch):
                for index in asked[row]:
                    name, _, continuation = requests[index]
                    answers[index] = _scored(logits[at, len(row) - len(continuation) : len(row)], continuation)
                    if name is not None:  # None in windows of a long text, whose sum is kept instead
                        self.cache_hook.add_partial("loglikelihood", name, answers[index])
        return answers

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """As HFLM's, but every text of the batch stops for itself, and counts until then."""
        ends = _Ends(
            stop_sequences_criteria(self.tokenizer, stop, context.shape[1], context.shape[0]),
            self.model.generation_config.eos_token_id,
            options["attention_mask"].sum(1),
            max_length,
        )
        if not options.get("do_sample"):
            options.pop("temperature", None)
        with labelled(is_counted=ends.is_counted):
            written: Tensor = self.model.generate(
                input_ids=context,
                max_length=max_length,
                stopping_criteria=StoppingCriteriaList([ends]),
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
                **options,
            )
        self._lengths[self._task] += ends.lengths.tolist()
        return written


class _Ends(StoppingCriteria):
    """Which texts of a batch have come to their end: by one of the harness's criteria, or by a token.

    lengths [B]: the tokens that were computed for each, the prompt's before the first call. is_counted [B]: which go
    on; changed in place, so that the ledger sees it in the next forward pass.
    """

    def __init__(self, stops: Any, end_ids: int | list[int] | None, lengths: Tensor, max_length: int) -> None:
        self._stops, self._max_length = list(stops), max_length
        self._end_ids = (
            torch.tensor([] if end_ids is None else end_ids, dtype=torch.int64).reshape(-1).to(lengths.device)
        )
        self.lengths = lengths.clone()
        self.is_counted = torch.ones_like(lengths, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        for stop in self._stops:
            stop(input_ids, scores)
        found = [any(flags) for flags in zip(*(stop.done_tracker for stop in self._stops), strict=True)]
        ended = torch.tensor(found, device=input_ids.device) | torch.isin(input_ids[:, -1], self._end_ids)
        self.is_counted &= ~ended
        if input_ids.shape[1] < self._max_length:  # else nothing follows
            self.lengths += self.is_counted
        return ended


def _scored(logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Log-probability of the tokens of a continuation, given logits [its length, V]; whether each is the likeliest."""
    tokens = torch.tensor(continuation, device=logits.device)
    log_probabilities = logits.float().log_softmax(-1)
    total = log_probabilities.gather(1, tokens[:, None]).sum()
    return float(total), bool((logits.argmax(-1) == tokens).all())


@contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _added(one: dict[str, RoutingRecords], other: dict[str, RoutingRecords]) -> dict[str, RoutingRecords]:
    return one | {layer: one[layer] + record if layer in one else record for layer, record in other.items()}
