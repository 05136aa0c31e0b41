"""The one error this folder raises on purpose."""


class LoRAError(ValueError):
    """A model, an adapter config or an adapter file that cannot be used, in one line that says what to do."""
