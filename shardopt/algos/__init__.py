"""Algorithms: how each optimizer class is sharded."""

from shardopt.algos.base import Algorithm
from shardopt.algos.lbfgs import SumsOverRanks
from shardopt.algos.mixture import class_name
from shardopt.algos.registry import algorithm_for, algorithms_for, register

__all__ = [
    "Algorithm",
    "SumsOverRanks",
    "algorithm_for",
    "algorithms_for",
    "class_name",
    "register",
]
