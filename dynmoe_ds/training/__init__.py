"""The training loop and its parts."""

from dynmoe_ds.training.evaluation import held_out_loss
from dynmoe_ds.training.generation import generate
from dynmoe_ds.training.run import train
from dynmoe_ds.training.schedule import learning_rate
from dynmoe_ds.training.trainer import Trainer

__all__ = ["Trainer", "generate", "held_out_loss", "learning_rate", "train"]
