"""The adaptations of an engine: when one is due, what it decides, how the pools follow, and what is told of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from dynmoe_ds.adaptation import (
    AdaptationConfig,
    AdaptationController,
    AdaptationEvent,
    ExpertLives,
    RecordingWindow,
    describe,
    operate,
    sizes_to_grow,
    sizes_to_shrink,
)
from dynmoe_ds.distributed import attempt_together
from dynmoe_ds.engine.masters import EngineMasters
from dynmoe_ds.engine.record_book import RecordBook, Records
from dynmoe_ds.moe import MoELayer, Placement, TokenSampler, per_slot_statistics

_log = logging.getLogger(__name__)

TOKENS_PER_SAMPLE = 4096
"""Tokens per layer, over all ranks, by which experts are split: about a hundred of each of some tens of experts."""


class EngineAdaptation:
    """Adapts the layers of one engine from its records; without a `config` it never does.

    records: the book that the engine keeps. sampler: the tokens that experts are split by. lives: births and deaths of
    all experts. events: of the adaptations that nobody has taken notice of. layers_known_full: those about which a
    warning was given.
    """

    def __init__(self, config: AdaptationConfig | None, layers: Mapping[str, MoELayer], num_kinds: int) -> None:
        self.config, self._layers = config, layers
        self.controller = AdaptationController(config) if config else None
        self.records = RecordBook(
            layers,
            RecordingWindow(config) if config else None,
            num_kinds,
            with_strain=self.controller is not None and self.controller.rule.needs_strain,
        )
        self.sampler = TokenSampler(-(-TOKENS_PER_SAMPLE // dist.get_world_size()))
        self.lives = ExpertLives(self._placements())
        self.events: list[AdaptationEvent] = []
        self.layers_known_full: set[str] = set()

    def is_due(self, step: int) -> bool:
        """Whether an adaptation follows optimiser step `step`."""
        return self.records.window is not None and self.records.window.is_due(step)

    def wanted_of(self, step: int) -> dict[str, Any]:
        """What a `StepLedger` must note of optimiser step `step` for the rule, besides records."""
        window, controller = self.records.window, self.controller
        if window is None or controller is None or not controller.may_grow(window.end(step)):
            return {}
        return {
            "with_strain": controller.rule.needs_strain and window.covers(step),
            "sampler": self.sampler if controller.rule.needs_sample and window.is_due(step) else None,
        }

    def adapt(
        self, step: int, masters: Callable[[], EngineMasters], resize: Callable[[Mapping[str, int]], None]
    ) -> None:
        """Decide on the window's records of all ranks, compare, operate, note.

        masters: those of the engine as it is, which `resize` replaces. resize: `Engine.resize_slots`.
        Collective: every rank.
        """
        assert self.records.window is not None and self.controller is not None and self.config is not None
        sizes_before, is_elastic = self._sizes(), self.config.pool == "elastic"
        records = self.records.reduce(self.records.window.take())
        self.records.close()
        if is_elastic:
            records = self._grow_pools(self.controller, records, step, resize)
        before, controller = self._placements(), self.controller
        plan, full = attempt_together(lambda: controller.decide(records, before, **self._circumstances(step)))
        sampler = self.sampler if controller.rule.needs_sample else None
        plan = operate(plan, self._layers, masters(), self.config, sampler)
        self.sampler.clear()
        after = self._placements()
        self.lives.note(step, after)
        if is_elastic:
            resize(sizes_to_shrink(after))
        event = describe(
            plan,
            step=step,
            window_steps=self.config.window_steps,
            rule=self.config.rule,
            records=records,
            before=before,
            after=after,
            full=full,
            num_slots={name: (sizes_before[name], size) for name, size in self._sizes().items()},
        )
        self.events.append(event)
        self._warn_of(full, step)

    def _grow_pools(
        self,
        controller: AdaptationController,
        records: Records,
        step: int,
        resize: Callable[[Mapping[str, int]], None],
    ) -> Records:
        """Make room for the experts that will be wanted; the records by the slots there are then."""
        before = self._placements()
        per_slot = {name: per_slot_statistics(layer) for name, layer in self._layers.items()}
        sizes = attempt_together(
            lambda: sizes_to_grow(controller, records, before, per_slot, **self._circumstances(step))
        )
        resize(sizes)
        for name in sizes:
            self.sampler.renumber(self._layers[name], before[name])
        return self.records.renumbered(records, before)

    def _circumstances(self, step: int) -> dict[str, Any]:
        """What a decision depends on besides records and placements."""
        return {
            "step": step,
            "min_experts": {name: layer.router.config.min_experts for name, layer in self._layers.items()},
        }

    def _warn_of(self, full: frozenset[str], step: int) -> None:
        """Warn of layers that wanted an expert and had no slot, once of each."""
        assert self.config is not None
        if full - self.layers_known_full and dist.get_rank() == 0:
            is_elastic = self.config.pool == "elastic"
            _log.warning(
                "Step %d: %s wanted a new expert but has no free slot. %s, or prune more.",
                step,
                ", ".join(sorted(full - self.layers_known_full)),
                "Raise adaptation.max_slots" if is_elastic else "Use more num_slots or adaptation.pool=elastic",
            )
        self.layers_known_full |= full

    def _placements(self) -> dict[str, Placement]:
        return {name: layer.placement for name, layer in self._layers.items()}

    def _sizes(self) -> dict[str, int]:
        return {name: layer.num_slots for name, layer in self._layers.items()}
