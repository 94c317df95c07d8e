"""Names that Megatron-Core mentions in annotations and this project does not use."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})
