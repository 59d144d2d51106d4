"""Fields of image towers that hold functions or modules, and that no config file can hold."""

HOOKS = ("adapter", "adapter_scale", "between")
