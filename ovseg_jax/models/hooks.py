"""Fields of towers that methods set, and config files cannot."""

HOOKS = ("adapter", "adapter_scale", "between", "last")
