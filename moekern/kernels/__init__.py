"""The ops: check the arguments, choose a backend. Plain tensors in, sums added to in place."""

from __future__ import annotations

from moekern.kernels.combine_and_measure import combine_and_measure
from moekern.kernels.dequantize import dequantize
from moekern.kernels.dispatch import BACKENDS, MISSING, OPS, PREFERENCE, available, backend_for, serves
from moekern.kernels.expert_gram import GramSums, expert_gram, gram_sums
from moekern.kernels.gated_energy import gated_energy
from moekern.kernels.grouped_mlp import grouped_mlp
from moekern.kernels.mixture_stats import mixture_stats
from moekern.kernels.quantised import Quantised
from moekern.kernels.router_stats import SCORES, router_stats
from moekern.kernels.scatter_residual import scatter_residual
from moekern.kernels.similarity import SimilaritySums, distance_sum, similarity, similarity_sums, sketch
from moekern.kernels.sort_by_expert import sort_by_expert
from moekern.kernels.sums import ExpertSums, MixtureSums, RouterSums, expert_sums, mixture_sums, router_sums
from moekern.kernels.vocabulary import pair_popcount, popcount, vocabulary, vocabulary_bits
from moekern.kernels.weight_stats import WeightSums, of_expert, stable_rank, weight_stats, weight_sums

__all__ = (
    "BACKENDS", "MISSING", "OPS", "PREFERENCE", "SCORES", "ExpertSums", "GramSums", "MixtureSums", "Quantised",
    "RouterSums", "SimilaritySums", "WeightSums", "available", "backend_for", "combine_and_measure", "dequantize",
    "distance_sum", "expert_gram", "expert_sums", "gated_energy", "gram_sums", "grouped_mlp", "mixture_stats",
    "mixture_sums", "of_expert", "pair_popcount", "popcount", "router_stats", "router_sums", "scatter_residual",
    "serves", "similarity", "similarity_sums", "sketch", "sort_by_expert", "stable_rank", "vocabulary",
    "vocabulary_bits", "weight_stats", "weight_sums",
)  # fmt: skip
