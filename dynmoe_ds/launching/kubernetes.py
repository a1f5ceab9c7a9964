"""Kubernetes."""

from __future__ import annotations

from dynmoe_ds.launching.config import KubernetesConfig
from dynmoe_ds.launching.runs import Runs


def render(launch: KubernetesConfig, runs: Runs) -> str:
    raise NotImplementedError


def submit(launch: KubernetesConfig, runs: Runs) -> str:
    raise NotImplementedError
