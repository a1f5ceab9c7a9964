"""`dynmoe inspect` and `dynmoe diff`: what is in a checkpoint, and in what two differ."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_EXAMPLES = """examples:
  dynmoe inspect runs/demo/checkpoints                   the latest checkpoint of a run
  dynmoe inspect runs/demo/checkpoints/step-00000100 --json
"""
_DIFF_EXAMPLES = """examples:
  dynmoe diff runs/a/checkpoints runs/b/checkpoints      the latest of two runs

exit codes:
  0  equal      1  different      2  a checkpoint that cannot be read
"""


def add_verb(verbs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both verbs to the command's parser."""
    parser = verbs.add_parser(
        "inspect",
        help="show what is in a checkpoint",
        description="Show the experts of every layer of a checkpoint with their births, deaths and loads, its sizes, "
        "and the layout it was written with. All files are checked against their checksums.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a folder of them: then the latest")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_inspect)
    parser = verbs.add_parser(
        "diff",
        help="compare two checkpoints",
        description="List the parameters, experts and moments in which two checkpoints differ. Ranks, slots and ZeRO "
        "stages do not matter.",
        epilog=_DIFF_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("first", type=Path, help="a checkpoint, or a folder of them: then the latest")
    parser.add_argument("second", type=Path, help="the other one")
    parser.set_defaults(run=run_diff)


def run_inspect(arguments: argparse.Namespace) -> int:
    """Print what is in a checkpoint. Raises: CheckpointError for one that is missing or damaged."""
    described = _describe(arguments.checkpoint)
    print(json.dumps(described, indent=2) if arguments.json else _in_words(described))
    return 0


def run_diff(arguments: argparse.Namespace) -> int:
    """Print the differences of two checkpoints; 1 if there are any.

    Raises: CheckpointError for one that is missing or damaged.
    """
    from dynmoe_ds.checkpoint.compare import differences
    from dynmoe_ds.checkpoint.store import find_checkpoint, open_checkpoint

    first, second = (open_checkpoint(find_checkpoint(path)) for path in (arguments.first, arguments.second))
    print(f"{first.path}: step {first.step}\n{second.path}: step {second.step}")
    found = 0
    for difference in differences(first, second):
        found += 1
        greatest = "" if difference.greatest is None else f", by up to {difference.greatest:.3g}"
        print(f"  {difference.name}: {difference.what}{greatest}")
    print(f"{found} of {len(first.sizes.keys() | second.sizes.keys())} entries differ." if found else "equal")
    return 1 if found else 0


def _describe(path: Path) -> dict[str, Any]:
    from dynmoe_ds.checkpoint.store import find_checkpoint, open_checkpoint

    checkpoint = open_checkpoint(find_checkpoint(path))
    manifest = checkpoint.manifest
    return {
        "path": str(checkpoint.path),
        "step": checkpoint.step,
        "layout": manifest["layout"],
        "optimizer": manifest["optimizer"],
        "entries": len(checkpoint.sizes),
        "bytes": sum(file["bytes"] for file in manifest["files"].values()),
        "layers": {
            name: {
                "num_slots": len(layer["expert_ids"]),
                "ep_size": layer["ep_size"],
                "router": layer["router"],
                "slots": layer["expert_ids"],
                "experts": layer["experts"],
            }
            for name, layer in manifest["layers"].items()
        },
    }


def _in_words(described: dict[str, Any]) -> str:
    layout = described["layout"]
    lines = [
        f"{described['path']}: step {described['step']}, {described['bytes'] / 1e6:.1f} MB in "
        f"{described['entries']} entries, {described['optimizer']}",
        f"written by {layout['world_size']} ranks at ZeRO-{layout['zero_stage']} in {layout['dtype']}",
    ]
    for name, layer in described["layers"].items():
        live = [expert for expert in layer["experts"].values() if expert["died"] is None]
        lines += [
            "",
            f"{name}: {len(live)} experts in {layer['num_slots']} slots over {layer['ep_size']} ranks, "
            f"{layer['router']}",
            "  expert  slot  born  died  tokens of the last step",
        ]
        slots = {expert_id: slot for slot, expert_id in enumerate(layer["slots"]) if expert_id is not None}
        for expert_id, expert in layer["experts"].items():
            slot, died, load = (
                "–" if value is None else value
                for value in (slots.get(int(expert_id)), expert["died"], expert["last_load"])
            )
            lines.append(f"  {expert_id:>6}  {slot:>4}  {expert['born']:>4}  {died:>4}  {load:>6}")
    return "\n".join(lines)
