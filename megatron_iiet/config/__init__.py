"""Typed configuration of a run: schema, strict loading, cross-field checks, the DeepSpeed side."""

from megatron_iiet.config.combinations import check_combination, gradient_accumulation_steps
from megatron_iiet.config.errors import ArgumentParser, ConfigError, exit_with_error
from megatron_iiet.config.load import (
    LoadedConfig,
    config_from_dict,
    config_from_file,
    config_to_dict,
    config_to_yaml,
    load_config,
    load_config_or_exit,
)
from megatron_iiet.config.schema import RunConfig, iterations_per_layer
from megatron_iiet.config.validation import validate

__all__ = [
    "ArgumentParser",
    "ConfigError",
    "LoadedConfig",
    "RunConfig",
    "check_combination",
    "config_from_dict",
    "config_from_file",
    "config_to_dict",
    "config_to_yaml",
    "exit_with_error",
    "gradient_accumulation_steps",
    "iterations_per_layer",
    "load_config",
    "load_config_or_exit",
    "validate",
]
