"""Upcycling: feed-forward networks of a dense model become MoELayers whose experts are copies of them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from dynmoe_ds.distributed import current_layout
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.experts import build_experts, seeded_generator
from dynmoe_ds.moe.layer import MoELayer, layer_faults
from dynmoe_ds.moe.seeds import layer_seed
from dynmoe_ds.routing import RouterConfig

M = TypeVar("M", bound=nn.Module)

NAMED_LAYERS = ("all", "even", "odd", "first_half", "second_half")


def upcycle(
    model: M,
    layers: str | Sequence[int] = "even",
    num_experts: int = 4,
    num_slots: int = 8,
    router: str | RouterConfig = "top_any",
    ep_size: int = 1,
    seed: int | None = None,
    noise: float = 0.0,
    parts: int = 1,
) -> M:
    """`model` itself, with the FFNs of some layers replaced by MoELayers whose experts are copies of the FFN.

        model = dm.upcycle(model, layers=[-2, -1], num_experts=4, num_slots=8)

    Without noise, and with routing weights that sum to 1 for every token, the model computes what it computed before.
    It takes gated FFNs without biases (of Llama, Mistral, Qwen2, Qwen3, StableLM, Gemma, OLMo2, LFM2, and with gate and
    up in one linear of Phi-3, GLM and ModernBERT) and two linears with biases (of ViT, CLIP, SigLIP, DINOv3, Phi,
    GPT-NeoX, GPT-J, CodeGen, Starcoder2, GPT-Neo, GPTBigCode, DistilBERT and BERT, whose dropout, residual and norm
    stay), with any activation that experts have; each is compared with an expert on random input before anything is
    changed. Weights, biases, dtype, device and `requires_grad` are kept.

    layers: `even` (0, 2, 4, ...), `odd`, `first_half`, `second_half` (the larger one of an odd number), `all`, or
    indices; layers count from 0, and negative indices from the end.
    num_experts, num_slots, router, ep_size: as in `MoELayer`. seed: gate rows and noise are a function of it, of the
    layer and of the expert's id, whatever the layout; None draws one from torch's default generator. noise: standard
    deviation of the noise on every copy, as a fraction of the standard deviation of the copied tensor. parts: finer
    experts, of a copy's hidden units cut into so many parts of neighbours: expert e has part e modulo `parts`, its
    output `parts` times as large, so that equal weights on all parts give the FFN's output; a token should choose at
    least as many experts.

    Raises: ConfigError for a model without such FFNs or that has MoELayers already, a layer that does not exist, an FFN
    that computes something else than an expert can, or sizes that cannot work. The model is unchanged then.
    Source: sparse upcycling, arXiv 2212.05055.
    """
    faults = layer_faults(num_experts=num_experts, num_slots=num_slots, ep_size=ep_size)
    if noise < 0:
        faults.append(f"noise is {noise} but must not be negative.")
    if parts < 1 or num_experts % parts:
        faults.append(f"parts is {parts} but must be at least 1 and divide num_experts ({num_experts}).")
    if faults:
        raise ConfigError(faults)
    current_layout(ep_size)  # raises if the ranks do not fit
    found = find_ffns(model)
    chosen = [found[index] for index in _indices(layers, sorted(found))]
    if parts > 1 and (uneven := [ffn for ffn in chosen if ffn.ffn_hidden_size % parts]):
        raise ConfigError(
            f"parts is {parts} but must divide the hidden units of {uneven[0].path}, {uneven[0].ffn_hidden_size}."
        )
    kinds = expert_kinds(chosen)
    seed = int(torch.randint(2**62, ()).item()) if seed is None else seed
    for ffn, kind in zip(chosen, kinds, strict=True):
        layer = MoELayer(
            hidden_size=ffn.hidden_size,
            ffn_hidden_size=ffn.ffn_hidden_size // parts,
            num_experts=num_experts,
            num_slots=num_slots,
            ep_size=ep_size,
            router=router,
            expert=kind,
            seed=layer_seed(seed, ffn.index),
        )
        weight = ffn.linear("1").weight
        _fill(layer.to(device=weight.device, dtype=weight.dtype), ffn, noise, parts)
        model.set_submodule(_join(ffn.path, ffn.form.entry), layer.train(model.training))
        if ffn.form.exit is not None:
            model.set_submodule(_join(ffn.path, ffn.form.exit), nn.Identity())
    return model


@dataclass(frozen=True, kw_only=True, slots=True)
class _Form:
    """How a family of models writes its FFN, in paths below one module of every layer.

    experts: the kinds of expert that may compute the same; they differ in their activation. linears: the `nn.Linear`
    that holds the expert's `w1` and `b1`, and so on, by number; one with two numbers holds the units of the first, then
    those of the second. entry: the module whose place the MoELayer takes; it holds nothing but these linears and an
    activation. exit: the linear behind it, if it lies outside of the entry.
    """

    experts: tuple[str, ...]
    linears: Mapping[str, str]
    entry: str = ""
    exit: str | None = None

    @property
    def is_fused(self) -> bool:
        """Whether one linear holds two tensors of an expert."""
        return len(set(self.linears.values())) < len(self.linears)


# Of an FFN in a layer; only for what an error says.
_USUAL_NAMES = ("mlp", "ffn", "ff", "feed_forward", "feedforward", "block_sparse_moe")

_GATED = ("swiglu", "geglu_tanh", "geglu")
_TWO_LAYER = ("gelu", "gelu_tanh", "quick_gelu")
_FORMS = (
    _Form(experts=_GATED, linears={"1": "gate_proj", "3": "up_proj", "2": "down_proj"}),
    _Form(experts=_GATED, linears={"1": "w1", "3": "w3", "2": "w2"}),
    _Form(experts=_GATED, linears={"1": "gate_up_proj", "3": "gate_up_proj", "2": "down_proj"}),
    _Form(experts=_GATED, linears={"1": "Wi", "3": "Wi", "2": "Wo"}),
    _Form(experts=_TWO_LAYER, linears={"1": "fc1", "2": "fc2"}),
    _Form(experts=_TWO_LAYER, linears={"1": "dense_h_to_4h", "2": "dense_4h_to_h"}),
    _Form(experts=_TWO_LAYER, linears={"1": "fc_in", "2": "fc_out"}),
    _Form(experts=_TWO_LAYER, linears={"1": "c_fc", "2": "c_proj"}),
    _Form(experts=_TWO_LAYER, linears={"1": "up_proj", "2": "down_proj"}),
    _Form(experts=_TWO_LAYER, linears={"1": "lin1", "2": "lin2"}),
    _Form(
        experts=_TWO_LAYER,
        linears={"1": "intermediate.dense", "2": "output.dense"},
        entry="intermediate",
        exit="output.dense",
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FFN:
    """An FFN of a model: `block` is its module at `path`, in the layer `index`."""

    form: _Form
    block: nn.Module
    path: str
    index: int

    def linear(self, number: str) -> nn.Linear:
        linear = self.block.get_submodule(self.form.linears[number])
        assert isinstance(linear, nn.Linear), linear
        return linear

    @property
    def hidden_size(self) -> int:
        return self.linear("1").in_features

    @property
    def ffn_hidden_size(self) -> int:
        return self.linear("2").in_features

    def modules(self) -> list[nn.Module]:
        """What is called, one after the other."""
        names = [self.form.entry] if self.form.exit is None else [self.form.entry, self.form.exit]
        return [self.block.get_submodule(name) for name in names]

    def parameters(self) -> dict[str, Tensor]:
        """The FFN's parameters, or halves of them, under the names that an expert has for them."""
        found: dict[str, Tensor] = {}
        for number, path in self.form.linears.items():
            linear = self.linear(number)
            sharing = [other for other, of in self.form.linears.items() if of == path]
            for letter, tensor in (("w", linear.weight), ("b", linear.bias)):
                if tensor is not None:
                    found[letter + number] = tensor.chunk(len(sharing))[sharing.index(number)]
        return found


def find_ffns(model: nn.Module) -> dict[int, FFN]:
    """The FFNs of the model by layer.

    Raises: ConfigError if there are none, with what is there instead, or in more than one place, or if the model was
    upcycled before.
    """
    if present := [name for name, module in model.named_modules() if isinstance(module, MoELayer)]:
        raise ConfigError(
            f"The model has MoELayers already: {', '.join(present)}. Upcycle a dense model, all its layers in one call."
        )
    by_place: dict[str, dict[int, FFN]] = {}
    for path, block in model.named_modules():
        form = next((form for form in _FORMS if _has_form(block, form)), None)
        parts = path.split(".")
        position = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if form is not None and position is not None:
            place = ".".join([*parts[:position], "*", *parts[position + 1 :]])
            index = int(parts[position])
            by_place.setdefault(place, {})[index] = FFN(form=form, block=block, path=path, index=index)
    if not by_place:
        known = "; ".join(", ".join(dict.fromkeys(form.linears.values())) for form in _FORMS)
        raise ConfigError(
            f"{type(model).__name__} has no feed-forward network of a known form in numbered layers. Known are "
            f"{known}, each an nn.Linear. Found: {_found_instead(model)}."
        )
    if len(by_place) > 1:
        raise ConfigError(
            f"{type(model).__name__} has feed-forward networks in several places: {', '.join(by_place)}. Upcycle the "
            "part of the model that holds one of them, for example upcycle(model.get_submodule('...'))."
        )
    return next(iter(by_place.values()))


def _found_instead(model: nn.Module) -> str:
    """What is called as FFNs usually are in numbered layers, or else what these layers hold."""
    place_of: dict[str, str] = {}
    for path, module in model.named_modules():
        parts = path.split(".")
        if any(part.isdigit() for part in parts) and any(True for _ in module.children()):
            place = ".".join("*" if part.isdigit() else part for part in parts)
            children = ", ".join(f"{name} ({type(child).__name__})" for name, child in module.named_children())
            place_of[f"{place} ({type(module).__name__}) with {children}"] = place
    usual = [text for text, place in place_of.items() if place.rpartition(".")[2] in _USUAL_NAMES]
    layers = [text for text, place in place_of.items() if place.endswith("*")]
    return "; ".join(usual or layers) or "no numbered layers with modules in them"


def _has_form(block: nn.Module, form: _Form) -> bool:
    """Whether the linears are there and fit together, and the modules that would go hold no other parameters."""
    linears: dict[str, nn.Linear] = {}
    try:
        entry = block.get_submodule(form.entry)
        for number, path in form.linears.items():
            linear = block.get_submodule(path)
            if type(linear) is not nn.Linear:
                return False
            linears[number] = linear
    except AttributeError:
        return False
    last = linears.pop("2")
    first = list(linears.values())
    for linear in first:
        if linear.in_features != last.out_features or linear.out_features != first.count(linear) * last.in_features:
            return False
    known = {id(parameter) for linear in (*first, last) for parameter in linear.parameters()}
    return {id(parameter) for parameter in entry.parameters()} <= known


def _indices(layers: str | Sequence[int], present: list[int]) -> list[int]:
    """The chosen layers in ascending order. Raises: ConfigError for a word or an index that names none."""
    last = present[-1]
    if isinstance(layers, str):
        if layers not in NAMED_LAYERS:
            raise ConfigError(f"layers is {layers!r}. Use {', '.join(NAMED_LAYERS)} or a list of indices.")
        half = len(present) // 2
        chosen = {
            "all": present,
            "even": [index for index in present if index % 2 == 0],
            "odd": [index for index in present if index % 2 == 1],
            "first_half": present[:half],
            "second_half": present[half:],
        }[layers]
    else:
        chosen = [index + last + 1 if index < 0 else index for index in layers]
        if wrong := [given for given, index in zip(layers, chosen, strict=True) if index not in present]:
            raise ConfigError(
                f"layers names {_listed(wrong)}, but the layers with a feed-forward network are {_listed(present)} "
                f"(or -1 for {last}, and so on)."
            )
    if not chosen or len(set(chosen)) < len(chosen):
        raise ConfigError(f"layers is {layers!r}, which is {'no layer' if not chosen else 'a layer twice'}.")
    return sorted(chosen)


def expert_kinds(ffns: list[FFN]) -> list[str]:
    """The kind of expert that computes what each FFN does. Raises: ConfigError with every FFN that none would."""
    kinds, faults = [], []
    for ffn in ffns:
        if found := _form_faults(ffn):
            faults += found
        elif (kind := _expert_kind(ffn, training=True)) is not None:
            kinds.append(kind)
        elif _expert_kind(ffn, training=False) is not None:
            faults.append(
                f"{ffn.path} has dropout ({_beside_linears(ffn)}), and experts have none. Set its probability to 0, in "
                "the model's configuration or when it is loaded."
            )
        else:
            faults.append(_unlike_any_expert(ffn))
    if faults:
        raise ConfigError(faults)
    return kinds


def _form_faults(ffn: FFN) -> list[str]:
    """Whether the FFN feeds tokens in chunks, needs more than tokens, or has or lacks biases unlike experts."""
    if getattr(ffn.block, "chunk_size_feed_forward", 0) > 0:
        return [f"{ffn.path} feeds tokens in chunks, whose padding is not known. Set chunk_size_feed_forward to 0."]
    if more := [name for module in ffn.modules() for name in _inputs_beside_tokens(module)]:
        return [f"{ffn.path} takes {', '.join(more)} beside tokens, which experts do not. Use a model of another kind."]
    wanted = {name for name, _ in build_experts(ffn.form.experts[0], 1, 1, 1).named_parameters()}
    given = set(ffn.parameters())
    found = []
    for names, verb, advice in ((given - wanted, "has biases", "without"), (wanted - given, "lacks biases", "with")):
        if names:
            linears = ", ".join(sorted({ffn.form.linears[name[1:]] for name in names}))
            found.append(
                f"{ffn.path} {verb} in {linears}, unlike a {ffn.form.experts[0]} expert. Use a model {advice} them."
            )
    return found


def _inputs_beside_tokens(module: nn.Module) -> list[str]:
    """What the module cannot be called without, after its first input: in BLOOM it adds the residual itself."""
    _, *others = inspect.signature(module.forward).parameters.values()
    return [it.name for it in others if it.default is it.empty and it.kind not in (it.VAR_POSITIONAL, it.VAR_KEYWORD)]


@torch.no_grad()
def _expert_kind(ffn: FFN, training: bool) -> str | None:
    """The kind of expert that computes the same with the FFN's weights, in float64, when it trains or evaluates."""
    device = ffn.linear("1").weight.device
    # From the activation's linear part to values far beyond those that training sees.
    scales = torch.logspace(-2, 2, 32, dtype=torch.float64)[:, None]
    x = torch.randn(32, ffn.hidden_size, generator=seeded_generator(ffn.path), dtype=torch.float64) * scales
    want = x = x.to(device)
    for module in ffn.modules():
        want = copy.deepcopy(module).double().train(training)(want)
    for kind in ffn.form.experts:
        expert = build_experts(kind, 1, ffn.hidden_size, ffn.ffn_hidden_size).to(device, torch.float64)
        for name, value in ffn.parameters().items():
            expert.get_parameter(name)[0] = value
        got = expert(x, x.new_ones(len(x)), torch.tensor([len(x)], device=device))
        if torch.allclose(got, want, rtol=1e-6, atol=1e-9 * float(want.abs().max())):
            return kind
    return None


def _unlike_any_expert(ffn: FFN) -> str:
    """The error for an FFN that no expert could replace."""
    return (
        f"{ffn.path} computes something else than any expert with its weights would ({', '.join(ffn.form.experts)}); "
        f"beside its linears it has {_beside_linears(ffn)}."
    )


def _beside_linears(ffn: FFN) -> str:
    """The modules of the FFN that are none of its linears, such as its activation."""
    linears = [ffn.linear(number) for number in ffn.form.linears]
    others = {
        type(part).__name__: None
        for module in ffn.modules()
        for part in module.modules()
        if part is not module and not any(part is linear for linear in linears)
    }
    return ", ".join(others) or "no other modules"


@torch.no_grad()
def _fill(layer: MoELayer, ffn: FFN, noise: float, parts: int) -> None:
    """Give every live expert of this rank the FFN's parameters, or its part of them."""
    first, inner = layer.local_slots.start, layer.ffn_hidden_size
    for name, source in ffn.parameters().items():
        target = layer.experts.get_parameter(name)
        scale = noise * source.std(correction=0)
        for expert_id, slot in layer.placement.slots_by_id.items():
            if slot in layer.local_slots:
                value: Tensor = source
                if noise > 0:
                    generator = seeded_generator(layer.seed, expert_id, name, "noise")
                    value = source + scale * torch.randn(source.shape, generator=generator).to(source)
                if name in layer.experts.unit_dims:
                    value = value.narrow(layer.experts.unit_dims[name] - 1, expert_id % parts * inner, inner)
                target[slot - first] = parts * value if name == "w2" else value
        target.requires_grad_(source.requires_grad)


def _join(path: str, name: str) -> str:
    return ".".join(filter(None, (path, name)))


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
