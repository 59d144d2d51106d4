"""Fields of towers that hold functions or modules, which config files cannot set."""

HOOKS = ("adapter", "adapter_scale", "between")
