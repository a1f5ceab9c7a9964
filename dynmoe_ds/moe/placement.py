"""Placement: which slot holds which expert. Ids are permanent and never used again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from dynmoe_ds.errors import PlacementError


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """expert_ids: one entry per slot of the pool, None for a free slot. next_id: the id of the next expert to be born.

    Slots [r·S/EP, (r+1)·S/EP) are on rank r of an expert-parallel group of `ep_size` ranks.
    """

    expert_ids: tuple[int | None, ...]
    next_id: int
    ep_size: int

    @classmethod
    def initial(cls, num_experts: int, num_slots: int, ep_size: int) -> Placement:
        """Experts 0 … K−1 spread evenly over the pool: slot ⌊e·S/K⌋ holds expert e.

        So every layout starts with equal numbers of experts per rank, and all layouts with the same slots.
        """
        ids: list[int | None] = [None] * num_slots
        for expert_id in range(num_experts):
            ids[expert_id * num_slots // num_experts] = expert_id
        return cls(expert_ids=tuple(ids), next_id=num_experts, ep_size=ep_size)

    @property
    def num_slots(self) -> int:
        return len(self.expert_ids)

    @property
    def slots_by_id(self) -> dict[int, int]:
        """Slot of every live expert, by id in ascending order."""
        return dict(sorted((id_, slot) for slot, id_ in enumerate(self.expert_ids) if id_ is not None))

    @property
    def live_ids(self) -> tuple[int, ...]:
        """Ids of the live experts, ascending."""
        return tuple(self.slots_by_id)

    @property
    def free_slots(self) -> tuple[int, ...]:
        return tuple(slot for slot, id_ in enumerate(self.expert_ids) if id_ is None)

    def slot_of(self, expert_id: int) -> int:
        """Raises: PlacementError if the expert is not live."""
        if expert_id not in self.slots_by_id:
            raise PlacementError(f"Expert {expert_id} is not live. Live experts: {_listed(self.live_ids)}.")
        return self.slots_by_id[expert_id]

    def rank_of(self, slot: int) -> int:
        """Rank within the expert-parallel group that holds a slot."""
        return slot // (self.num_slots // self.ep_size)

    def least_loaded_free_slot(self, load_by_slot: Mapping[int, int]) -> int | None:
        """A free slot on the rank with the fewest live experts, then the smallest load, then the lowest number.

        load_by_slot: tokens per live slot. None when the pool is full.
        """

        def cost(slot: int) -> tuple[int, int, int]:
            live = [s for s in self.slots_by_id.values() if self.rank_of(s) == self.rank_of(slot)]
            return len(live), sum(load_by_slot.get(s, 0) for s in live), slot

        return min(self.free_slots, key=cost, default=None)

    def with_new_expert(self, slot: int) -> Placement:
        """A new expert, with the next id, in a slot. Raises: PlacementError if it is taken or does not exist."""
        self._check_free(slot)
        return replace(self._with(slot, self.next_id), next_id=self.next_id + 1)

    def without(self, expert_id: int) -> Placement:
        """The slot of an expert set free. Raises: PlacementError if it is not live or the last one."""
        slot = self.slot_of(expert_id)
        if len(self.live_ids) == 1:
            raise PlacementError(f"Expert {expert_id} is the last live expert and cannot be pruned.")
        return self._with(slot, None)

    def moved(self, expert_id: int, to_slot: int) -> Placement:
        """An expert in another, free slot. Raises: PlacementError if it is not live or the slot is not free."""
        from_slot = self.slot_of(expert_id)
        self._check_free(to_slot)
        return self._with(to_slot, expert_id)._with(from_slot, None)

    def only(self, expert_ids: Collection[int]) -> Placement:
        """These experts in their slots, and nobody else."""
        return replace(self, expert_ids=tuple(id_ if id_ in expert_ids else None for id_ in self.expert_ids))

    def resized(self, num_slots: int) -> Placement:
        """The same experts in the same order in a pool of another size: on the ranks they are on, as far as they fit.

        A rank's experts are spread evenly over its slots. The last of a rank that has too many go to the one with the
        fewest.

        Raises: PlacementError if they do not fit, or if the ranks cannot share so many slots.
        """
        live = [id_ for id_ in self.expert_ids if id_ is not None]
        if num_slots < len(live):
            raise PlacementError(f"A pool of {num_slots} slots cannot hold the {len(live)} live experts.")
        if num_slots % self.ep_size:
            raise PlacementError(f"A pool of {num_slots} slots cannot be shared evenly by {self.ep_size} ranks.")
        if num_slots == self.num_slots:
            return self
        capacity = num_slots // self.ep_size
        of_ranks: list[list[int]] = [[] for _ in range(self.ep_size)]
        for expert_id, slot in sorted(self.slots_by_id.items(), key=lambda item: item[1]):
            of_ranks[slot * self.ep_size // self.num_slots].append(expert_id)
        for of_rank in of_ranks:
            while len(of_rank) > capacity:
                min(of_ranks, key=len).append(of_rank.pop())
        ids: list[int | None] = [None] * num_slots
        for rank, of_rank in enumerate(of_ranks):
            for index, expert_id in enumerate(of_rank):
                ids[rank * capacity + index * capacity // len(of_rank)] = expert_id
        return replace(self, expert_ids=tuple(ids))

    def exchanged(self, expert_id: int, to_slot: int, other_id: int) -> Placement:
        """An expert in the slot `to_slot` of another one, `other_id`, which takes its place.

        Raises: PlacementError if one of them is not live, they are the same, or the other does not hold that slot.
        """
        from_slot, held = self.slot_of(expert_id), self.slot_of(other_id)
        if expert_id == other_id:
            raise PlacementError(f"Expert {expert_id} cannot be exchanged with itself. Name another live expert.")
        if held != to_slot:
            raise PlacementError(
                f"Expert {expert_id} cannot be exchanged with expert {other_id} in slot {to_slot}, since expert "
                f"{other_id} is in slot {held}. Name the expert that holds the slot, or none if it is free."
            )
        return self._with(to_slot, expert_id)._with(from_slot, other_id)

    def _with(self, slot: int, expert_id: int | None) -> Placement:
        return replace(self, expert_ids=(*self.expert_ids[:slot], expert_id, *self.expert_ids[slot + 1 :]))

    def _check_free(self, slot: int) -> None:
        if not 0 <= slot < self.num_slots:
            raise PlacementError(f"Slot {slot} does not exist: the pool has slots 0 to {self.num_slots - 1}.")
        if self.expert_ids[slot] is not None:
            raise PlacementError(
                f"Slot {slot} holds expert {self.expert_ids[slot]}. Free slots: {_listed(self.free_slots)}."
            )


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers)) or "none"
