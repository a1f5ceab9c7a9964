import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dynmoe_ds.data import HeldOutOrder, TokenSequences
from dynmoe_ds.training.evaluation import eval_mode, held_out_loss, token_losses

VOCAB_SIZE, LENGTH = 11, 6


class PlainEngine:
    """A model behind the interface of an engine."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.device = module, torch.device("cpu")
        self.num_calls = 0

    def __call__(self, **batch):
        self.num_calls += 1
        return self.module(**batch)

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()


def _engine() -> PlainEngine:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    return PlainEngine(LlamaForCausalLM(config))


def _held_out(num_sequences: int) -> TokenSequences:
    generator = torch.Generator().manual_seed(1)
    return TokenSequences(torch.randint(VOCAB_SIZE, (num_sequences, LENGTH), generator=generator))


def _plain_mean(engine: PlainEngine, held_out: TokenSequences) -> float:
    """The definition: over all sequences and all tokens but the first, minus the log probability of the token."""
    total, count = 0.0, 0
    for tokens in held_out.tokens.long():
        log_probabilities = engine.module(tokens[None]).logits[0].detach().double().log_softmax(-1)
        for position in range(LENGTH - 1):
            total -= float(log_probabilities[position, tokens[position + 1]])
            count += 1
    return total / count


@pytest.mark.parametrize(("num_sequences", "micro"), [(1, 1), (5, 2), (3, 4), (4, 2)])
def test_held_out_loss_is_the_mean_over_tokens_whatever_the_repeats(num_sequences, micro):
    engine, held_out = _engine(), _held_out(num_sequences)
    order = HeldOutOrder(num_sequences=num_sequences, micro_batch_size=micro, rank=0, world_size=1)
    assert held_out_loss(engine, held_out, order) == pytest.approx(_plain_mean(engine, held_out), abs=1e-6)


def test_token_losses_agree_with_the_model_s_own_loss():
    engine, batch = _engine(), _held_out(3).batch([0, 1, 2])
    output = engine(**batch)
    torch.testing.assert_close(token_losses(output.logits, batch["labels"]).mean(), output.loss)


@pytest.mark.parametrize("was_training", [True, False])
def test_the_mode_comes_back_and_evaluation_makes_no_gradients(was_training):
    engine = _engine()
    engine.module.train(was_training)
    with eval_mode(engine):
        assert not engine.module.training
        assert not torch.is_grad_enabled()
    assert engine.module.training is was_training
    assert torch.is_grad_enabled()


def test_the_mode_comes_back_after_an_error():
    engine = _engine()
    engine.train()
    with pytest.raises(ValueError, match="broken"), eval_mode(engine):
        raise ValueError("broken")
    assert engine.module.training
