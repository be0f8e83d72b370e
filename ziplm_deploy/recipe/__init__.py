"""Recipes: one frozen section a file, every field with its unit, default and reason."""

from __future__ import annotations

from ziplm_deploy.recipe.benchmark import BenchmarkConfig
from ziplm_deploy.recipe.compression import CompressConfig, CompressTrainConfig, Int8Config, SparsityConfig
from ziplm_deploy.recipe.data import DataConfig, GeneratedConfig
from ziplm_deploy.recipe.export import ExportConfig, GgufType
from ziplm_deploy.recipe.latency import ProfileConfig
from ziplm_deploy.recipe.loading import load_recipe, parse_recipe
from ziplm_deploy.recipe.model import ModelConfig, Pooling, Similarity, TaskName
from ziplm_deploy.recipe.pruning import MethodName, PruneConfig, SearchConfig
from ziplm_deploy.recipe.recipe import Recipe
from ziplm_deploy.recipe.recovery import DenseConfig, LoraConfig, RecoverConfig, TrainConfig
from ziplm_deploy.recipe.reference import recipe_reference
from ziplm_deploy.recipe.variants import Variant, file_label, member_name
from ziplm_deploy.recipe.workload import Call, EngineName, Environment, Workload, with_nested_workload

__all__ = [
    "BenchmarkConfig",
    "Call",
    "CompressConfig",
    "CompressTrainConfig",
    "DataConfig",
    "DenseConfig",
    "EngineName",
    "Environment",
    "ExportConfig",
    "GeneratedConfig",
    "GgufType",
    "Int8Config",
    "LoraConfig",
    "MethodName",
    "ModelConfig",
    "Pooling",
    "ProfileConfig",
    "PruneConfig",
    "Recipe",
    "RecoverConfig",
    "SearchConfig",
    "Similarity",
    "SparsityConfig",
    "TaskName",
    "TrainConfig",
    "Variant",
    "Workload",
    "file_label",
    "load_recipe",
    "member_name",
    "parse_recipe",
    "recipe_reference",
    "with_nested_workload",
]
