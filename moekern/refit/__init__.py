"""The mathematics of refitting one MoE layer to what it should put out, on plain tensors."""

from moekern.refit.refine import Refine, Refined, Trainable, TrainableExperts, refine_experts
from moekern.refit.ridge import Change, Experts, Refit, Ridge, refit_down
from moekern.refit.rows import Room, RowStore
from moekern.refit.units import Unit

__all__ = [
    "Change",
    "Experts",
    "Refine",
    "Refined",
    "Refit",
    "Ridge",
    "Room",
    "RowStore",
    "Trainable",
    "TrainableExperts",
    "Unit",
    "refine_experts",
    "refit_down",
]
