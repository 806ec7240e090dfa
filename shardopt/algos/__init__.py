"""Algorithms: how each optimizer class is sharded."""

from shardopt.algos.base import Algorithm
from shardopt.algos.registry import algorithm_for, register

__all__ = ["Algorithm", "algorithm_for", "register"]
